"""The files of a dataset in the making: staged chunks of decoded images, and the Parquet files made from them.

A staged chunk holds the images of one fixed slice of the source, in source order: a file of raw pixels, which costs a
memory copy to write and to read, and a small table of its rows. Once every chunk is there the splits are known, and
each group of chunks becomes one Parquet file a split.
"""

import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.manifest import DataFile
from trainer.runtime import storage

STAGED_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int32()),
        ("split", pa.string()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
        ("perceptual_hash", pa.binary()),
        ("reason", pa.string()),  # null, or why the file was rejected
        ("low", pa.float64()),  # null, or the smallest value of an image that waits for the range of the dataset
        ("high", pa.float64()),  # and the largest
    ]
)
ROWS_SUFFIX = ".rows.parquet"
_PIXELS_SUFFIX = ".pixels.npy"
# Writing and reading are about twice as fast as with one group a file, whose 32-bit pixels do not fit the cache.
_ROW_GROUP_BYTES = 16 * 2**20


def images_to_arrow(images: npt.NDArray[np.uint8]) -> pa.Array:
    """Returns uint8 ``[rows, height, width, channels]`` as an Arrow tensor column, without a copy."""
    shape = images.shape[1:]
    flat = pa.array(images.reshape(-1))
    pixels = int(np.prod(shape))
    return pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.uint8(), shape), pa.FixedSizeListArray.from_arrays(flat, pixels)
    )


def write_chunk(uri: str, pixels: npt.NDArray[np.uint8], rows: pa.Table) -> None:
    """Stages one chunk.

    Args:
        uri: of the chunk, without a suffix.
        pixels: uint8 ``[images, image_size, image_size, channels]`` of the rows that were not rejected and
            do not wait, in row order.
        rows: columns of STAGED_SCHEMA, one row a file of the slice.
    """
    sink = io.BytesIO()
    np.save(sink, pixels, allow_pickle=False)
    storage.write_bytes(uri + _PIXELS_SUFFIX, sink.getvalue(), sync=False)
    # Written last: its presence commits the chunk.
    storage.write_bytes(uri + ROWS_SUFFIX, storage.parquet_bytes(rows), sync=False)


def read_chunk_rows(uri: str) -> pa.Table:
    """Returns the rows of a staged chunk, without its pixels."""
    return storage.parquet_table(storage.read_bytes(uri + ROWS_SUFFIX))


def read_chunk_pixels(uri: str) -> npt.NDArray[np.uint8]:
    """Returns the pixels of a staged chunk, uint8 ``[images, image_size, image_size, channels]``."""
    content = storage.read_bytes(uri + _PIXELS_SUFFIX)
    header = io.BytesIO(content)
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    return np.frombuffer(content, dtype, offset=header.tell()).reshape(shape)


def write_data_file(dataset: str, path: str, images: Sequence[npt.NDArray[np.uint8]], rows: pa.Table) -> DataFile:
    """Writes one Parquet file of a split.

    Args:
        dataset: URI of the dataset.
        path: of the file, relative to it.
        images: uint8 ``[image_size, image_size, channels]`` of each row.
        rows: columns label, path and sha256.
    """
    rows_per_group = max(1, _ROW_GROUP_BYTES // images[0].nbytes)
    schema = pa.schema([("image", images_to_arrow(images[0][np.newaxis]).type), *rows.schema])
    content_digest = hashlib.sha256(json.dumps([rows["label"].to_pylist(), rows["path"].to_pylist()]).encode())
    sink = pa.BufferOutputStream()
    # Parquet has no 8-bit type: split by byte, the three empty bytes of each pixel compress to nothing.
    split_by_byte = ["image.list.element"]
    with pq.ParquetWriter(
        sink,
        schema,
        compression="lz4",
        use_dictionary=False,
        use_byte_stream_split=split_by_byte,
        write_statistics=False,
    ) as writer:
        for start in range(0, len(rows), rows_per_group):
            # Copied group by group: 128 MiB of fresh memory would cost about as much as encoding it.
            group = np.stack(images[start : start + rows_per_group])
            content_digest.update(group.data)
            of_group = rows.slice(start, rows_per_group)
            writer.write_table(of_group.add_column(0, schema.field("image"), images_to_arrow(group)))
    content: bytes = sink.getvalue().to_pybytes()
    # Not synced: the manifest has its checksum.
    storage.write_bytes(storage.join(dataset, path), content, sync=False)
    return DataFile(
        path=path,
        rows=len(rows),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        content_sha256=content_digest.hexdigest(),
    )
