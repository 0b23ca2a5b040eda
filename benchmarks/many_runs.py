"""What many runs of one storage cost: its report, and the note of a run that ends among them.

Each run has 60 epochs and 750 validation images of ten classes, and a seed of its own. Each number of runs has a
process of its own. Marks: the page of all runs stays below 5 MB, and a run costs what it costs among a tenth as many.

Run: python -m benchmarks many_runs [--runs 100 --runs 1000] [--json]
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from rich.table import Table

from benchmarks.classes import make_config, make_manifest
from benchmarks.table import Mark, report

_CLASSES, _IMAGES, _EPOCHS = 10, 750, 60


@dataclass(frozen=True)
class Outcome:
    """The measurement of one number of runs."""

    report_seconds: float
    """CPU seconds of the report, the notebook and the pages of the runs."""
    page_mb: float
    notebook_mb: float
    note_seconds: float
    """CPU seconds of what the end of one run reads of the others, and of its note."""


def write_runs(folder: str, count: int) -> None:
    """Write finished runs that differ in their seed and in what they predict."""
    from trainer.record.evaluation_result import summarise
    from trainer.record.last_run import replace_last_run
    from trainer.record.predictions import PREDICTIONS_NAME, name_predictions
    from trainer.record.run_folder import LateEpochs, RunFolder, RunResult, describe_run
    from trainer.runtime import storage

    manifest, random = make_manifest(_CLASSES), np.random.default_rng(0)
    labels = np.arange(_IMAGES, dtype=np.int32) % _CLASSES
    paths = {"path": [f"{row:06d}.jpg" for row in range(_IMAGES)], "sha256": ["0" * 64] * _IMAGES}
    for number in range(count):
        run = RunFolder(f"{folder}/run-{number:04d}")
        run.write_manifest(manifest)
        config = make_config(manifest, seed=number)
        previous = replace_last_run(folder, config, run.name)
        run.write_record(describe_run(config, "this machine").model_copy(update={"previous": previous}))
        predicted = np.where(random.random(_IMAGES) < 0.8, labels, random.integers(0, _CLASSES, _IMAGES))
        columns = {"label": labels, "predicted": predicted, "likelier": np.int32(predicted != labels)}
        columns |= {"loss": random.random(_IMAGES), "confidence": random.random(_IMAGES)}
        predictions = pa.table(columns)
        named = name_predictions(predictions, pa.table(paths), manifest.class_names)
        run.write(storage.parquet_bytes(named), PREDICTIONS_NAME)
        losses = random.random((_EPOCHS, 4))
        names = ("loss", "val_loss", "accuracy", "val_accuracy")
        run.write_metrics(
            [{"epoch": 1.0 + epoch, **dict(zip(names, row, strict=True))} for epoch, row in enumerate(losses.tolist())]
        )
        run.write_ending(
            RunResult(
                status="completed",
                parameters=1_000_000,
                best_epoch=_EPOCHS // 2,
                best_checkpoint="step-00000070",
                val=summarise("val", predictions, manifest.class_names),
                late=LateEpochs(epochs=3, loss=0.9, accuracy=0.75, accuracy_interval=(0.63, 0.84)),
                comparison="",
                epochs=_EPOCHS,
                steps=700,
                attempts=1,
                incidents=(),
                layers="",
                findings=["overfitting: val_loss rises"],
                weights_crc32=(0,),
                train_seconds=60.0,
            )
        )


def measure(count: int) -> Outcome:
    """Write runs, their report, and the note of the last of them."""
    from trainer.notes.note import find_compared, write_note
    from trainer.notes.report import REPORT_NAME, write_notes_and_report
    from trainer.record.run_folder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        write_runs(folder, count)
        started = time.process_time()
        written, _ = write_notes_and_report(folder)
        noted = time.process_time()
        last = RunFolder(f"{folder}/run-{count - 1:04d}")
        write_note(last, find_compared(last), last.read_result())
        ended = time.process_time()
        sizes = {Path(path).name: Path(path).stat().st_size / 1e6 for path in written}
    notebook = next(size for name, size in sizes.items() if name != REPORT_NAME)
    return Outcome(noted - started, sizes[REPORT_NAME], notebook, ended - noted)


def main(
    runs: Annotated[list[int], typer.Option(min=1)] = [100, 1000],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    outcomes: dict[int, Outcome] = {}
    for count in runs:
        with ProcessPoolExecutor(1, spawn) as process:
            outcomes[count] = process.submit(measure, count).result()
    table = Table("runs", "report, CPU ms a run", "page, MB", "notebook, MB", "note of one run, CPU s")
    per_run = {count: 1000 * one.report_seconds / count for count, one in outcomes.items()}
    for count, one in outcomes.items():
        sizes = f"{one.page_mb:.2f}", f"{one.notebook_mb:.2f}"
        table.add_row(f"{count:,}", f"{per_run[count]:.1f}", *sizes, f"{one.note_seconds:.2f}")
    least, most = min(outcomes), max(outcomes)
    marks = [
        Mark(f"MB of the page of {most:,} runs", outcomes[most].page_mb, 5, at_least=False),
        Mark(f"CPU of a run, {most:,} to {least:,} runs", per_run[most] / per_run[least], 1.2, at_least=False),
    ]
    report(table, {str(count): asdict(one) for count, one in outcomes.items()}, marks, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
