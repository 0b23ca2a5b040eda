"""Columns of the index as NumPy arrays, and back: as Python objects, millions of rows would take gigabytes."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.manifest import SPLITS

Splits = npt.NDArray[np.int8]
"""``[rows]``, the split of each image: an index into SPLITS, or NO_SPLIT."""
TRAIN, VAL, TEST = range(len(SPLITS))
NO_SPLIT = -1


def parse_splits(names: pa.ChunkedArray) -> Splits:
    """Return a column with the names of splits as numbers; null is NO_SPLIT."""
    numbers = pc.index_in(names, pa.array(SPLITS, pa.string())).fill_null(NO_SPLIT)
    splits: Splits = numbers.to_numpy().astype(np.int8)
    return splits


def name_splits(splits: Splits) -> pa.Array:
    """Return the name of the split of each image, a string array."""
    return pa.array(SPLITS, pa.string()).take(pa.array(splits))


def binary_array(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return a column of binary values of one length as uint8 ``[rows, length]``."""
    array = column.combine_chunks()
    length = array.type.byte_width
    content = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * length : (array.offset + len(array)) * length]
    return content.reshape(-1, length)


def as_words(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return binary values as numbers that sort as their bytes do, uint64 ``[rows, length // 8]``."""
    return values.view(">u8").astype(np.uint64)
