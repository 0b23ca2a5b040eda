"""What many classes cost at the end of a run, and in the notes of a storage: seconds, memory, and sizes of files.

The workers have ended, with five images of each class on the validation split, of which six in ten are right. Each
number of classes has a process of its own; memory is what the end adds to it at most. Mark: 10,000 classes add no more
than 1 GiB.

Run: python -m benchmarks classes [--classes 10 --classes 1000 --classes 10000] [--json]
"""

import multiprocessing
import struct
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

from benchmarks.table import Mark, report
from data_prep.manifest import SPLITS, Manifest, Split
from trainer.config.config import TrainConfig

_IMAGES_PER_CLASS = 5


@dataclass(frozen=True)
class Outcome:
    """The measurement of one number of classes."""

    end_seconds: float
    end_gib: float
    notes_seconds: float
    largest_side: int
    """Size of a picture in pixels."""
    plots_kib: float
    result_kib: float
    note_kib: float
    report_kib: float
    manifest_kib: float


def read_gib(field: str) -> float:
    """Return memory of this process: VmRSS, or VmHWM for the most that it has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def make_manifest(num_classes: int) -> Manifest:
    """Return the manifest of a dataset whose files nobody reads."""
    split = Split(rows_per_class=[_IMAGES_PER_CLASS] * num_classes)
    names = [f"class with a rather long name {label:05d}" for label in range(num_classes)]
    return Manifest(
        image_size=32,
        channels=1,
        class_names=names,
        splits=dict.fromkeys(SPLITS, split),
        shards=[],
        tables={},
        rejected={},
        duplicates="near",
        duplicate_images=0,
        leaked_images=0,
        pixel_mean=[128.0],
        pixel_std=[64.0],
        source="/photos",
        fingerprint="0" * 64,
        **{"resize": "fit", "background": 255, "seed": 0, "val_fraction": 0.15, "test_fraction": 0.15},
        **{"value_range": None, "value_range_given": False, "value_counts": None},
    )


def make_config(manifest: Manifest, seed: int = 0) -> TrainConfig:
    """Return the config of a run on such a dataset."""
    return TrainConfig(
        arch="cnn_softmax",
        dataset="/dataset",
        dataset_fingerprint=manifest.fingerprint,
        num_workers=1,
        global_batch_size=64,
        base_learning_rate=0.1,
        seed=seed,
    )


def measure(num_classes: int) -> Outcome:
    """End one run and write the notes of its storage."""
    from trainer import launch
    from trainer.notes.report import write_notes_and_report
    from trainer.record import checkpoint as checkpoints
    from trainer.record.run_folder import RunFolder, describe_run
    from trainer.runtime import storage
    from trainer.runtime.events import ignore_event
    from trainer.training.job import WorkerJob, WorkerResult

    manifest, random = make_manifest(num_classes), np.random.default_rng(0)
    labels = np.arange(num_classes, dtype=np.int32).repeat(_IMAGES_PER_CLASS)
    is_right = random.random(len(labels)) < 0.6
    predicted = np.where(is_right, labels, random.integers(0, num_classes, len(labels))).astype(np.int32)
    columns = {"label": labels, "predicted": predicted, "likelier": np.int32(predicted != labels)}
    columns |= {"loss": np.ones(len(labels), np.float32), "confidence": np.full(len(labels), 0.6, np.float32)}
    row = {"loss": 1.0, "accuracy": 0.6, "val_loss": 1.0, "val_accuracy": 0.6, "learning_rate": 0.1}
    row |= {"images_per_second": 100.0, "epoch_seconds": 1.0}
    history = [{"epoch": epoch, "step": 10 * epoch, **row} for epoch in range(1, 11)]
    steps = {"step": range(1, 101), "grad_norm": np.linspace(0.1, 2, 100)}
    config = make_config(manifest)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(f"{folder}/run")
        run.write_manifest(manifest)
        run.write_record(describe_run(config, "this machine"))
        files = {checkpoints.PREDICTIONS_NAME: columns, checkpoints.STEPS_NAME: steps}
        position = checkpoints.Position(epoch=10, epoch_rows=0, step=100, global_batch_size=64, history=history)
        contents = {name: storage.parquet_bytes(pa.table(table)) for name, table in files.items()}
        checkpoints.save_checkpoint(run.checkpoints, position, contents)
        job = WorkerJob(config, manifest, run.uri, None, (), 0, None, ignore_event)
        launch._load_ending()
        before = read_gib("VmRSS")
        # The peak is counted again.
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        mistakes = np.zeros((16, manifest.image_size, manifest.image_size, manifest.channels), np.uint8)
        launch._close_run(
            job, WorkerResult("", 1, 1_000_000, "", (0,), mistakes), remember=False, on_event=ignore_event
        )
        ended = time.perf_counter()
        added = read_gib("VmHWM") - before
        write_notes_and_report(folder, folder)
        noted = time.perf_counter()
        kib = {path.name: path.stat().st_size / 1024 for path in Path(folder).rglob("*") if path.is_file()}
        pictures = [path.read_bytes() for path in Path(folder, "run", "plots").glob("*.png")]
    return Outcome(
        end_seconds=ended - started,
        end_gib=added,
        notes_seconds=noted - ended,
        # The header of PNG has width and height there.
        largest_side=max(max(struct.unpack(">II", content[16:24])) for content in pictures),
        plots_kib=sum(len(content) for content in pictures) / 1024,
        result_kib=kib["result.json"],
        note_kib=kib["note.md"],
        report_kib=kib["report.html"],
        manifest_kib=kib["dataset.json"],
    )


def main(
    classes: Annotated[list[int], typer.Option()] = [10, 1000, 10_000],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    outcomes: dict[int, Outcome] = {}
    for count in classes:
        with ProcessPoolExecutor(1, spawn) as process:
            outcomes[count] = process.submit(measure, count).result()
    table = Table("classes", "end, s", "GiB more", "notes, s", "largest picture", "KiB: pictures", "result.json")
    for column in ("note.md", "report.html", "dataset.json"):
        table.add_column(column)
    for count, one in outcomes.items():
        sizes = (one.plots_kib, one.result_kib, one.note_kib, one.report_kib, one.manifest_kib)
        table.add_row(
            *(f"{count:,}", f"{one.end_seconds:.1f}", f"{one.end_gib:.2f}", f"{one.notes_seconds:.1f}"),
            *(f"{one.largest_side} pixels", *(f"{size:,.0f}" for size in sizes)),
        )
    most = max(outcomes)
    mark = Mark(f"GiB that the end adds, {most:,} classes", outcomes[most].end_gib, 1, at_least=False)
    records = {str(count): asdict(one) for count, one in outcomes.items()}
    report(table, records, [mark], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
