import pyarrow as pa
import pytest

from data_prep.labels import find_first, name_classes, name_splits_given
from trainer.runtime.errors import InputError


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.chunked_array([["b", None], [" a", "b"]]), ["b", None, "a", "b"]),
        # Whole numbers, as of a column that had a gap: which they are shows only at its end.
        (pa.chunked_array([[3.0, None], [float("nan"), 10.0]]), ["3", None, None, "10"]),
        (pa.chunked_array([[3.0], [0.5]]), ["3.0", "0.5"]),
        # As pandas writes categories, with others in each row group.
        (pa.chunked_array([pa.array(["a", "b"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()]), [*"abb"]),
        (pa.chunked_array([], pa.int64()), []),
    ],
)
def test_labels_become_names_of_classes(labels, names):
    assert name_classes("file", labels).to_pylist() == names


def test_labels_are_indices_into_declared_classes():
    assert name_classes("file", pa.chunked_array([[1, -1], [None, 0]]), ["x", "y"]).to_pylist() == [
        "y",
        None,
        None,
        "x",
    ]
    with pytest.raises(InputError, match="file has the label 2, but declares 2 classes"):
        name_classes("file", pa.chunked_array([[1, 2]]), ["x", "y"])


def test_an_image_has_one_label():
    with pytest.raises(InputError, match=r"file: the labels are of type list<.*>; required are names or numbers"):
        name_classes("file", pa.chunked_array([[["x"], ["x", "y"]]]))


def test_splits_have_their_own_names_and_the_first_unknown_one_is_named():
    splits = pa.chunked_array([["valid", ""], [None, "train"]])
    assert name_splits_given("file", splits).to_pylist() == ["val", None, None, "train"]
    with pytest.raises(InputError, match="file, row 3: split 'x' is unknown"):
        name_splits_given("file", pa.chunked_array([["train", "val"], ["x", "y", "x"]]), first_row=1)


def test_the_first_row_of_a_condition_is_found():
    assert find_first(pa.chunked_array([[False], [False, True, True]])) == 2
    assert find_first(pa.chunked_array([[False, None]])) is None
