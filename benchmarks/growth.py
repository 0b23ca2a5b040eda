"""What many images cost the driver of prepare and the opening of a dataset: CPU seconds and memory, no pixel decoded.

Steps: list (the files of a folder), draw (duplicates and splits), write (index, tables, card, manifest) and open (the
train split, as each worker does). The index is made here: 1,000 classes, 1% duplicates, images of one pixel. Each step
has a process of its own; memory is the most that it had, with the table that the step starts from. The names of more
than a million files come from a generator, not from a disk.

Run: python -m benchmarks growth [--rows 1000000] [--step draw] [--json]
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.table import Table

from benchmarks.classes import read_gib
from benchmarks.table import report
from data_prep.manifest import INDEX_SCHEMA

_CLASSES = 1000
_DUPLICATES = 0.01
_MOST_FILES = 1_000_000
_IMAGES_NAME, _DRAWN_NAME = "images.parquet", "drawn.npz"


class Step(StrEnum):
    """What is measured; draw, write and open each need the one before."""

    LIST = "list"
    DRAW = "draw"
    WRITE = "write"
    OPEN = "open"


@dataclass(frozen=True)
class Outcome:
    """The measurement of one step."""

    rows: int
    step: Step
    cpu_seconds: float
    gib: float


def write_source(folder: Path, rows: int) -> None:
    """Write a folder of class folders; the files of a class are links to its first one."""
    for label in range(_CLASSES):
        class_folder = folder / f"{label:04d}"
        class_folder.mkdir(parents=True)
        first = class_folder / "first.jpg"
        first.touch()
        for row in range(1, rows // _CLASSES):
            os.link(first, f"{class_folder}/{row:08d}.jpg")


def generate_files(rows: int) -> Iterator[tuple[str, int]]:
    """Yield path and bytes of each file of such a folder, as `storage.walk_files` does."""
    for row in range(rows):
        yield f"{row * _CLASSES // rows:04d}/{row:08d}.jpg", 0


def make_images(rows: int) -> pa.Table:
    """Return the index of images that have no split yet, in the order of their paths."""
    random = np.random.default_rng(0)
    labels = np.arange(rows, dtype=np.int64) * _CLASSES // rows
    # The original of each image: mostly itself.
    originals = np.arange(rows)
    copies = random.choice(rows, int(rows * _DUPLICATES), replace=False)
    originals[copies] = random.integers(0, rows, len(copies))

    def digests() -> pa.Array:
        content = random.integers(0, 256, (rows, 32), np.uint8)[originals]
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(content)])

    def one_channel(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), pa.array(values, pa.int64()))

    pixels = random.integers(0, 256, rows)
    columns = {
        "shard": np.zeros(rows, np.int32),
        "row": np.arange(rows, dtype=np.int32),
        "label": labels.astype(np.int32),
        "path": [f"{label:04d}/{row:08d}.jpg" for row, label in enumerate(labels.tolist())],
        "sha256": digests(),
        "pixels_sha256": digests(),
        "perceptual_hash": digests(),
        "given_split": pa.nulls(rows, pa.string()),
        "pixel_sums": one_channel(pixels),
        "pixel_squares": one_channel(pixels**2),
    }
    return pa.table(columns, schema=INDEX_SCHEMA.remove(INDEX_SCHEMA.get_field_index("split")))


def prepare_input(folder: Path, rows: int, steps: list[Step]) -> None:
    """Write what the steps start from."""
    if Step.LIST in steps and rows <= _MOST_FILES:
        write_source(folder / "source", rows)
    if {*steps} - {Step.LIST}:
        pq.write_table(make_images(rows), folder / _IMAGES_NAME)


def load_step(step: Step, folder: Path, rows: int) -> Callable[[], Any]:
    """Return a step without its arguments, which are in memory."""
    from data_prep.index import draw_splits, write_index
    from data_prep.prepare import PrepareConfig
    from data_prep.shards import write_shard
    from data_prep.sources import find_images
    from trainer.runtime import storage
    from trainer.runtime.lease import hold_lease
    from trainer.training.dataset import load_manifest, open_split

    dataset = str(folder / "dataset")
    if step is Step.LIST:
        if rows > _MOST_FILES:
            storage.walk_files = lambda uri: generate_files(rows)
        return lambda: find_images(str(folder / "source"))
    if step is Step.OPEN:
        manifest = load_manifest(dataset)
        return lambda: open_split(dataset, manifest, "train")
    images = pq.read_table(folder / _IMAGES_NAME)
    if step is Step.DRAW:
        return lambda: draw_splits(images, "near", 0.15, 0.15, seed=0)
    with write_shard(f"{dataset}/shards/00000-00000000.arrow", (1, 1, 1)) as shard:
        for _ in range(len(images)):
            shard.add(np.zeros((1, 1, 1), np.uint8))
    described = {
        **PrepareConfig().model_dump(exclude={"max_bad_fraction"}),
        "image_size": 1,
        "value_range_given": False,
        "class_names": [f"{label:04d}" for label in range(_CLASSES)],
        "shards": [shard.describe("shards/00000-00000000.arrow")],
        "value_counts": None,
        "source": str(folder / "source"),
    }
    with np.load(folder / _DRAWN_NAME) as drawn:
        splits, groups = drawn["splits"], drawn["groups"]
    rejected = pa.table({"path": pa.array([], pa.string()), "reason": pa.array([], pa.string())})

    def write() -> None:
        with hold_lease(f"{dataset}/_lease", "the dataset") as lease:
            write_index(dataset, images, splits, groups, rejected, described, lease)

    return write


def measure(step: Step, folder: Path, rows: int) -> Outcome:
    """Run one step."""
    run = load_step(step, folder, rows)
    # The peak is counted again.
    Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    result = run()
    outcome = Outcome(rows, step, time.process_time() - started, read_gib("VmHWM"))
    if step is Step.DRAW:
        splits, groups = result
        np.savez(folder / _DRAWN_NAME, splits=splits, groups=groups)
    return outcome


def main(
    rows: Annotated[list[int], typer.Option(min=10 * _CLASSES)] = [200_000, 1_000_000],  # noqa: B006
    step: Annotated[list[Step], typer.Option(help="Write needs draw, and open needs write.")] = list(Step),  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    outcomes = []
    for count in rows:
        with (
            tempfile.TemporaryDirectory() as name,
            ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as process,
        ):
            process.submit(prepare_input, Path(name), count, step).result()
            outcomes += [process.submit(measure, one, Path(name), count).result() for one in Step if one in step]
    table = Table("images", "step", "CPU seconds", "of a million", "GiB", "of a million")
    for one in outcomes:
        millions = one.rows / 1e6
        table.add_row(
            *(f"{one.rows:,}", str(one.step)),
            *(f"{one.cpu_seconds:.2f}", f"{one.cpu_seconds / millions:.2f}"),
            *(f"{one.gib:.2f}", f"{one.gib / millions:.2f}"),
        )
    report(table, [asdict(one) for one in outcomes], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
