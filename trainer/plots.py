"""The pictures of a run: curves of training and validation, and the confusion matrix."""

import io

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer import storage
from trainer.evaluation import EvaluationResult
from trainer.run_folder import RunFolder, RunResult

# Okabe-Ito: told apart with any colour vision.
_TRAIN_COLOUR, _VAL_COLOUR = "#0072B2", "#D55E00"


def write_plots(run: RunFolder, history: list[dict[str, float]], result: RunResult) -> None:
    """Writes ``plots/curves.png`` and ``plots/confusion.png``."""
    storage.write_bytes(run.path("plots", "curves.png"), _to_png(_draw_curves(history, result.best_epoch)))
    storage.write_bytes(run.path("plots", "confusion.png"), _to_png(_draw_confusion(result.val)))


def _draw_curves(history: list[dict[str, float]], best_epoch: int) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [row[name] for row in history], color=_TRAIN_COLOUR, marker=".", label="train")
        axes.plot(epochs, [row[f"val_{name}"] for row in history], color=_VAL_COLOUR, marker=".", label="val")
        axes.axvline(best_epoch, color="0.7", linestyle=":", label="best epoch")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def _draw_confusion(evaluation: EvaluationResult) -> Figure:
    names = [result.name for result in evaluation.per_class]
    side = max(4.0, 0.45 * len(names) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(evaluation.confusion, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title=str(evaluation).partition(" - ")[2])
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    highest = max(map(max, evaluation.confusion))
    for true, row in enumerate(evaluation.confusion):
        for predicted, count in enumerate(row):
            if count:
                colour = "white" if count > highest / 2 else "black"
                axes.text(predicted, true, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _to_png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
