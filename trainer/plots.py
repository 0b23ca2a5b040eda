"""The pictures of a run: curves, confusion matrix, gradient norms, and the worst mistakes."""

import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer import storage
from trainer.batch_table import BatchTable
from trainer.evaluation import EvaluationResult
from trainer.run_folder import RunFolder, RunResult

# Okabe-Ito: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73")
_TRAIN_COLOUR, _VAL_COLOUR, _ = COLOURS
_MISTAKES_IN_A_ROW, _MOST_MISTAKES = 4, 16


def write_plots(
    run: RunFolder, history: list[dict[str, float]], steps: pa.Table, result: RunResult, clip_norm: float
) -> None:
    """Writes ``plots/curves.png``, ``plots/confusion.png`` and ``plots/gradients.png``."""
    figures = {
        "curves": _draw_curves(history, result.best_epoch),
        "confusion": _draw_confusion(result.val),
        "gradients": _draw_gradients(steps, clip_norm),
    }
    for name, figure in figures.items():
        storage.write_bytes(run.path("plots", f"{name}.png"), to_png(figure))


def write_mistakes(
    run: RunFolder, images: npt.NDArray[np.uint8], predictions: pa.Table, class_names: list[str]
) -> None:
    """Writes ``plots/mistakes.png``: the wrong predictions with the highest loss, as pictures.

    Args:
        run: the run.
        images: uint8 ``[rows, height, width, channels]`` of the validation split.
        predictions: one row an image, as from `trainer.evaluation.predictions_table`.
        class_names: by label.
    """
    labels, predicted = predictions["label"].to_numpy(), predictions["predicted"].to_numpy()
    confidence, losses = predictions["confidence"].to_numpy(), predictions["loss"].to_numpy()
    wrong = np.flatnonzero(labels != predicted)
    worst = wrong[np.argsort(-losses[wrong], kind="stable")][:_MOST_MISTAKES]
    rows = max(1, -(-len(worst) // _MISTAKES_IN_A_ROW))
    figure = Figure(figsize=(8, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{len(wrong)} of {len(labels)} wrong" + (", worst first" if len(worst) else ""))
    for axes, row in zip(figure.subplots(rows, _MISTAKES_IN_A_ROW, squeeze=False).flat, worst, strict=False):
        axes.imshow(images[row].squeeze(), cmap="gray", vmin=0, vmax=255)
        title = f"{class_names[labels[row]]}, not {class_names[predicted[row]]}\n({confidence[row]:.2f} sure)"
        axes.set_title(title, fontsize=8, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    storage.write_bytes(run.path("plots", "mistakes.png"), to_png(figure))


def write_batch_sizes(run: RunFolder, table: BatchTable) -> None:
    """Writes ``plots/batch_sizes.png``: throughput and memory by batch size, one line a precision."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    of_speed, of_memory = figure.subplots(1, 2)
    for (name, rows), colour in zip(table.measurements.items(), COLOURS, strict=False):
        sizes = [one.size * one.num_replicas for one in rows]
        of_speed.plot(sizes, [one.images_per_second for one in rows], color=colour, marker=".", label=name)
        of_memory.plot(sizes, [one.peak_memory_gib for one in rows], color=colour, marker=".", label=name)
    of_memory.axhline(table.target_gib, color="0.4", linestyle=":", label="most that is used")
    of_speed.set(ylabel="images/s", ylim=(0, None))
    of_memory.set(ylabel="GiB a worker", ylim=(0, None))
    for axes in (of_speed, of_memory):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="global batch")
        axes.legend()
    storage.write_bytes(run.path("plots", "batch_sizes.png"), to_png(figure))


def _draw_curves(history: list[dict[str, float]], best_epoch: int) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    *of_both, of_rate = figure.subplots(1, 3)
    for axes, name in zip(of_both, ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [row[name] for row in history], color=_TRAIN_COLOUR, marker=".", label="train")
        axes.plot(epochs, [row[f"val_{name}"] for row in history], color=_VAL_COLOUR, marker=".", label="val")
        axes.axvline(best_epoch, color="0.7", linestyle=":", label="best epoch")
        axes.legend()
        axes.set(ylabel=name)
    of_rate.plot(epochs, [row["learning_rate"] for row in history], color=_TRAIN_COLOUR, marker=".")
    of_rate.set(ylabel="learning rate at the end of the epoch")
    for axes in (*of_both, of_rate):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_gradients(steps: pa.Table, clip_norm: float) -> Figure:
    """Tuning playbook: the norm of the full unclipped gradient by step and as a histogram, and where it is clipped."""
    norms = steps["grad_norm"].to_numpy()
    norms = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, histogram = figure.subplots(1, 2)
    by_step.semilogy(steps["step"].to_numpy(), norms, color=_TRAIN_COLOUR, linewidth=0.8)
    by_step.set(xlabel="step", ylabel="gradient norm, unclipped")
    known = norms[np.isfinite(norms)]
    if len(known):
        histogram.hist(known, bins=np.geomspace(known.min() * 0.99, known.max() * 1.01, 40), color=_TRAIN_COLOUR)
        histogram.axvline(np.percentile(known, 90), color="0.5", linestyle=":", label="90th percentile")
    histogram.set(xlabel="gradient norm, unclipped", ylabel="steps", xscale="log")
    if clip_norm:
        by_step.axhline(clip_norm, color=_VAL_COLOUR, linestyle="--", label=f"clipped to {clip_norm:g}")
        histogram.axvline(clip_norm, color=_VAL_COLOUR, linestyle="--", label=f"clipped to {clip_norm:g}")
        by_step.legend()
    if histogram.get_legend_handles_labels()[0]:
        histogram.legend()
    return figure


def _draw_confusion(evaluation: EvaluationResult) -> Figure:
    names = [result.name for result in evaluation.per_class]
    side = max(4.0, 0.45 * len(names) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(evaluation.confusion, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title=str(evaluation).partition(" - ")[2])
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    highest = max(map(max, evaluation.confusion))
    for true, row in enumerate(evaluation.confusion):
        for predicted, count in enumerate(row):
            if count:
                colour = "white" if count > highest / 2 else "black"
                axes.text(predicted, true, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def to_png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
