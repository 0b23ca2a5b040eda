"""The pixels of a dataset where they lie: shards that are mapped, in a local folder or in the cache of this node."""

import hashlib
import json
import math
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock, Timeout

from data_prep.manifest import Manifest, Shard, check_digest, image_arrays, rows_per_batch
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.folders import cache_folder
from trainer.training.shard_cache import ShardCache

Images = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int32]

# A store is read by several requests at once, which also fill gaps of a slow one.
_DOWNLOADS = 4
_READ_BYTES = 4 * 2**20


class Pixels(Protocol):
    """What an `ImageSplit` reads images from."""

    image_shape: tuple[int, int, int]
    """Height, width and channels."""
    shard_bytes: npt.NDArray[np.int64]
    """``[shards]``, the size of each file."""

    def expect(self, shards: Numbers, following: Numbers) -> None:
        """Say from which shards the next images will be taken, in this order, and from which those after them."""

    def take(self, shards: Numbers, rows: Numbers, out: Images) -> None:
        """Copy images, given by their shard and their row in it, to ``out``."""

    def finish_check(self) -> None:
        """Wait until the files have been compared with their checksums.

        Raises:
            InputError: one of them is damaged.
        """


def open_pixels(dataset: str, manifest: Manifest, cache_gib: float = 0.0, window_gib: float = 0.0) -> Pixels:
    """Return the pixels of a dataset.

    Args:
        dataset: URI of the dataset.
        manifest: its manifest.
        cache_gib: size limit of this node's cache of shards from buckets, see `ShardCache`.
        window_gib: size of the files that will be in use at once, see `epoch_order`; 0 if images are taken in order.

    Raises:
        InputError: a shard is missing, or not of the size that the manifest says, or the cache is too small.
    """
    if storage.is_local(dataset):
        return MappedShards(dataset, manifest.shards, manifest.image_shape)
    pixels = CachedShards(dataset, manifest.shards, manifest.image_shape, ShardCache(cache_gib))
    pixels.check_window(int(window_gib * 2**30))
    return pixels


class HeldImages:
    """Images in memory, as if of one shard: of tests and benchmarks."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.image_shape = images.shape[1:]
        self.shard_bytes = np.array([images.nbytes])

    def expect(self, shards: Numbers, following: Numbers) -> None:
        """Do nothing."""

    def take(self, shards: Numbers, rows: Numbers, out: Images) -> None:
        """Copy images to ``out``."""
        # All rows exist. To check that first, NumPy would gather into a temporary array.
        np.take(self._images, rows, axis=0, out=out, mode="clip")

    def finish_check(self) -> None:
        """Do nothing."""


class MappedShards:
    """The shards of a local dataset, mapped in place when they are first used.

    They are compared with their checksums in a thread, by one process of a node and once, unless they were changed.
    """

    def __init__(self, dataset: str, shards: list[Shard], image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape
        self.shard_bytes = np.array([shard.bytes for shard in shards], np.int64)
        self._paths = [Path(dataset, shard.path) for shard in shards]
        self._batch = rows_per_batch(math.prod(image_shape))
        self._maps: list[list[Images] | None] = [None] * len(self._paths)
        self._damage: InputError | None = None
        states = [_find_state(path, shard) for path, shard in zip(self._paths, shards, strict=True)]
        self._mark = cache_folder() / "checked" / hashlib.sha256(json.dumps(states).encode()).hexdigest()
        self._checker = threading.Thread(target=self._check, args=(shards,), daemon=True)
        self._checker.start()

    def expect(self, shards: Numbers, following: Numbers) -> None:
        """Do nothing: the system reads ahead, and keeps what fits into memory."""

    def take(self, shards: Numbers, rows: Numbers, out: Images) -> None:
        """Copy images to ``out``."""
        if self._damage is not None:
            raise self._damage
        for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            images = self._maps[shard] or self._map(shard)
            out[place] = images[row // self._batch][row % self._batch]

    def finish_check(self) -> None:
        """Wait until the files have been compared with their checksums."""
        self._checker.join()
        if self._damage is not None:
            raise self._damage

    def _map(self, shard: int) -> list[Images]:
        images = image_arrays(pa.memory_map(str(self._paths[shard])))
        self._maps[shard] = images
        return images

    def _check(self, shards: list[Shard]) -> None:
        self._mark.parent.mkdir(exist_ok=True)
        try:
            with FileLock(f"{self._mark}.lock", blocking=False):
                if self._mark.exists():
                    return
                for path, shard in zip(self._paths, shards, strict=True):
                    check_digest(str(path), _hash_file(path), shard.sha256)
                self._mark.touch()
        except Timeout:
            """Another process of this node is at it."""
        except InputError as error:
            self._damage = error
        except OSError as error:
            self._damage = InputError(f"{path}: {error.strerror or error}; give a dataset that can be read")


class CachedShards:
    """The shards of a dataset in a bucket, downloaded to the cache of this node ahead of their use.

    One thread takes images at a time. What is on its way or in use never exceeds the limit of the cache, unless one
    batch needs more.
    """

    def __init__(self, dataset: str, shards: list[Shard], image_shape: tuple[int, int, int], cache: ShardCache) -> None:
        self.image_shape = image_shape
        self.shard_bytes = np.array([shard.bytes for shard in shards], np.int64)
        self._dataset, self._shards, self._cache = dataset, shards, cache
        self._batch = rows_per_batch(math.prod(image_shape))
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="shards")
        self._opened: dict[int, Future[list[Images]]] = {}
        self._upcoming, self._following = deque[int](), deque[int]()
        self._left = np.zeros(len(shards), np.int64)

    def expect(self, shards: Numbers, following: Numbers) -> None:
        """Begin to download the shards in the order in which they are needed, and then those that follow."""
        self._left = np.bincount(shards, minlength=len(self._shards))
        self._upcoming, self._following = _in_order_of_use(shards), _in_order_of_use(following)
        for shard in [one for one in self._opened if not self._left[one]]:
            self._close(shard)
        self._fill()

    def take(self, shards: Numbers, rows: Numbers, out: Images) -> None:
        """Copy images to ``out``, when their shards are there."""
        for shard in dict.fromkeys(shards.tolist()):
            self._open(shard)
        for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            images = self._opened[shard].result()
            out[place] = images[row // self._batch][row % self._batch]
        used, counts = np.unique(shards, return_counts=True)
        self._left[used] -= counts
        for shard in used[self._left[used] <= 0].tolist():
            self._close(shard)
        self._fill()

    def finish_check(self) -> None:
        """Do nothing: each shard is compared with its checksum when it is downloaded."""

    def check_window(self, window_bytes: int) -> None:
        """Raise InputError if the cache holds neither the dataset nor two windows of it."""
        total, gib = int(self.shard_bytes.sum()), 2**30
        needed = min(total, 2 * window_bytes)
        if self._cache.limit < needed:
            raise InputError(
                f"the cache of this node may take {self._cache.limit / gib:.2f} GiB, and {self._dataset} has "
                f"{total / gib:.2f} GiB: give --cache-gib {math.ceil(total * 100 / gib) / 100:g}, or "
                f"--shuffle-window-gib {self._cache.limit // 2 * 1000 // gib / 1000:g} to shuffle within smaller parts"
            )

    def _fill(self) -> None:
        in_use = sum(self._shards[one].bytes for one in self._opened)
        while queue := self._upcoming or self._following:
            shard, is_open = queue[0], queue[0] in self._opened
            if self._upcoming and (is_open or not self._left[shard]):
                queue.popleft()
                continue
            # One of the following that is still in use is closed after that, and would then not be there.
            if is_open or in_use + self._shards[shard].bytes > self._cache.limit:
                return
            in_use += self._shards[shard].bytes
            self._open(queue.popleft())

    def _open(self, shard: int) -> None:
        if shard not in self._opened:
            uri = storage.join(self._dataset, self._shards[shard].path)
            self._opened[shard] = self._downloads.submit(self._cache.open, uri, self._shards[shard])

    def _close(self, shard: int) -> None:
        if opened := self._opened.pop(shard, None):
            # If its download has not begun, nobody needs it now.
            opened.cancel()


def _in_order_of_use(shards: Numbers) -> deque[int]:
    needed, first = np.unique(shards, return_index=True)
    return deque(needed[np.argsort(first)].tolist())


def _find_state(path: Path, shard: Shard) -> tuple[str, int, int]:
    """Return what tells whether a file was changed.

    Raises:
        InputError: it is missing, or not of the size that the manifest says.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found, though the manifest names it; prepare the dataset again") from error
    if found.st_size != shard.bytes:
        raise InputError(
            f"{path} has {found.st_size} bytes, the manifest says {shard.bytes}; the dataset is damaged or was "
            "changed: prepare it again with --overwrite"
        )
    return str(path), found.st_mtime_ns, shard.bytes


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
