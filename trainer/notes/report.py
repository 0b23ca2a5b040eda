"""The report: all runs of a storage on one self-contained HTML page."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.config.config import describe_value
from trainer.notes.comparison import compare_predictions
from trainer.notes.note import NOTEBOOK_NAME, describe_change, describe_training, describe_unfinished, format_notebook
from trainer.record.epoch_row import Metrics
from trainer.record.evaluation_result import EvaluationResult
from trainer.record.run_folder import RunFolder, RunInterruption, RunRecord, RunResult, StartedRun, find_runs
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.html import render_page, to_data_uri
from trainer.runtime.markdown import MOST_CLASSES
from trainer.runtime.pages import check_place

REPORT_NAME = "report.html"
# Pages of earlier versions have only the second mark.
_MARKS = ('<meta name="generator" content="training-notes notes">', "<caption>All runs. A heading sorts by its column.")
_MOST_POINTS = 300
# Size of the drawing area of a chart; the template scales it.
_CHART_WIDTH, _CHART_HEIGHT = 300, 120


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    points: str
    """Points of an SVG polyline."""


@dataclass(frozen=True)
class Chart:
    """A small chart: lines over epochs or steps, and the labels of its axes."""

    title: str
    lines: list[Line]
    low: str
    high: str
    last: str


@dataclass(frozen=True)
class RunView:
    """The parts of the page for one run."""

    name: str
    record: RunRecord
    result: RunResult | None
    status: str
    unfinished: str
    """Why it has no result; empty if it has one."""
    change: str
    training: str
    images_per_second: float
    charts: list[Chart]
    confusion: list[list[int]]
    """Rows are true labels, columns predicted ones; empty if there are too many classes."""
    mistakes: str
    """Data URI of the worst mistakes, or empty."""


def write_notes_and_report(storage_uri: str, output: str = "") -> tuple[list[str], list[str]]:
    """Write ``NOTES.md`` and ``report.html`` of all runs below a storage.

    Args:
        storage_uri: where the runs are; only read if there is another output.
        output: folder or s3:// prefix; empty for the storage.

    Returns:
        The URIs of both files, and one line for each run that cannot be read.

    Raises:
        InputError: there are no runs, or the output cannot be written or holds files of these names that this program
            did not write.
    """
    root = storage.resolve_uri(storage_uri)
    folder = storage.choose_output(output, root)
    check_place(folder, REPORT_NAME, [NOTEBOOK_NAME], _MARKS, "--output")
    runs, left_out = find_runs(root)
    if not runs:
        cause = f"no run that can be read: {left_out[0]}" if left_out else "no runs"
        raise InputError(f"STORAGE {storage_uri} holds {cause}; give what jobs/train.py was given as --storage")
    # The page first: it vouches for the other file.
    written = {REPORT_NAME: format_report(runs, left_out), NOTEBOOK_NAME: format_notebook(runs, left_out)}
    for name, text in written.items():
        storage.write_bytes(storage.join(folder, name), text.encode())
    return sorted(storage.join(folder, name) for name in written), left_out


def format_report(runs: Sequence[StartedRun], left_out: Sequence[str] = ()) -> str:
    """Format the page as HTML text.

    Args:
        runs: of one storage, in the order in which they were started.
        left_out: a line for each run that cannot be read.
    """
    views = [_view(run, runs) for run in runs]
    return render_page(
        "report.html.jinja",
        runs=views,
        left_out=left_out,
        width=_CHART_WIDTH,
        height=_CHART_HEIGHT,
        data=_to_script_json({"runs": [_describe(view) for view in views], "verdicts": _compare(runs, views)}),
    )


def _to_script_json(value: Any) -> str:
    """Return JSON that cannot close the script element around it."""
    return json.dumps(value).replace("<", "\\u003c")


def _describe(view: RunView) -> dict[str, Any]:
    return {
        "name": view.name,
        "config": {name: describe_value(name, value) for name, value in view.record.config.model_dump().items()},
    }


def _view(run: StartedRun, runs: Sequence[StartedRun]) -> RunView:
    folder, record = run.folder, run.record
    ending, history, steps, unreadable = _read(folder)
    result = ending if isinstance(ending, RunResult) else None
    charts = []
    if history:
        epochs = np.array([row["epoch"] for row in history])
        for name in ("loss", "accuracy"):
            lines = {
                "train": np.array([row.get(name, np.nan) for row in history]),
                "val": np.array([row.get(f"val_{name}", np.nan) for row in history]),
            }
            charts.append(_draw(name, epochs, lines, "epoch"))
    if steps is not None and len(steps) and {"step", "grad_norm"} <= set(steps.column_names):
        charts.append(_draw_gradient_norms(steps, record.config.clip_norm))
    rates = [row["images_per_second"] for row in history if "images_per_second" in row]
    return RunView(
        name=folder.name,
        record=record,
        result=result,
        status="cannot be read" if unreadable else ending.status if ending else "not finished",
        unfinished="" if isinstance(ending, RunResult) else unreadable or describe_unfinished(ending),
        change=describe_change(run, runs),
        training=describe_training(record.config, result.steps if result else len(steps or ())),
        images_per_second=float(np.median(rates)) if rates else 0.0,
        charts=charts,
        confusion=_fill_matrix(result.val) if result and len(result.val.per_class) <= MOST_CLASSES else [],
        mistakes=_read_picture(folder.path("plots", "mistakes.png")),
    )


def _fill_matrix(evaluation: EvaluationResult) -> list[list[int]]:
    matrix = np.zeros((len(evaluation.per_class),) * 2, np.int64)
    labels, predicted, counts = evaluation.confusion
    matrix[labels, predicted] = counts
    rows: list[list[int]] = matrix.tolist()
    return rows


def _read(run: RunFolder) -> tuple[RunResult | RunInterruption | None, list[Metrics], pa.Table | None, str]:
    """Read what the page shows of a run; if it cannot be read, return nothing and the reason."""
    try:
        return run.read_ending(), run.read_metrics(), run.read_steps(), ""
    except InputError as error:
        return None, [], None, str(error)


def _draw_gradient_norms(steps: pa.Table, clip_norm: float) -> Chart:
    norms = steps["grad_norm"].to_numpy().astype(np.float64)
    norms = np.log10(np.where(np.isfinite(norms) & (norms > 0), norms, np.nan))
    lines = {"norm": norms}
    if clip_norm:
        lines["clipped to"] = np.full(len(norms), np.log10(clip_norm))
    return _draw("gradient norm, unclipped", steps["step"].to_numpy(), lines, "step", logarithmic=True)


def _draw(
    title: str,
    positions: npt.NDArray[Any],
    lines: dict[str, npt.NDArray[np.float64]],
    unit: str,
    *,
    logarithmic: bool = False,
) -> Chart:
    """Return a chart of values by position; if they are logarithms, the labels are their powers of ten."""
    known = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    stride = -(-len(positions) // _MOST_POINTS)
    first, last = positions[0], positions[-1]
    x = (positions[::stride] - first) / max(1, last - first) * _CHART_WIDTH

    def points(values: npt.NDArray[np.float64]) -> str:
        y = (1 - (values[::stride] - low) / max(high - low, 1e-9)) * _CHART_HEIGHT
        return " ".join(f"{one:.1f},{other:.1f}" for one, other in zip(x, y, strict=True) if np.isfinite(other))

    low_label, high_label = (f"{10**value if logarithmic else value:.3g}" for value in (low, high))
    drawn = [Line(name, points(values)) for name, values in lines.items()]
    return Chart(title, drawn, low_label, high_label, f"{unit} {last:.0f}")


def _read_picture(uri: str) -> str:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return ""
    return to_data_uri(content)


def _read_predictions(run: RunFolder) -> pa.Table | None:
    try:
        return run.read_predictions()
    except InputError:
        return None


def _compare(runs: Sequence[StartedRun], views: list[RunView]) -> dict[str, str]:
    """Return the verdict on each pair of finished runs, by ``first,second``."""
    predictions = {
        index: table
        for index, (run, view) in enumerate(zip(runs, views, strict=True))
        if view.result and (table := _read_predictions(run.folder))
    }
    verdicts = {}
    for first, second in itertools.combinations(predictions, 2):
        one, other = views[first], views[second]
        if one.record.config.dataset_fingerprint != other.record.config.dataset_fingerprint:
            text = "trained and validated on different datasets: only the intervals can be compared"
        else:
            text = compare_predictions(predictions[first], predictions[second]).describe(one.name, other.name)
        verdicts[f"{first},{second}"] = text
    return verdicts
