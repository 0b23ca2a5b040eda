"""The page of one run: its curves, confusion matrix, mistakes and classes, with all that it needs inside."""

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.notes.note import describe_change, describe_choices, describe_training, describe_unfinished
from trainer.record.epoch_row import Metrics, find_curve, has_spike
from trainer.record.evaluation_result import ClassResult, EvaluationResult, find_mistakes
from trainer.record.predictions import find_suspects
from trainer.record.run_folder import RunFolder, RunInterruption, RunRecord, RunResult, StartedRun
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.html import find_links, link, render_page, to_script_json
from trainer.runtime.markdown import MOST_CLASSES, shorten_digest

# The folder of the pages beside the report. A run cannot have this name.
PAGES_FOLDER = "_pages"

_MOST_POINTS = 400
# Without their thumbnails, which only the worst have, they take about two megabytes.
_MOST_MISTAKES = 20_000
_DIGITS = 4
# The state is near the start of a page.
_STATE_BYTES = 400


@dataclass(frozen=True)
class RunView:
    """What the pages show of one run."""

    run: StartedRun
    ending: RunResult | RunInterruption | None
    unreadable: str
    """Why the end of the run cannot be read; empty if it can."""
    change: str
    """How its options differ from those of the run before."""

    @property
    def name(self) -> str:
        """The run name."""
        return self.run.folder.name

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.run.folder

    @property
    def record(self) -> RunRecord:
        """How it was started."""
        return self.run.record

    @property
    def result(self) -> RunResult | None:
        """Its result; None if it has none."""
        return self.ending if isinstance(self.ending, RunResult) else None

    @property
    def status(self) -> str:
        """How it ended, in a word or two."""
        return "cannot be read" if self.unreadable else self.ending.status if self.ending else "not finished"

    @property
    def unfinished(self) -> str:
        """Why it has no result; empty if it has one."""
        if isinstance(self.ending, RunResult):
            return ""
        return self.unreadable or describe_unfinished(self.ending)

    @property
    def dataset(self) -> str:
        """The name of the dataset's folder."""
        return storage.basename(self.record.config.dataset) or self.record.config.dataset


def view_run(run: StartedRun, runs: Sequence[StartedRun]) -> RunView:
    """Read how a run ended.

    Args:
        run: one of ``runs``.
        runs: of one storage, in the order in which they were started.
    """
    try:
        ending, unreadable = run.folder.read_ending(), ""
    except InputError as error:
        ending, unreadable = None, str(error)
    return RunView(run, ending, unreadable, describe_change(run, runs))


def write_run_page(view: RunView, folder: str, overview: tuple[str, str]) -> str:
    """Write the page of a run unless it is there already, and return its URI.

    Args:
        view: of the run.
        folder: URI of the folder of pages.
        overview: name and URI of the page that lists the run.
    """
    uri = storage.join(folder, f"{view.name}.html")
    state = _find_state(view, folder, overview)
    if view.ending is None or state.encode() not in _read_start(uri):
        storage.write_bytes(uri, format_run_page(view, folder, overview, state).encode())
    return uri


def _read_start(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri, 0, _STATE_BYTES)
    except FileNotFoundError:
        return b""


def _find_state(view: RunView, folder: str, overview: tuple[str, str]) -> str:
    """Return a digest of what a page is made from: a run that has ended changes no more."""
    digest = hashlib.sha256(view.ending.to_json() if view.ending else b"")
    for text in (view.change, folder, *overview, view.record.config.model_dump_json()):
        digest.update(text.encode())
    digest.update(_hash_templates())
    return shorten_digest(digest.hexdigest())


@functools.cache
def _hash_templates() -> bytes:
    digest = hashlib.sha256()
    for file in sorted(resources.files("trainer.runtime").joinpath("templates").iterdir(), key=lambda one: one.name):
        digest.update(file.read_bytes())
    return digest.digest()


def format_run_page(view: RunView, folder: str, overview: tuple[str, str], state: str = "") -> str:
    """Format the page of a run as HTML text.

    Args:
        view: of the run.
        folder: URI of the folder that the page is for, from which its links lead.
        overview: name and URI of the page that lists the run.
        state: what the page was made from.
    """
    history, steps, unreadable = _read_curves(view)
    if unreadable and not view.unreadable:
        view = RunView(view.run, None, unreadable, view.change)
    result, config = view.result, view.record.config
    rates = [row["images_per_second"] for row in history if "images_per_second" in row]
    data: dict[str, Any] = {"charts": _draw_curves(history, result.best_epoch if result else None)}
    if steps is not None and len(steps) and {"step", "grad_norm"} <= set(steps.column_names):
        data["charts"].append(_draw_gradient_norms(steps, config.clip_norm))
    few = result is not None and len(result.val.per_class) <= MOST_CLASSES
    return render_page(
        "run.html.jinja",
        run=view,
        state=state,
        links=_find_links(view, folder, overview),
        choices=describe_choices(config, result) if result else [],
        training=describe_training(config, result.steps if result else len(steps or ())),
        images_per_second=float(np.median(rates)) if rates else 0.0,
        confusion=_fill_matrix(result.val) if result and few else [],
        labels={one.name: label for label, one in enumerate(result.val.per_class)} if result else {},
        scores=result.val.scores if result else {},
        classes=_order_classes(result.val) if result else [],
        data=to_script_json(data | (_describe_mistakes(view.folder, result.val) if result else {"mistakes": []})),
    )


def _read_curves(view: RunView) -> tuple[list[Metrics], pa.Table | None, str]:
    """Read the metrics of a run; if they cannot be read, return none and the reason."""
    try:
        return view.folder.read_metrics(), view.folder.read_steps(), view.unreadable
    except InputError as error:
        return [], None, str(error)


def _find_links(view: RunView, folder: str, overview: tuple[str, str]) -> list[tuple[str, str]]:
    """Return names and addresses of what there is about a run elsewhere."""
    run = view.folder
    places = {
        "note": run.path("note.md"),
        "explanations": run.path("explanations", "report.html"),
        "predictions": run.path("predictions.parquet"),
        "metrics": run.path("metrics.csv"),
        "model": run.path("model.keras"),
        "dataset card": storage.join(view.record.config.dataset, "README.md"),
    }
    name, uri = overview
    return [(name, link(folder, uri)), *find_links(folder, places)]


def thin_out(values: Sequence[float] | npt.NDArray[Any], most: int) -> list[float | None]:
    """Return at most so many of some values, evenly chosen, with few digits; None where one is not finite."""
    stride = max(1, math.ceil(len(values) / most))
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in map(float, values[::stride])]


def _draw_curves(history: Sequence[Metrics], best_epoch: int | None) -> list[dict[str, Any]]:
    if not history:
        return []
    history = find_curve(history, best_epoch)
    epochs = thin_out([row["epoch"] for row in history], _MOST_POINTS)
    best = best_epoch if best_epoch in epochs else None

    def line(name: str, key: str, color: str, best: int | None = None) -> dict[str, Any]:
        values = thin_out([row.get(key, math.nan) for row in history], _MOST_POINTS)
        return {"name": name, "x": epochs, "y": values, "color": color, "best": best}

    charts = [
        {
            "title": name,
            "unit": "epoch",
            "lines": [line("train", name, "--train"), line("val", f"val_{name}", "--val", best)],
            "logarithmic": name == "loss"
            and has_spike(row.get(one, 0.0) for row in history for one in ("loss", "val_loss")),
        }
        for name in ("loss", "accuracy")
    ]
    if any("learning_rate" in row for row in history):
        rate = line("learning rate", "learning_rate", "--train")
        charts.append({"title": "learning rate at the end of the epoch", "unit": "epoch", "lines": [rate]})
    return charts


def _draw_gradient_norms(steps: pa.Table, clip_norm: float) -> dict[str, Any]:
    positions = thin_out(steps["step"].to_numpy(), _MOST_POINTS)
    norms = {"name": "norm", "x": positions, "y": thin_out(steps["grad_norm"].to_numpy(), _MOST_POINTS)}
    lines: list[dict[str, Any]] = [{**norms, "color": "--train"}]
    if clip_norm:
        ends = positions[:1] + positions[-1:]
        lines.append({"name": "clipped to", "x": ends, "y": [clip_norm] * 2, "color": "--val", "dashed": True})
    return {"title": "gradient norm, unclipped", "unit": "step", "lines": lines, "logarithmic": True}


def _fill_matrix(evaluation: EvaluationResult) -> list[list[int]]:
    matrix = np.zeros((len(evaluation.per_class),) * 2, np.int64)
    labels, predicted, counts = evaluation.confusion
    matrix[labels, predicted] = counts
    rows: list[list[int]] = matrix.tolist()
    return rows


def _order_classes(evaluation: EvaluationResult) -> list[ClassResult]:
    """Return the classes in their order; if there are many, those with the lowest accuracy first."""
    if len(evaluation.per_class) <= MOST_CLASSES:
        return evaluation.per_class
    return sorted(evaluation.per_class, key=lambda one: one.correct / one.total if one.total else 1.0)


def _describe_mistakes(run: RunFolder, val: EvaluationResult) -> dict[str, Any]:
    """Return the mistakes and the labels that may be wrong, with their thumbnails."""
    names = [one.name for one in val.per_class]
    try:
        predictions, thumbnails = run.read_predictions(), run.read_thumbnails()
    except InputError:
        predictions, thumbnails = None, {}
    if predictions is None or not {"confidence", "loss"} <= set(predictions.column_names):
        return {"mistakes": []}
    wrong = find_mistakes(predictions, most=None)
    labels = {name: label for label, name in enumerate(names)}
    suspects = find_suspects(predictions)
    return {
        "classes": names,
        "wrong": len(wrong),
        "mistakes": _list_rows(predictions, wrong[:_MOST_MISTAKES], labels, "loss"),
        "suspects": _list_rows(predictions, suspects, labels, "mean_loss"),
        "images": {str(row): base64.b64encode(content).decode() for row, content in thumbnails.items()},
    }


def _list_rows(
    predictions: pa.Table, rows: npt.NDArray[np.int64], labels: Mapping[str, int], loss: str
) -> list[list[Any]]:
    """Return row, path, label, predicted label, confidence and a loss of some predictions."""
    return [
        [
            *(row, one.get("path", ""), labels.get(one["label"], -1), labels.get(one["predicted"], -1)),
            *(round(one["confidence"], 3), round(one[loss], 3)),
        ]
        for row, one in zip(rows.tolist(), predictions.take(rows).to_pylist(), strict=True)
    ]
