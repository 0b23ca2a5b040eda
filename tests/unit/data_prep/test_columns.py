import numpy as np
import pyarrow as pa

from data_prep.columns import NO_SPLIT, TEST, TRAIN, VAL, as_words, binary_array, name_splits, parse_splits


def test_splits_are_numbers_and_names_again():
    names = pa.chunked_array([["val", "train"], ["test", "train"]], pa.string())
    splits = parse_splits(names)
    assert splits.dtype == np.int8
    assert splits.tolist() == [VAL, TRAIN, TEST, TRAIN]
    assert name_splits(splits).to_pylist() == names.to_pylist()


def test_an_image_without_a_split_has_a_number_too():
    assert parse_splits(pa.chunked_array([["val", None]], pa.string())).tolist() == [VAL, NO_SPLIT]


def test_a_binary_column_is_an_array_wherever_it_is_cut():
    values = [bytes([number] * 4) for number in range(6)]
    column = pa.chunked_array([pa.array(values[:3], pa.binary(4)), pa.array(values[3:], pa.binary(4))])
    assert [one.tobytes() for one in binary_array(column.slice(1, 4))] == values[1:5]
    assert [one.tobytes() for one in binary_array(column.slice(4))] == values[4:]


def test_words_sort_as_their_bytes_do():
    values = np.random.default_rng(0).integers(0, 256, (50, 16), np.uint8)
    order = np.lexsort(as_words(values).T[::-1])
    assert [one.tobytes() for one in values[order]] == sorted(one.tobytes() for one in values)
