"""The report: a page of all runs of a storage, and a page of each."""

import base64
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config.config import describe_value
from trainer.notes.note import NOTEBOOK_NAME, format_notebook
from trainer.notes.run_page import PAGES_FOLDER, RunView, thin_out, view_run, write_run_page
from trainer.record.epoch_row import find_curve, has_spike
from trainer.record.run_folder import RunFolder, RunRecord, RunResult, StartedRun, find_runs
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.events import OnEvent, StageProgressed, ignore_event
from trainer.runtime.html import link, render_page, to_script_json
from trainer.runtime.pages import check_place

REPORT_NAME = "report.html"
# Pages of earlier versions have only the second mark.
_MARKS = ('<meta name="generator" content="training-notes notes">', "<caption>All runs. A heading sorts by its column.")
# Points of a curve on the page of all runs; the page of a run has more.
_MOST_POINTS = 60
# What says which predictions are correct, to compare runs in the browser, takes at most so many bytes of the page.
_MOST_CORRECT_BYTES = 1_500_000
_LONGEST_SYMPTOM = 40


@dataclass(frozen=True)
class Row:
    """The row of a run in the table of all runs."""

    name: str
    href: str
    record: RunRecord
    result: RunResult | None
    dataset: str
    dataset_href: str
    """Address of the card of the dataset; empty if there is none."""
    symptoms: str
    """The first words of its findings, or why it has no result."""


@dataclass(frozen=True)
class StudyLink:
    """The page of a study's round."""

    name: str
    href: str


def write_notes_and_report(
    storage_uri: str, output: str = "", on_event: OnEvent = ignore_event
) -> tuple[list[str], list[str]]:
    """Write ``NOTES.md``, ``report.html`` and a page for each run below a storage.

    Args:
        storage_uri: where the runs are; only read if there is another output.
        output: folder or s3:// prefix; empty for the storage.
        on_event: called with the progress.

    Returns:
        The URIs of the notebook and the report, and one line for each run that cannot be read.

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
    views = [view_run(run, runs) for run in runs]
    pages, report = storage.join(folder, PAGES_FOLDER), storage.join(folder, REPORT_NAME)
    # The page of all runs first: it vouches for the other files.
    storage.write_bytes(report, format_report(views, folder, find_studies(root, runs), left_out).encode())
    for number, view in enumerate(views):
        on_event(StageProgressed("pages", number, len(views)))
        write_run_page(view, pages, ("all runs", report))
    on_event(StageProgressed("pages", len(views), len(views)))
    notebook = storage.join(folder, NOTEBOOK_NAME)
    storage.write_bytes(notebook, format_notebook(runs, left_out, folder).encode())
    return sorted([report, notebook]), left_out


def find_studies(storage_uri: str, runs: Sequence[StartedRun]) -> list[str]:
    """Return the URIs of the pages of studies below a storage.

    Args:
        storage_uri: where the runs are.
        runs: its runs, in whose folders there is none.
    """
    names = {run.folder.name for run in runs}
    pages = [
        storage.join(storage_uri, study, round_name, "study.html")
        for study in storage.find_folders(storage_uri)
        if study not in names
        for round_name in storage.find_folders(storage.join(storage_uri, study))
    ]
    return [uri for uri in pages if storage.exists(uri)]


def format_report(
    views: Sequence[RunView], folder: str, studies: Sequence[str] = (), left_out: Sequence[str] = ()
) -> str:
    """Format the page of all runs as HTML text.

    Args:
        views: of the runs of one storage.
        folder: URI of the folder that the page is for, from which its links lead.
        studies: URIs of the pages of studies.
        left_out: a line for each run that cannot be read.
    """
    ranked = sorted(views, key=_rank)
    datasets = _name_datasets(ranked)
    cards = {uri: storage.join(uri, "README.md") for uri in {view.record.config.dataset for view in ranked}}
    known = {uri: link(folder, card) for uri, card in cards.items() if storage.is_local(card) and storage.exists(card)}
    rows = [
        Row(
            name=view.name,
            href=link(folder, storage.join(folder, PAGES_FOLDER, f"{view.name}.html")),
            record=view.record,
            result=view.result,
            dataset=datasets[view.record.config.dataset, view.record.config.dataset_fingerprint],
            dataset_href=known.get(view.record.config.dataset, ""),
            symptoms=_describe_symptoms(view),
        )
        for view in ranked
    ]
    links = [StudyLink("/".join(storage.parent(uri).split("/")[-2:]), link(folder, uri)) for uri in studies]
    return render_page(
        "report.html.jinja",
        runs=rows,
        studies=links,
        left_out=left_out,
        data=to_script_json(_describe_runs(ranked)),
    )


def _rank(view: RunView) -> tuple[float, float, float]:
    """Return the sort key of a run: the highest accuracy first, those without a result last."""
    val = view.result.val if view.result else None
    return (-val.accuracy, val.loss, 0.0) if val else (1.0, 0.0, -view.record.started.timestamp())


def _name_datasets(views: Sequence[RunView]) -> dict[tuple[str, str], str]:
    """Return a name for each dataset, by URI and fingerprint: with the latter where one name has several."""
    found = {(view.record.config.dataset, view.record.config.dataset_fingerprint): view.dataset for view in views}
    fingerprints = {(name, fingerprint) for (_, fingerprint), name in found.items()}
    count = Counter(name for name, _ in fingerprints)
    return {key: name if count[name] == 1 else f"{name} {key[1][:6]}" for key, name in found.items()}


def _describe_symptoms(view: RunView) -> str:
    """Return the first words of each finding of a run, or how it ended without a result."""
    if view.result is None:
        return view.status
    words = [re.split(r"[:;,(]", finding)[0].strip() for finding in view.result.findings]
    return ", ".join(one if len(one) <= _LONGEST_SYMPTOM else f"{one[:_LONGEST_SYMPTOM]}…" for one in words)


def _describe_runs(views: Sequence[RunView]) -> dict[str, Any]:
    """Return what the script of the page shows: curves, options, and which predictions are correct."""
    configs = [
        {name: describe_value(name, value) for name, value in view.record.config.model_dump().items()} for view in views
    ]
    shared = {name: value for name, value in configs[0].items() if all(one.get(name) == value for one in configs)}
    runs, room = [], _MOST_CORRECT_BYTES
    for number, (view, config) in enumerate(zip(views, configs, strict=True)):
        described = {
            "number": number,
            "name": view.name,
            "config": {name: value for name, value in config.items() if name not in shared},
            "images_of": view.record.config.dataset_fingerprint,
            **_describe_curves(view),
        }
        if view.result and (correct := _pack_correct(view.folder)):
            images, packed = correct
            room -= len(packed)
            if room >= 0:
                described |= {"images": images, "correct": packed}
        runs.append(described)
    return {"config": shared, "runs": runs}


def _describe_curves(view: RunView) -> Mapping[str, Any]:
    try:
        history = view.folder.read_metrics()
    except InputError:
        history = []
    history = find_curve(history, view.result.best_epoch if view.result else None)
    curves = {
        name: thin_out([row.get(name, np.nan) for row in history], _MOST_POINTS)
        for name in ("val_loss", "val_accuracy")
    }
    epochs = thin_out([row["epoch"] for row in history], _MOST_POINTS)
    best = view.result.best_epoch if view.result and view.result.best_epoch in epochs else None
    return {
        "epochs": epochs,
        "best": best,
        "spike": has_spike(row.get("val_loss", np.nan) for row in history),
        **curves,
    }


def _pack_correct(run: RunFolder) -> tuple[int, str] | None:
    """Return the number of validation images and, a bit for each, whether it is predicted correctly, in base64."""
    try:
        predictions = run.read_predictions()
    except InputError:
        return None
    if predictions is None:
        return None
    correct = np.asarray(predictions["label"]) == np.asarray(predictions["predicted"])
    return len(correct), base64.b64encode(np.packbits(correct).tobytes()).decode()
