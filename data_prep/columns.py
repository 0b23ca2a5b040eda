"""Columns as arrays, from rows and back: as Python objects, millions of rows would take gigabytes."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.manifest import SPLITS

Splits = npt.NDArray[np.int8]
"""``[rows]``, the split of each image: an index into SPLITS, or NO_SPLIT."""
TRAIN, VAL, TEST = range(len(SPLITS))
NO_SPLIT = -1

# Rows that are Python objects at once.
_ROWS_PER_BATCH = 2**14


class Rows:
    """A table that is made row by row."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []

    def append(self, *row: Any) -> None:
        """Add a row, with a value for each column."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_BATCH:
            self._pack()

    def to_table(self) -> pa.Table:
        """Return all rows in their order."""
        if self._rows:
            self._pack()
        return pa.Table.from_batches(self._batches, self._schema)

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, one.type) for column, one in zip(columns, self._schema, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=self._schema))
        self._rows.clear()


def filter_rows(table: pa.Table, condition: pa.ChunkedArray) -> pa.Table:
    """Return the rows where a condition holds; without a copy if it holds everywhere."""
    return table if pc.all(condition).as_py() else table.filter(condition)


def iterate_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield each row of a table."""
    return itertools.chain.from_iterable(batch.to_pylist() for batch in table.to_batches(_ROWS_PER_BATCH))


def map_column(function: Callable[[Any], Any], column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Return what a function makes of each value of a column."""
    batches = pa.table([column], ["value"]).to_batches(_ROWS_PER_BATCH)
    return pa.chunked_array([pa.array(map(function, batch["value"].to_pylist()), type_) for batch in batches], type_)


def map_endings(function: Callable[[str], Any], paths: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Do the same with a function that looks only at the suffix of a path, or at the name of a file that has none.

    It is called once for each that is different.
    """
    endings, ending_of = number_values(pc.replace_substring_regex(paths, r"^(?s:.*)([./][^./]*)$", r"\1"))
    found = [function(f"name{ending}" if ending.startswith(".") else ending) for ending in endings]
    return pa.array(found, type_).take(ending_of)


def number_values(column: pa.ChunkedArray) -> tuple[list[Any], pa.ChunkedArray]:
    """Return the distinct values of a column, in the order of their first rows, and the number of that of each row."""
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    values = chunks[0].dictionary.to_pylist() if chunks else []
    return values, pa.chunked_array([chunk.indices for chunk in chunks], pa.int32())


def count_values(column: pa.ChunkedArray) -> Counter[Any]:
    """Return how often each value of a column occurs."""
    return Counter({one["values"]: one["counts"] for one in column.value_counts().to_pylist()})


def parse_splits(names: pa.ChunkedArray) -> Splits:
    """Return a column with the names of splits as numbers; null is NO_SPLIT."""
    numbers = pc.index_in(names, pa.array(SPLITS, pa.string())).fill_null(NO_SPLIT)
    splits: Splits = numbers.to_numpy().astype(np.int8)
    return splits


def name_splits(splits: Splits) -> pa.Array:
    """Return the name of the split of each image, a string array."""
    return pa.array(SPLITS, pa.string()).take(pa.array(splits))


def as_words(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return binary values as numbers that sort as their bytes do, uint64 ``[rows, length // 8]``."""
    return values.view(">u8").astype(np.uint64)


def sort_by_keys(*keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the order of rows by some keys, the most significant first; equal rows stay in their order.

    It is that of `np.lexsort`, which sorts all rows by every key: here only those that the first one leaves equal are.
    """
    order: npt.NDArray[np.int64] = np.argsort(keys[0])
    by_first = keys[0][order]
    is_tied = np.zeros(len(order), bool)
    is_tied[1:] = by_first[1:] == by_first[:-1]
    is_tied[:-1] |= is_tied[1:]
    tied = np.sort(order[is_tied])
    order[is_tied] = tied[np.lexsort([key[tied] for key in reversed(keys)])]
    return order
