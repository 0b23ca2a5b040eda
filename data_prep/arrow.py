"""Find images in Arrow files, such as those of a Hugging Face dataset that was saved to disk."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_prep.listing import Listing
from data_prep.names import split_alluded_to, split_of_file, suffix_of
from data_prep.parquet import add_rows, check_columns, image_column, label_column
from trainer.runtime import storage
from trainer.runtime.errors import InputError

SUFFIX = ".arrow"
_FILE_MAGIC = b"ARROW1"


def find_in_arrow(root: str, path: str, listing: Listing, labelled: bool) -> None:
    """Add the images in the rows of an Arrow file, a stream or a random access file, to a listing.

    Args:
        root: path or URI of the source.
        path: path of the file in the source; a file of another kind is ignored.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: the columns are not those of images and labels, or the images are compressed.
        pyarrow.ArrowInvalid: the file is damaged.
    """
    if suffix_of(path) != SUFFIX:
        listing.ignore_one(path, "not_an_arrow_file")
        return
    uri = storage.join(root, path)
    content = storage.map_file(uri)
    schema, batches = _open(content)
    check_columns(uri, schema, labelled)
    images_in, labels_in = image_column(schema), label_column(schema)
    split = pa.scalar(split_of_file(path) or split_alluded_to(storage.basename(path).removesuffix(SUFFIX)), pa.string())
    columns: dict[str, list[pa.Array]] = {"label": [], "split": [], "offset": [], "bytes": []}
    for batch in batches:
        offsets, sizes = _find_places(uri, batch.column(images_in), content)
        labels = batch.column(labels_in) if labels_in else pa.nulls(len(batch), pa.string())
        splits = batch.column("split") if "split" in schema.names else pa.repeat(split, len(batch))
        for name, array in zip(columns, (labels, splits, offsets, sizes), strict=True):
            columns[name].append(array)
    if columns["label"]:
        rows = pa.table({name: pa.chunked_array(arrays) for name, arrays in columns.items()})
        add_rows(uri, path, schema, rows, listing, labelled)


def _open(content: pa.Buffer) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if content[: len(_FILE_MAGIC)].to_pybytes() != _FILE_MAGIC:
        stream = pa.ipc.open_stream(content)
        return stream.schema, iter(stream)
    file = pa.ipc.open_file(content)
    return file.schema, map(file.get_batch, range(file.num_record_batches))


def _find_places(uri: str, column: pa.Array, content: pa.Buffer) -> tuple[pa.Array, pa.Array]:
    """Return where in a file the bytes of each image start and how many there are; null for those not in it."""
    array = column.field("bytes") if pa.types.is_struct(column.type) else column
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        raise InputError(f"{uri}: the column of images holds {array.type}; required are the bytes of image files")
    _, offsets, data = array.buffers()
    if data is None:
        return pa.nulls(len(array), pa.int64()), pa.nulls(len(array), pa.int64())
    first = data.address - content.address
    if not 0 <= first <= content.size:
        raise InputError(f"{uri} is compressed; write it without compression, or as Parquet")
    kind = np.int32 if pa.types.is_binary(array.type) else np.int64
    ends = np.frombuffer(offsets, kind)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    is_elsewhere = array.is_null().to_numpy(zero_copy_only=False)
    return pa.array(first + ends[:-1], mask=is_elsewhere), pa.array(np.diff(ends), mask=is_elsewhere)
