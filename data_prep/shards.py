"""Read and write the files of a preparation: staged chunks of decoded images, and the Parquet files made from them.

A staged chunk contains the images of one slice of the source, in source order: a file of raw pixels, which is fast to
write and to read, and a small table with one row per file. Once all chunks are staged, the splits are drawn, and each
group of chunks becomes one Parquet file per split.
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
        ("low", pa.float64()),  # null, or the smallest value of an image that needs the range of the dataset
        ("high", pa.float64()),  # null, or the largest value of such an image
    ]
)
ROWS_SUFFIX = ".rows.parquet"
_PIXELS_SUFFIX = ".pixels.npy"
# About twice as fast to write and to read as one group per file, whose 32-bit pixels do not fit into the CPU cache.
_ROW_GROUP_BYTES = 16 * 2**20


def images_to_arrow(images: npt.NDArray[np.uint8]) -> pa.Array:
    """Return uint8 ``[rows, height, width, channels]`` as an Arrow tensor column, without a copy."""
    shape = images.shape[1:]
    flat = pa.array(images.reshape(-1))
    pixels = int(np.prod(shape))
    return pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.uint8(), shape), pa.FixedSizeListArray.from_arrays(flat, pixels)
    )


def write_chunk(uri: str, pixels: npt.NDArray[np.uint8], rows: pa.Table) -> None:
    """Write one staged chunk.

    Args:
        uri: URI of the chunk, without a suffix.
        pixels: uint8 ``[images, image_size, image_size, channels]`` of the rows that have pixels, in row
            order: those that were not rejected and do not need the range of the dataset.
        rows: table with the columns of STAGED_SCHEMA, one row per file of the slice.
    """
    sink = io.BytesIO()
    np.save(sink, pixels, allow_pickle=False)
    storage.write_bytes(uri + _PIXELS_SUFFIX, sink.getvalue(), sync=False)
    # Written last: its presence commits the chunk.
    storage.write_bytes(uri + ROWS_SUFFIX, storage.parquet_bytes(rows), sync=False)


def read_chunk_rows(uri: str) -> pa.Table:
    """Return the rows of a staged chunk, without its pixels."""
    return storage.parquet_table(storage.read_bytes(uri + ROWS_SUFFIX))


def read_chunk_pixels(uri: str) -> npt.NDArray[np.uint8]:
    """Return the pixels of a staged chunk, uint8 ``[images, image_size, image_size, channels]``."""
    content = storage.read_bytes(uri + _PIXELS_SUFFIX)
    header = io.BytesIO(content)
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    return np.frombuffer(content, dtype, offset=header.tell()).reshape(shape)


def write_data_file(dataset: str, path: str, images: Sequence[npt.NDArray[np.uint8]], rows: pa.Table) -> DataFile:
    """Write one Parquet file of a split.

    Args:
        dataset: URI of the dataset.
        path: path of the file, relative to the dataset.
        images: uint8 ``[image_size, image_size, channels]`` of each row.
        rows: table with the columns label, path and sha256.
    """
    rows_per_group = max(1, _ROW_GROUP_BYTES // images[0].nbytes)
    schema = pa.schema([("image", images_to_arrow(images[0][np.newaxis]).type), *rows.schema])
    content_digest = hashlib.sha256(json.dumps([rows["label"].to_pylist(), rows["path"].to_pylist()]).encode())
    sink = pa.BufferOutputStream()
    # Parquet has no 8-bit type: each pixel has three empty bytes, which compress to nothing when bytes are split.
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
            # Copied one group at a time: allocating 128 MiB would take about as long as encoding it.
            group = np.stack(images[start : start + rows_per_group])
            content_digest.update(group.data)
            of_group = rows.slice(start, rows_per_group)
            writer.write_table(of_group.add_column(0, schema.field("image"), images_to_arrow(group)))
    content: bytes = sink.getvalue().to_pybytes()
    # No sync needed: the manifest has the checksum.
    storage.write_bytes(storage.join(dataset, path), content, sync=False)
    return DataFile(
        path=path,
        rows=len(rows),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        content_sha256=content_digest.hexdigest(),
    )
