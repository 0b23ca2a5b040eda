"""Plots of a run: curves, confusion matrix, gradient norms, and the worst mistakes."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.config.batch_table import BatchTable
from trainer.record.epoch_row import Metrics, find_curve, has_spike
from trainer.record.evaluation_result import EvaluationResult, find_mistakes
from trainer.record.run_folder import RunFolder, RunResult
from trainer.runtime.fonts import fonts_for
from trainer.runtime.markdown import MOST_CLASSES, format_count, shorten_name

# Okabe-Ito: distinguishable with any color vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73")
_TRAIN_COLOUR, _VAL_COLOUR, _ = COLOURS
# Lines that only guide the eye; a page shows them in a color of its own.
GUIDE_COLOUR = "#cccccc"
_MISTAKES_IN_A_ROW = 4
_DPI = 110
# Inches; 2,000 pixels at _DPI.
_LARGEST_SIDE = 18.0
# Blocks on each side of the overview of a large matrix.
_MOST_BLOCKS = 400


def write_plots(run: RunFolder, history: list[Metrics], steps: pa.Table, result: RunResult, clip_norm: float) -> str:
    """Write ``plots/curves.png``, ``plots/confusion.png`` and ``plots/gradients.png``.

    Returns:
        The characters of class names that no font of this machine has.
    """
    with fonts_for("".join(one.name for one in result.val.per_class)) as missing:
        figures = {
            "curves": draw_curves(history, result.best_epoch),
            "confusion": draw_confusion(result.val),
            "gradients": draw_gradients(steps, clip_norm),
        }
        for name, figure in figures.items():
            run.write(to_png(figure), "plots", f"{name}.png")
    return missing


def write_mistakes(run: RunFolder, images: npt.NDArray[np.uint8], predictions: pa.Table) -> None:
    """Write ``plots/mistakes.png``, as drawn by `draw_mistakes`."""
    shown = predictions.take(find_mistakes(predictions))
    names = [name for column in ("label", "predicted", "path") for name in _texts(shown, column)]
    with fonts_for("".join(names)):
        figure = draw_mistakes(images, predictions)
        run.write(to_png(figure), "plots", "mistakes.png")


def _texts(table: pa.Table, column: str) -> list[str]:
    """Return a column of text, empty where a run of an earlier version lacks it."""
    texts: list[str] = table[column].to_pylist() if column in table.column_names else [""] * len(table)
    return texts


def draw_mistakes(images: npt.NDArray[np.uint8], predictions: pa.Table) -> Figure:
    """Draw the images with the wrong predictions of the highest loss.

    Args:
        images: uint8 ``[mistakes, height, width, channels]``, those of `find_mistakes`.
        predictions: one row per validation image, as in ``predictions.parquet``.
    """
    labels, predicted, paths = (_texts(predictions, name) for name in ("label", "predicted", "path"))
    confidence, worst = predictions["confidence"].to_numpy(), find_mistakes(predictions)
    rows = max(1, -(-len(worst) // _MISTAKES_IN_A_ROW))
    figure = Figure(figsize=(8, 2.5 * rows + 0.4), layout="constrained")
    num_wrong = len(find_mistakes(predictions, most=None))
    figure.suptitle(f"{num_wrong} of {len(labels)} wrong" + (", highest loss first" if num_wrong else ""))
    all_axes = figure.subplots(rows, _MISTAKES_IN_A_ROW, squeeze=False).flat
    for axes, image, row in zip(all_axes, images, worst, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        label, other, path = (shorten_name(texts[row]) for texts in (labels, predicted, paths))
        title = f"{label},\nnot {other}\n(confidence {confidence[row]:.2f})"
        axes.set_title(f"{path}\n{title}" if path else title, fontsize=8, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def write_batch_sizes(run: RunFolder, table: BatchTable) -> None:
    """Write ``plots/batch_sizes.png``, as `draw_batch_sizes` makes it."""
    run.write(to_png(draw_batch_sizes(table)), "plots", "batch_sizes.png")


def draw_batch_sizes(table: BatchTable) -> Figure:
    """Draw throughput and memory by batch size, one line a precision."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    of_speed, of_memory = figure.subplots(1, 2)
    for (name, rows), colour in zip(table.measurements.items(), COLOURS, strict=False):
        sizes = [one.size * one.num_replicas for one in rows]
        of_speed.plot(sizes, [one.images_per_second for one in rows], color=colour, marker=".", label=name)
        of_memory.plot(sizes, [one.peak_memory_gib for one in rows], color=colour, marker=".", label=name)
    of_memory.axhline(table.target_gib, color="0.4", linestyle=":", label="most that is used")
    of_speed.set(ylabel="images/s", ylim=(0, None))
    of_memory.set(ylabel="GiB per worker", ylim=(0, None))
    for axes in (of_speed, of_memory):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="global batch")
        axes.legend()
    return figure


def draw_curves(history: list[Metrics], best_epoch: int) -> Figure:
    """Draw loss and accuracy of both splits and the learning rate by epoch, and mark the best epoch."""
    figure, history = Figure(figsize=(13, 4), layout="constrained"), find_curve(history, best_epoch)
    epochs = [row["epoch"] for row in history]
    *of_both, of_rate = figure.subplots(1, 3)
    for axes, name in zip(of_both, ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [row[name] for row in history], color=_TRAIN_COLOUR, marker=".", label="train")
        axes.plot(epochs, [row[f"val_{name}"] for row in history], color=_VAL_COLOUR, marker=".", label="val")
        axes.axvline(best_epoch, color="0.7", linestyle=":", label="best epoch")
        axes.legend()
        axes.set(ylabel=name)
    set_loss_scale(of_both[0], history)
    of_rate.plot(epochs, [row["learning_rate"] for row in history], color=_TRAIN_COLOUR, marker=".")
    of_rate.set(ylabel="learning rate at the end of the epoch")
    for axes in (*of_both, of_rate):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def set_loss_scale(axes: Axes, rows: Iterable[Mapping[str, Any]]) -> None:
    """Make an axis of losses logarithmic if one of some epochs would flatten all others on it."""
    if has_spike([row[name] for row in rows for name in ("loss", "val_loss") if name in row]):
        axes.set_yscale("log")


def draw_gradients(steps: pa.Table, clip_norm: float) -> Figure:
    """Draw the norm of the full unclipped gradient by step and as a histogram, and where it is clipped.

    The 90th percentile is marked, since the tuning playbook chooses the clipping threshold by it.
    """
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


def draw_confusion(evaluation: EvaluationResult) -> Figure:
    """Draw how many images of each class were predicted as which: all counts, or an overview of many classes."""
    few = len(evaluation.per_class) <= MOST_CLASSES
    return _draw_confusion_counts(evaluation) if few else _draw_confusion_overview(evaluation)


def _draw_confusion_counts(evaluation: EvaluationResult) -> Figure:
    names = [shorten_name(result.name) for result in evaluation.per_class]
    side = min(max(4.0, 0.45 * len(names) + 2), _LARGEST_SIDE)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    matrix = np.zeros((len(names), len(names)), np.int64)
    labels, predicted, counts = evaluation.confusion
    matrix[labels, predicted] = counts
    axes.imshow(matrix, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title=_title(evaluation))
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    for row, column, count in zip(labels, predicted, counts, strict=True):
        colour = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _draw_confusion_overview(evaluation: EvaluationResult) -> Figure:
    """Draw the matrix, with neighboring classes added up if there are many, and list the most confused classes."""
    num_classes = len(evaluation.per_class)
    block = -(-num_classes // _MOST_BLOCKS)
    blocks = -(-num_classes // block)
    labels, predicted, counts = evaluation.confusion
    matrix = np.zeros((blocks, blocks))
    np.add.at(matrix, (labels // block, predicted // block), counts)
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(_LARGEST_SIDE, 10), layout="constrained")
    axes, listed = figure.subplots(1, 2, width_ratios=(3, 2))
    # The power makes small shares visible.
    shares = axes.imshow(matrix, cmap="Blues", norm=PowerNorm(0.4, 0, 1), extent=(0, blocks * block, blocks * block, 0))
    figure.colorbar(shares, ax=axes, label="share of the images of the true class")
    axes.set(xlabel="predicted, by class number", ylabel="true, by class number")
    axes.set_title(_title(evaluation))
    listed.set_axis_off()
    lines = [
        f"{shorten_name(name)}, predicted as {shorten_name(other)}: {count}"
        for name, other, count in evaluation.most_confused
    ]
    title = f"{format_count(num_classes, 'class')}; images most often confused:"
    listed.text(0, 1, "\n".join([title, "", *(lines or ["none"])]), va="top", linespacing=1.6, parse_math=False)
    return figure


def _title(evaluation: EvaluationResult) -> str:
    return str(evaluation).partition(" - ")[2]


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element that takes the colors of the page around it, light or dark."""
    for axes in figure.axes:
        if legend := axes.get_legend():
            legend.get_frame().set_alpha(0)
    sink = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        # Without metadata, which names sites.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=metadata)
    text = sink.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    for number, color in enumerate(COLOURS):
        text = text.replace(color.lower(), f"var(--c{number})")
    return text.replace(GUIDE_COLOUR, "var(--line)")


def to_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=_DPI)
    return sink.getvalue()
