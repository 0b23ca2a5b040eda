import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.contents import read_contents
from data_prep.sources import find_images
from tests.sources import ignored_in, rows_of, write_parquet
from trainer.runtime.errors import InputError


def test_rows_of_parquet_files_are_images(tmp_path):
    write_parquet(tmp_path / "hub" / "0.parquet", ["b", "a"])
    write_parquet(tmp_path / "hub" / "1.parquet", ["a"])
    source = str(tmp_path / "hub")
    assert rows_of(source, "path", "label", "container", "offset") == [
        ("0.parquet#00000000", 1, "0.parquet", 0),
        ("0.parquet#00000001", 0, "0.parquet", 1),
        ("1.parquet#00000000", 0, "1.parquet", 0),
    ]


def test_one_parquet_file_is_a_source_of_its_own(tmp_path):
    write_parquet(tmp_path / "one.parquet", ["b", "a"], split=["train", None])
    write_parquet(tmp_path / "other.parquet", ["c"])
    found = find_images(str(tmp_path / "one.parquet"))
    assert found.class_names == ["a", "b"]
    assert found.images["split"].to_pylist() == ["train", None]


@pytest.mark.parametrize(
    "layout",
    [
        {"train-00000-of-00002.parquet": "train", "validation-00000-of-00001.parquet": "val"},
        {"train/0.parquet": "train", "test/0.parquet": "test"},
        # As the Hugging Face hub lays out a dataset.
        {"data/train-00000-of-00001.parquet": "train", "data/test-00000-of-00001.parquet": "test"},
    ],
)
def test_parquet_files_take_their_split_from_their_name(tmp_path, layout):
    for path in layout:
        write_parquet(tmp_path / "hub" / path, ["a", "b"])
    assert set(rows_of(str(tmp_path / "hub"), "container", "split")) == set(layout.items())


def test_parquet_without_a_label_column_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [b"1"], "text": ["a"]}), tmp_path / "images.parquet")
    with pytest.raises(InputError, match="has the columns image, text; required are image and label"):
        find_images(str(tmp_path / "images.parquet"))


def test_a_row_of_a_parquet_file_without_a_label_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "label": ["a", "b", None]}), tmp_path / "images.parquet")
    with pytest.raises(InputError, match=r"images\.parquet.*label"):
        find_images(str(tmp_path / "images.parquet"))


def write_hub(path: Path, columns: dict, features: dict) -> str:
    """Write a file with the metadata that the Hugging Face hub's library leaves in its schema."""
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return str(path)


NAMES = [f"name {number}" for number in range(11, 0, -1)]
CLASSES = {"_type": "ClassLabel", "names": NAMES}


def test_class_names_and_their_order_are_those_that_the_file_declares(tmp_path):
    columns = {"image": [b"1"] * 11, "label": list(range(10, -1, -1))}
    source = write_hub(tmp_path / "hub.parquet", columns, {"image": {"_type": "Image"}, "label": CLASSES})
    assert find_images(source).class_names == NAMES
    assert rows_of(source, "label") == [(label,) for label in range(10, -1, -1)]


def test_declared_classes_without_an_image_are_left_out_and_named(tmp_path):
    source = write_hub(tmp_path / "hub.parquet", {"image": [b"1"] * 3, "label": [9, 2, 2]}, {"label": CLASSES})
    found = find_images(source)
    assert found.class_names == ["name 9", "name 2"]
    assert rows_of(source, "label") == [(1,), (0,), (0,)]
    assert found.listed.empty_classes == "name 11, name 10, name 8, name 7, name 6 and 4 more"


def test_columns_may_have_the_names_that_the_file_declares(tmp_path):
    features = {"img": {"_type": "Image"}, "fine_label": CLASSES, "size": {"_type": "Value"}}
    columns = {"img": [{"bytes": b"first", "path": "a.png"}, {"bytes": b"second", "path": "b.png"}]}
    write_hub(tmp_path / "train-0.parquet", {**columns, "fine_label": [1, 0], "size": [1, 1]}, features)
    found = find_images(str(tmp_path))
    assert found.class_names == NAMES[:2]
    assert list(read_contents(found.uri, found.images)) == [b"first", b"second"]


def test_of_two_declared_labels_none_is_chosen(tmp_path):
    columns = {"image": [b"1"], "fine_label": [1], "coarse_label": [0]}
    source = write_hub(tmp_path / "hub.parquet", columns, {"fine_label": CLASSES, "coarse_label": CLASSES})
    with pytest.raises(
        InputError, match="has the columns image, fine_label, coarse_label; required are image and label"
    ):
        find_images(source)


def test_a_label_that_the_hub_keeps_secret_is_none(tmp_path):
    source = write_hub(tmp_path / "hub.parquet", {"image": [b"1"] * 3, "label": [1, -1, 0]}, {"label": CLASSES})
    assert ignored_in(source) == {"hub.parquet#00000001": "no_label"}


def test_a_label_beyond_the_declared_classes_is_refused(tmp_path):
    source = write_hub(tmp_path / "hub.parquet", {"image": [b"1"] * 2, "label": [10, 11]}, {"label": CLASSES})
    with pytest.raises(InputError, match=r"hub\.parquet has the label 11, but declares 11 classes"):
        find_images(source)


@pytest.mark.parametrize("metadata", ["", "[]", "{}", '{"info": null}', '{"info": {"features": {"label": ["names"]}}}'])
def test_metadata_of_another_form_are_passed_over(tmp_path, metadata):
    table = pa.table({"image": [b"1"] * 3, "label": [10, 9, 0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "hub.parquet")
    assert find_images(str(tmp_path / "hub.parquet")).class_names == ["0", "9", "10"]


def test_a_text_label_is_the_name_of_its_class(tmp_path):
    features = {"label": CLASSES}
    source = write_hub(tmp_path / "hub.parquet", {"image": [b"1"] * 2, "label": ["b", "a"]}, features)
    assert find_images(source).class_names == ["a", "b"]
