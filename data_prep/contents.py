"""Read the bytes of images from where their source keeps them: files, parts of files, rows of a Parquet file."""

import contextlib
import errno
import functools
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.names import suffix_of
from data_prep.parquet import image_column
from trainer.runtime import storage
from trainer.runtime.ahead import call_ahead
from trainer.runtime.errors import InputError

# Reads overlap the latency of an object store, and decoding.
_READERS = 8
_BLOCK = 16
# Errors of a local file system that concern one file; any other is treated as a failure of the whole source.
_OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def read_contents(source: str, images: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of each image in turn, as `read_blocks` does."""
    return itertools.chain.from_iterable(read_blocks(source, images, _BLOCK))


def read_blocks(source: str, images: pa.Table, block: int) -> Iterator[list[bytes | None]]:
    """Yield the bytes of images in blocks, which are read ahead of their use.

    The bytes are None if the file does not exist or, if it is local, cannot be opened.

    Args:
        source: URI of the folder that paths and containers are relative to.
        images: table with the columns of `data_prep.sources.IMAGES_SCHEMA`.
        block: number of images in each block but the last.

    Raises:
        InputError: the storage denied access or could not be reached.
    """
    containers = set(images["container"].unique().to_pylist())
    blocks = (images.slice(start, block).to_pylist() for start in range(0, len(images), block))
    if all(suffix_of(container) != ".parquet" for container in containers if container):
        read = functools.partial(_read_block, source)
        for future in call_ahead(read, blocks, ahead=_READERS, threads=_READERS, name="read"):
            yield future.result()
    else:
        contents = _read_rows(source, itertools.chain.from_iterable(blocks))
        while some := list(itertools.islice(contents, block)):
            yield some


def _read_block(source: str, rows: list[dict[str, Any]]) -> list[bytes | None]:
    return [_read_one(source, row) for row in rows]


def _read_one(source: str, row: dict[str, Any]) -> bytes | None:
    try:
        if row["container"] is None:
            return _read_file(source, row["path"])
        return storage.read_bytes(storage.join(source, row["container"]), row["offset"], row["bytes"])
    except FileNotFoundError:
        return None
    except InputError as error:
        # An object store gives the same answer when the credentials are wrong: then not every file must count as bad.
        if storage.is_local(source) and isinstance(error.__cause__, OSError) and error.__cause__.errno in _OF_ONE_FILE:
            return None
        raise


def _read_file(source: str, path: str) -> bytes:
    """Return the content of a file; a table from another system may spell its name in another form of Unicode."""
    for same in dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))):
        with contextlib.suppress(FileNotFoundError):
            return storage.read_bytes(storage.join(source, same))
    raise FileNotFoundError(path)


def _read_rows(source: str, rows: Iterable[dict[str, Any]]) -> Iterator[bytes | None]:
    """Yield the images in rows of Parquet files; read only the row groups that contain these rows."""
    group_of_file: tuple[str, int] | None = None
    images: list[Any] = []
    first_row = 0
    for row in rows:
        if group_of_file is None or group_of_file[0] != row["container"] or row["offset"] >= first_row + len(images):
            with storage.open_file(storage.join(source, row["container"])) as file:
                parquet = pq.ParquetFile(file)
                group, first_row = _find_row_group(parquet.metadata, row["offset"])
                column = image_column(parquet.schema_arrow)
                images = parquet.read_row_group(group, columns=[column])[column].to_pylist()
            group_of_file = (row["container"], group)
        image = images[row["offset"] - first_row]
        yield image["bytes"] if isinstance(image, dict) else image


def _find_row_group(metadata: Any, row: int) -> tuple[int, int]:
    """Return the row group that contains a row, and the number of its first row in the file."""
    first_row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first_row + rows:
            return group, first_row
        first_row += rows
    raise IndexError(row)
