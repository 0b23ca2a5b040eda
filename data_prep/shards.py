"""Write decoded images to a shard, batch by batch, with the checksum of the file."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.manifest import Shard, rows_per_batch
from trainer.runtime import storage


class ShardWriter:
    """One shard that is being written: it holds the images of one record batch."""

    def __init__(self, file: "_HashedFile", shape: tuple[int, int, int]) -> None:
        self._file = file
        self._type = pa.fixed_shape_tensor(pa.uint8(), shape)
        self._batch = np.empty((rows_per_batch(int(np.prod(shape))), *shape), np.uint8)
        self._filled = 0
        self.rows = 0
        self._writer = pa.ipc.new_file(file, pa.schema([("image", self._type)]))

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """Add one image, uint8 ``[height, width, channels]``."""
        self._batch[self._filled] = image
        self._filled += 1
        self.rows += 1
        if self._filled == len(self._batch):
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    def describe(self, path: str) -> Shard:
        """Return the row of the manifest, after `close`."""
        return Shard(path=path, rows=self.rows, bytes=self._file.size, sha256=self._file.digest.hexdigest())

    def _flush(self) -> None:
        if not self._filled:
            return
        flat = pa.array(self._batch[: self._filled].reshape(-1))
        pixels = pa.FixedSizeListArray.from_arrays(flat, self._batch[0].size)
        images = pa.ExtensionArray.from_storage(self._type, pixels)
        self._writer.write_batch(pa.record_batch([images], ["image"]))
        self._filled = 0


@contextlib.contextmanager
def write_shard(uri: str, shape: tuple[int, int, int]) -> Iterator[ShardWriter]:
    """Yield the writer of a shard, which appears whole at the end of the context.

    Args:
        uri: URI of the file.
        shape: height, width and channels of the images.
    """
    # No sync needed: the manifest has the checksum.
    with storage.create_whole(uri, sync=False) as file:
        writer = ShardWriter(_HashedFile(file), shape)
        yield writer
        writer.close()


class _HashedFile(io.RawIOBase):
    """Pass what is written on to another file, and compute its checksum."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content)
        self.digest.update(view)
        self._file.write(view)
        self.size += view.nbytes
        return view.nbytes
