"""The input of a worker: the rows of a split of a prepared dataset, in an order fixed by the seed.

Any image can be read at any time, so the order of an epoch is a function of the dataset, the seed and the epoch alone,
the same for any number of workers, and a run can resume at any step.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.manifest import MANIFEST_NAME, SPLITS, Manifest, SplitName, binary_array, read_index, read_manifest
from trainer.runtime import storage
from trainer.runtime.ahead import call_ahead
from trainer.runtime.errors import InputError
from trainer.training.shards import HeldImages, Pixels, open_pixels

S = TypeVar("S")
T = TypeVar("T")

_BATCHES_IN_FLIGHT = 2
# TensorFlow begins to copy to a GPU when the steps that are there by then have ended. So that the device computes one
# step while the batch of the next one is copied, that copy must have been asked for before: by another thread, since
# the one that asked for the batch before waits for it.
_MOVES = 2
# NumPy compares such values as bytes; it takes trailing zeros off only those that it returns one by one.
_DIGEST = np.dtype("S32")
# ``[256]``, the two hexadecimal digits of each byte.
_IN_HEXADECIMAL = np.array([f"{byte:02x}" for byte in range(256)], "S2")
# Folders that are searched for a prepared dataset when the given one is not prepared.
_MOST_FOLDERS_LOOKED_INTO = 20


@dataclass(frozen=True)
class ImageSplit:
    """All rows of one split, in the order of the index."""

    labels: npt.NDArray[np.int32]
    """``[rows]``."""
    shards: npt.NDArray[np.int32]
    """``[rows]``, the shard of each image."""
    rows: npt.NDArray[np.int32]
    """``[rows]``, the row of each image in its shard."""
    pixels: Pixels

    @classmethod
    def hold(cls, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32]) -> "ImageSplit":
        """Return a split of images in memory."""
        rows = np.arange(len(labels), dtype=np.int32)
        return cls(labels, np.zeros_like(rows), rows, HeldImages(images))

    def __len__(self) -> int:
        return len(self.labels)

    def expect(self, rows: npt.NDArray[np.int64], following: npt.NDArray[np.int64] | None = None) -> None:
        """Say which rows will be taken next, in this order, so that they can be fetched ahead of their use.

        Args:
            rows: row numbers.
            following: those after them, which another call will name: to be fetched when there is room.
        """
        self.pixels.expect(self.shards[rows], self.shards[rows[:0] if following is None else following])

    def take(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Return the images of some rows, uint8 ``[rows, height, width, channels]``, in ``out`` if it is given."""
        if out is None:
            out = np.empty((len(rows), *self.pixels.image_shape), np.uint8)
        self.pixels.take(self.shards[rows], self.rows[rows], out)
        return out


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


def open_split(
    dataset: str, manifest: Manifest, split: SplitName, cache_gib: float = 0.0, window_gib: float = 0.0
) -> ImageSplit:
    """Return the rows of a split, whose images are read where they lie.

    Args:
        dataset: URI of the dataset.
        manifest: its manifest.
        split: which split.
        cache_gib: see `trainer.training.shards.open_pixels`.
        window_gib: likewise.

    Raises:
        InputError: a file of the dataset is missing or differs from what the manifest says.
    """
    index = read_index(dataset, manifest, ["shard", "row", "split", "label"])
    of_split = index.filter(pc.field("split") == split)
    columns = {name: of_split[name].to_numpy() for name in ("shard", "row", "label")}
    pixels = open_pixels(dataset, manifest, cache_gib, window_gib)
    return ImageSplit(columns["label"], columns["shard"], columns["row"], pixels)


@dataclass(frozen=True)
class KnownFiles:
    """The split of each source file of a dataset by its SHA-256, in arrays: a dictionary would take gigabytes."""

    digests: npt.NDArray[np.bytes_]
    """``[files]``, sorted."""
    splits: npt.NDArray[np.int8]
    """``[files]``, indices into SPLITS; of equal files the lowest is first."""

    @classmethod
    def none(cls) -> "KnownFiles":
        """Return those of no dataset."""
        return cls(np.empty(0, _DIGEST), np.empty(0, np.int8))

    def find(self, digests: Sequence[bytes]) -> pa.Array:
        """Return the split of each file, a string array: null for one that is not known, train where in several."""
        wanted = np.array(digests, _DIGEST)
        places = np.searchsorted(self.digests, wanted)
        is_known = places < len(self.digests)
        is_known[is_known] = self.digests[places[is_known]] == wanted[is_known]
        numbers = np.zeros(len(wanted), np.int8)
        numbers[is_known] = self.splits[places[is_known]]
        return pa.array(SPLITS, pa.string()).take(pa.array(numbers, mask=~is_known))


def read_known_files(dataset: str, manifest: Manifest) -> KnownFiles:
    """Return the split of each source file of a dataset.

    Raises:
        InputError: the index is missing or differs from what the manifest says.
    """
    index = read_index(dataset, manifest, ["sha256", "split"])
    digests = binary_array(index["sha256"]).view(_DIGEST).ravel()
    splits = pc.index_in(index["split"], pa.array(SPLITS, pa.string())).to_numpy().astype(np.int8)
    order = np.lexsort((splits, digests))
    return KnownFiles(digests[order], splits[order])


def read_sources(dataset: str, manifest: Manifest, split: SplitName) -> pa.Table:
    """Return path and sha256, in hexadecimal, of the file of each image of a split, in the order of `open_split`.

    Raises:
        InputError: the index is missing or differs from what the manifest says.
    """
    index = read_index(dataset, manifest, ["path", "sha256", "split"])
    of_split = index.filter(pc.field("split") == split)
    digests = _IN_HEXADECIMAL[binary_array(of_split["sha256"])].ravel()
    texts = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * _DIGEST.itemsize), len(of_split), [None, pa.py_buffer(digests)]
    )
    return pa.table({"path": of_split["path"], "sha256": texts.cast(pa.string())})


def epoch_order(split: ImageSplit, seed: int, epoch: int, window_gib: float = 64.0) -> npt.NDArray[np.int64]:
    """Return the row numbers of an epoch in training order: a different permutation for each seed and epoch.

    If the dataset is larger than the window, shards are permuted, and rows within windows of shards: those of a window
    come before those of the next.

    Args:
        split: the split to order.
        seed: seed of the run.
        epoch: number of the epoch.
        window_gib: size of the files that rows are permuted within.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(split))
    sizes, window = split.pixels.shard_bytes, window_gib * 2**30
    if sizes.sum() <= window:
        return order
    shards = random.permutation(len(sizes))
    window_of, number, held = np.empty(len(sizes), np.int64), 0, 0
    for shard, size in zip(shards.tolist(), sizes[shards].tolist(), strict=True):
        # Never more than the window: a cache of two has room for one that is in use and for the next one.
        if held and held + size > window:
            number, held = number + 1, 0
        window_of[shard], held = number, held + size
    return order[np.argsort(window_of[split.shards[order]], kind="stable")]


def worker_rows(
    order: npt.NDArray[np.int64], step: int, global_batch_size: int, rank: int, num_workers: int
) -> npt.NDArray[np.int64]:
    """Return the rows of one worker's share of one step's global batch: its slice of the order."""
    share = global_batch_size // num_workers
    start = step * global_batch_size + rank * share
    return order[start : start + share]


def all_worker_rows(
    order: npt.NDArray[np.int64], num_steps: int, global_batch_size: int, rank: int, num_workers: int
) -> npt.NDArray[np.int64]:
    """Return the rows of one worker's shares of the first steps, ``[steps, rows]``; there may be no steps."""
    share = global_batch_size // num_workers
    return order[: num_steps * global_batch_size].reshape(num_steps, num_workers, share)[:, rank]


class BatchFeed:
    """Make batches ahead of time in a thread, move them to the device in others, and count how long none was made.

    Args:
        move: moves a batch to where it is used (`trainer.training.batches.move_batch`).
    """

    def __init__(self, move: Callable[[Any], Any] = lambda batch: batch) -> None:
        self._move = move
        self.wait_seconds = 0.0
        """The seconds for which the consumer waited for a batch to be made; a copy waits for the device itself."""

    def batches(self, make_batch: Callable[[S], T], steps: Iterable[S]) -> Iterator[T]:
        """Yield ``make_batch(step)``, moved, for each step, or group of steps, in turn."""

        def make(step: S) -> tuple[T, float]:
            return make_batch(step), time.perf_counter()

        def move(made: Future[tuple[T, float]]) -> tuple[T, float]:
            batch, made_at = made.result()
            return self._move(batch), made_at

        # One thread, since images are taken in turn.
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as maker:
            being_made = (maker.submit(make, step) for step in steps)
            for moved in call_ahead(move, being_made, ahead=_BATCHES_IN_FLIGHT + 1, threads=_MOVES, name="moves"):
                started = time.perf_counter()
                batch, made_at = moved.result()
                self.wait_seconds += max(0.0, made_at - started)
                yield batch
