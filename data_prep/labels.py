"""Interpret the columns of labels and splits that a source gives."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import number_values
from data_prep.names import name_declared, parse_split, to_class_names
from trainer.runtime.errors import InputError


def name_classes(uri: str, labels: pa.ChunkedArray, declared: Sequence[str] = ()) -> pa.ChunkedArray:
    """Return the class name of each row, null where the label says none.

    Args:
        uri: URI of the file, for messages.
        labels: the labels, names or numbers.
        declared: class names that the labels are indices into; empty if the labels are names themselves.

    Raises:
        InputError: there are fewer names than labels, or the labels are neither names nor numbers.
    """
    if pa.types.is_nested(labels.type):
        raise InputError(f"{uri}: the labels are of type {labels.type}; required are names or numbers, one an image")
    values, numbers = number_values(labels)
    names = name_declared(uri, declared, values) if declared else to_class_names(values)
    return pa.array(names, pa.string()).take(numbers)


def name_splits_given(name: str, splits: pa.ChunkedArray, first_row: int = 0) -> pa.ChunkedArray:
    """Return the split of each row, null where none is given.

    Args:
        name: name of the table, for messages.
        splits: the splits.
        first_row: number of the first row in messages.

    Raises:
        InputError: a split is unknown; the message names the first row that has it.
    """
    values, numbers = number_values(splits)
    rows = (first_row + pc.index(numbers, number).as_py() for number in range(len(values)))
    names = [parse_split(name, row, value) for row, value in zip(rows, values, strict=True)]
    return pa.array(names, pa.string()).take(numbers)


def find_first(condition: pa.ChunkedArray) -> int | None:
    """Return the number of the first row where a condition holds, None if it holds nowhere."""
    row: int = pc.index(condition, True).as_py()
    return None if row < 0 else row
