"""A node's copies of shards from a bucket: whole files by checksum, shared by its workers and by datasets."""

import contextlib
import hashlib
import os
import shutil
import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from data_prep.manifest import Shard, check_digest, image_arrays
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.folders import cache_folder

# Requests of this size hide the latency of a store, and bound the memory of a download.
_PART_BYTES = 16 * 2**20
# A download is done by one process of a node.
_LOCKS = 64
# A download that has written nothing for this long is of a killed process.
_ABANDONED_SECONDS = 3600


class ShardCache:
    """Shards on this node's disk, up to a size; the ones that were opened longest ago are deleted first."""

    def __init__(self, limit_gib: float = 0.0) -> None:
        """Open the cache of this node.

        Args:
            limit_gib: most that the shards may take; 0 for half of the disk space that is free or theirs.
        """
        self._folder = cache_folder() / "shards"
        self._folder.mkdir(exist_ok=True)
        held = sum(entry.stat().st_size for entry in os.scandir(self._folder))
        free = shutil.disk_usage(self._folder).free
        self.limit = int(limit_gib * 2**30) or (free + held) // 2

    def open(self, uri: str, shard: Shard) -> list[npt.NDArray[np.uint8]]:
        """Return a map of a shard's images, as `image_arrays` does, after downloading it if this node does not have it.

        Raises:
            InputError: the shard is missing, or differs from what the manifest says.
            JobError: this machine's disk has no room for it, or the store is away.
        """
        path = self._folder / f"{shard.sha256}.arrow"
        while True:
            # Another process may delete it at any time; a map stays.
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return image_arrays(pa.memory_map(str(path)))
            with FileLock(self._folder / f"{int(shard.sha256[:8], 16) % _LOCKS}.lock"):
                if not path.exists():
                    self._download(uri, shard)

    def _download(self, uri: str, shard: Shard) -> None:
        digest = hashlib.sha256()
        try:
            with storage.create_whole(str(self._folder / f"{shard.sha256}.arrow"), sync=False) as file:
                # One at a time, and of its full size at once: the other downloads must see the room that it takes.
                with FileLock(self._folder / "room.lock"):
                    self._make_room(shard.bytes)
                    file.truncate(shard.bytes)
                for start in range(0, shard.bytes, _PART_BYTES):
                    part = storage.read_bytes(uri, start, _PART_BYTES)
                    digest.update(part)
                    file.write(part)
                check_digest(uri, digest.hexdigest(), shard.sha256)
        except FileNotFoundError as error:
            raise InputError(f"{error}, though the manifest names it; prepare the dataset again") from error

    def _make_room(self, needed: int) -> None:
        """Delete the files that were used longest ago, unfinished ones of killed processes too."""
        found, abandoned = [], time.time_ns() - _ABANDONED_SECONDS * 10**9
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry))
        total = sum(size for _, size, _ in found) + needed
        for used, size, entry in sorted(found, key=lambda one: one[0]):
            if total <= self.limit:
                return
            if entry.name.endswith(".arrow") or (entry.name.endswith(".partial") and used < abandoned):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
                total -= size
