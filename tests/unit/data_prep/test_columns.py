import posixpath

import numpy as np
import pyarrow as pa
import pytest

from data_prep.columns import (
    NO_SPLIT,
    TEST,
    TRAIN,
    VAL,
    Rows,
    as_words,
    count_values,
    iterate_rows,
    map_column,
    map_endings,
    name_splits,
    number_values,
    parse_splits,
    sort_by_keys,
)
from data_prep.names import suffix_of


# Of a batch of columns: less than one, exactly one, and more.
@pytest.mark.parametrize("count", [0, 3, 2**14, 2**14 + 1])
def test_rows_are_those_of_a_table_in_their_order(count):
    rows = Rows(pa.schema([("path", pa.string()), ("bytes", pa.int64())]))
    for row in range(count):
        rows.append(f"{row}.jpg" if row % 3 else None, row)
    table = rows.to_table()
    assert table["path"].to_pylist() == [f"{row}.jpg" if row % 3 else None for row in range(count)]
    assert [row["bytes"] for row in iterate_rows(table)] == [*range(count)]
    assert map_column(lambda value: value + 1, table["bytes"], pa.int64()).to_pylist() == [*range(1, count + 1)]


def test_distinct_values_are_numbered_in_the_order_of_their_first_rows():
    values, numbers = number_values(pa.chunked_array([["b", "a"], [None, "a", "c"]]))
    assert values == ["b", "a", "c"]
    assert numbers.to_pylist() == [0, 1, None, 1, 2]
    values, numbers = number_values(pa.chunked_array([], pa.string()))
    assert (values, numbers.to_pylist()) == ([], [])


def test_values_are_counted():
    assert count_values(pa.chunked_array([["a", "b"], ["a", None]])) == {"a": 2, "b": 1, None: 1}


def test_an_ending_is_looked_at_once_for_all_paths_that_have_it():
    called = []

    def upper(path: str) -> str:
        called.append(path)
        return suffix_of(path).upper() or posixpath.basename(path)

    paths = ["a/1.jpg", "b.c/2.jpg", "3.jpg", "b.c/README", "README", "x.\n.jpg", "4."]
    found = map_endings(upper, pa.chunked_array([paths[:2], paths[2:]]), pa.string())
    assert found.to_pylist() == [".JPG", ".JPG", ".JPG", "README", "README", ".JPG", "name."]
    assert called == ["name.jpg", "/README", "README", "name."]


def test_splits_are_numbers_and_names_again():
    names = pa.chunked_array([["val", "train"], ["test", "train"]], pa.string())
    splits = parse_splits(names)
    assert splits.dtype == np.int8
    assert splits.tolist() == [VAL, TRAIN, TEST, TRAIN]
    assert name_splits(splits).to_pylist() == names.to_pylist()


def test_an_image_without_a_split_has_a_number_too():
    assert parse_splits(pa.chunked_array([["val", None]], pa.string())).tolist() == [VAL, NO_SPLIT]


def test_words_sort_as_their_bytes_do():
    values = np.random.default_rng(0).integers(0, 256, (50, 16), np.uint8)
    order = np.lexsort(as_words(values).T[::-1])
    assert [one.tobytes() for one in values[order]] == sorted(one.tobytes() for one in values)


@pytest.mark.parametrize("values", [1, 2, 5, 2**40])
def test_rows_are_sorted_by_their_keys_and_equal_ones_stay_in_order(values):
    keys = np.random.default_rng(0).integers(0, values, (3, 500), np.uint64)
    np.testing.assert_array_equal(sort_by_keys(*keys), np.lexsort(keys[::-1]))
    np.testing.assert_array_equal(sort_by_keys(*keys[:, :0]), [])
