"""The input of a worker: a prepared dataset as a memory map on its node, with its rows in an order fixed by the seed.

Each node keeps one uncompressed copy of a split on local disk, which all workers on the node map: the page cache holds
once, what fits in memory, and the disk holds the rest. Any row can be read at any time, so the order of an epoch is a
function of seed and epoch alone, the same for any number of workers, and a run can resume at any step.
"""

import hashlib
import io
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from data_prep.manifest import MANIFEST_NAME, SPLITS, DataFile, Manifest, SplitName, read_manifest
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.folders import cache_folder
from trainer.runtime.markdown import shorten_digest

T = TypeVar("T")

_BATCHES_IN_FLIGHT = 2
# Folders that are searched for a prepared dataset when the given one is not prepared.
_MOST_FOLDERS_LOOKED_INTO = 20


@dataclass(frozen=True)
class ImageSplit:
    """All rows of one split."""

    images: npt.NDArray[np.uint8]
    """``[rows, image_size, image_size, channels]``, a read-only memory map."""
    labels: npt.NDArray[np.int32]
    """``[rows]``."""

    def __len__(self) -> int:
        return len(self.labels)


def load_manifest(dataset: str) -> Manifest:
    """Return the manifest of a prepared dataset.

    Raises:
        InputError: there is none, or this program cannot read it; the message says what to do.
    """
    is_file = storage.is_local(dataset) and os.path.isfile(dataset)
    manifest = None if is_file else read_manifest(dataset)
    if manifest is None:
        raise InputError(
            f"{dataset} holds no prepared dataset: its {MANIFEST_NAME}, which is written last, is missing; "
            f"{'it is a file: ' + _prepare_command(dataset) if is_file else _propose_dataset(dataset)}"
        )
    return manifest


def _propose_dataset(dataset: str) -> str:
    """Return what to do about a folder that is not a prepared dataset."""
    folders = storage.find_folders(dataset)
    prepared = [storage.parent(dataset), *(storage.join(dataset, name) for name in folders[:_MOST_FOLDERS_LOOKED_INTO])]
    for place in filter(storage.parent, prepared):
        if storage.exists(storage.join(place, MANIFEST_NAME)):
            return f"give --dataset {place}, which holds one"
    if "_staging" in folders:
        return "its preparation was interrupted: run the same command of jobs/prepare.py again to continue it"
    if folders or storage.find_files(dataset):
        return f"if it holds images, {_prepare_command(dataset)}"
    return f"the folder is empty or does not exist: run: python jobs/prepare.py SOURCE {shlex.quote(dataset)}"


def _prepare_command(source: str) -> str:
    target = f"{os.path.splitext(source)[0]}-prepared"
    return f"run: python jobs/prepare.py {shlex.join([source, target])} and give --dataset {shlex.quote(target)}"


def open_split(dataset: str, manifest: Manifest, split: SplitName) -> ImageSplit:
    """Return all rows of a split, its images as a memory map, filling this node's cache first if needed.

    Raises:
        InputError: a file of the dataset is missing or differs from what the manifest says.
        JobError: this machine's disk has no room for it.
    """
    folder = cache_folder() / "splits" / manifest.fingerprint
    images_path, labels_path = folder / f"{split}.images.npy", folder / f"{split}.labels.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{split}.lock"):
        if not labels_path.exists():
            _fill_cache(dataset, manifest, split, images_path, labels_path)
    return ImageSplit(np.load(images_path, mmap_mode="r"), np.load(labels_path))


def read_hashes(dataset: str, manifest: Manifest) -> dict[str, SplitName]:
    """Return the split of each image of a dataset by the SHA-256 of its source file; train where it is in several.

    Raises:
        InputError: a file of the dataset is missing or cannot be read.
    """
    splits: dict[str, SplitName] = {}
    for split in reversed(SPLITS):
        hashes = read_sources(dataset, manifest, split)["sha256"].to_pylist()
        splits.update((one, split) for one in hashes if one)
    return splits


def read_sources(dataset: str, manifest: Manifest, split: SplitName) -> pa.Table:
    """Return path and sha256 of the source file of each image of a split, in the order of `open_split`.

    Raises:
        InputError: a file of the dataset is missing or cannot be read.
    """
    tables = [pa.table({name: pa.array([], pa.string()) for name in ("path", "sha256")})]
    for data_file in manifest.splits[split].files:
        uri = storage.join(dataset, data_file.path)
        try:
            with storage.open_file(uri) as file:
                tables.append(pq.read_table(file, columns=["path", "sha256"]).replace_schema_metadata(None))
        except (FileNotFoundError, pa.ArrowException) as error:
            raise InputError(f"{uri} cannot be read: {error}") from error
    return pa.concat_tables(tables)


def _fill_cache(dataset: str, manifest: Manifest, split: SplitName, images_path: Path, labels_path: Path) -> None:
    rows = manifest.splits[split].rows
    shape = (rows, manifest.image_size, manifest.image_size, manifest.channels)
    partial = images_path.with_suffix(".partial")
    labels = np.empty(rows, np.int32)
    try:
        with storage.clear_errors(str(partial)):
            images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            with partial.open("r+b") as file:
                # Allocate all of it now: a process that writes to a map without room on the disk is killed (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, images.offset + images.nbytes)
        start = 0
        for data_file in manifest.splits[split].files:
            content = io.BytesIO(_read_data_file(dataset, data_file))
            table = pq.read_table(content, columns=["image", "label"])
            end = start + data_file.rows
            images[start:end] = table["image"].combine_chunks().to_numpy_ndarray()
            labels[start:end] = table["label"].to_numpy()
            start = end
        images.flush()
        partial.rename(images_path)
    finally:
        partial.unlink(missing_ok=True)
    # Written last, atomically: its presence means that the cache is filled.
    sink = io.BytesIO()
    np.save(sink, labels)
    storage.write_bytes(str(labels_path), sink.getvalue())


def _read_data_file(dataset: str, file: DataFile) -> bytes:
    uri = storage.join(dataset, file.path)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise InputError(f"{error}, though the manifest names it; prepare {dataset} again with --overwrite") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise InputError(
            f"{uri} has sha256 {shorten_digest(digest)}, the manifest says {shorten_digest(file.sha256)}; the dataset "
            "is damaged or was changed: prepare it again with --overwrite"
        )
    return content


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the row numbers of an epoch in training order: a different permutation for each seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def worker_rows(
    order: npt.NDArray[np.int64], step: int, global_batch_size: int, rank: int, num_workers: int
) -> npt.NDArray[np.int64]:
    """Return the rows of one worker's share of one step's global batch: its slice of the order."""
    share = global_batch_size // num_workers
    start = step * global_batch_size + rank * share
    return order[start : start + share]


class BatchFeed:
    """Make batches ahead of time in a thread, and count the seconds that their consumer waited."""

    def __init__(self) -> None:
        self.wait_seconds = 0.0

    def batches(self, make_batch: Callable[[int], T], steps: range) -> Iterator[T]:
        """Yield ``make_batch(step)`` for each step in turn."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as maker:
            pending = deque(maker.submit(make_batch, step) for step in steps[:_BATCHES_IN_FLIGHT])
            for upcoming in range(len(steps)):
                started = time.perf_counter()
                batch = pending.popleft().result()
                self.wait_seconds += time.perf_counter() - started
                if upcoming + _BATCHES_IN_FLIGHT < len(steps):
                    pending.append(maker.submit(make_batch, steps[upcoming + _BATCHES_IN_FLIGHT]))
                yield batch
