from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import find_images
from tests.sources import rows_of
from trainer.runtime.errors import InputError

CSV = "path,label,split\nx/1.png,b,train\nx/2.png,a,\nx/3.png,a,validation\nx/4.png,b,train\nx/5.png,a,train\n"


def test_a_csv_names_images_labels_and_splits(write_table):
    source = write_table("labels.csv", CSV)
    assert find_images(source).class_names == ["a", "b"]
    assert rows_of(source, "path", "label", "split") == [
        ("x/1.png", 1, "train"),
        ("x/2.png", 0, None),
        ("x/3.png", 0, "val"),
        ("x/4.png", 1, "train"),
        ("x/5.png", 0, "train"),
    ]


def test_paths_of_a_table_are_relative_to_its_folder(write_table):
    source = write_table("labels.csv", CSV)
    assert find_images(source).uri == str(Path(source).parent)


def test_a_byte_order_mark_is_passed_over(write_table):
    assert rows_of(write_table("labels.csv", "\ufeffpath,label\n1.png,a\n2.png,b\n"), "path") == [
        ("1.png",),
        ("2.png",),
    ]


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.ndjson"])
def test_json_lines_may_call_the_path_file_name(write_table, name):
    text = '{"file_name": "1.png", "label": "cat"}\n\n{"file_name": "2.png", "label": 7}\n'
    source = write_table(name, text)
    assert find_images(source).class_names == ["7", "cat"]
    assert rows_of(source, "path", "label") == [("1.png", 1), ("2.png", 0)]


def test_a_parquet_file_without_images_is_a_table(tmp_path):
    source = str(tmp_path / "labels.parquet")
    pq.write_table(pa.table({"path": ["1.png", "2.png"], "label": ["a", "b"], "split": ["train", "train"]}), source)
    assert rows_of(source, "path", "split", "container") == [("1.png", "train", None), ("2.png", "train", None)]


@pytest.mark.parametrize("path", ["../1.png", "/etc/1.png", "x/../../1.png", "..", "s3://bucket/1.png"])
def test_a_table_cannot_leave_its_folder(write_table, path):
    with pytest.raises(InputError, match=r"labels.csv, row 2: .* is outside the table's folder"):
        find_images(write_table("labels.csv", f"path,label\n0.png,b\n{path},a\n"))


def test_a_table_without_the_needed_columns_is_refused_with_those_it_has(write_table):
    with pytest.raises(InputError, match="has the columns image, label; required are path"):
        find_images(write_table("labels.csv", "image,label\n1.png,a\n"))


def test_a_row_with_more_fields_than_the_header_is_refused(write_table):
    with pytest.raises(
        InputError, match=r"row 2 has more fields than the header; add the missing columns to the header"
    ):
        find_images(write_table("labels.csv", "path,label\n1.png,a\n2.png,b,train\n"))


def test_an_unknown_split_is_refused_with_its_row(write_table):
    with pytest.raises(InputError, match=r"row 2: split 'holdout' is unknown; use train, val or test"):
        find_images(write_table("labels.csv", "path,label,split\n1.png,a,train\n2.png,b,holdout\n"))


def test_an_image_that_is_named_twice_is_refused(write_table):
    with pytest.raises(InputError, match=r"lists 'x/1\.png' more than once"):
        find_images(write_table("labels.csv", "path,label\nx/1.png,a\nx/./1.png,b\n"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken.jsonl", '{"path": "1.png", '),
        ("list.jsonl", "[1, 2]\n"),
        ("empty.csv", ""),
        ("quote.csv", 'path,label\n"1.png,a\n'),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(write_table, name, text):
    with pytest.raises(InputError, match=name):
        find_images(write_table(name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("short.csv", "path,label\n1.png,a\n2.png,b\n3.png\n"),
        ("blank.csv", "path,label\n1.png,a\n2.png,b\n3.png,\n"),
        ("absent.jsonl", '{"path": "1.png", "label": "a"}\n{"path": "2.png", "label": "b"}\n{"path": "3.png"}\n'),
        (
            "null.jsonl",
            '{"path": "1.png", "label": "a"}\n{"path": "2.png", "label": "b"}\n{"path": "3.png", "label": null}',
        ),
    ],
)
def test_a_row_without_a_label_is_refused(write_table, name, text):
    with pytest.raises(InputError, match="row 3"):
        find_images(write_table(name, text))


def test_backslashes_separate_folders(write_table):
    source = write_table("labels.csv", ",path,label\r\n0,cat\\1.png,cat\r\n1,x\\y/2.png,dog\r\n")
    assert rows_of(source, "path", "label") == [("cat/1.png", 0), ("x/y/2.png", 1)]


def test_a_backslash_in_the_name_of_a_file_stays(tmp_path, write_table):
    (tmp_path / "a\\1.png").touch()
    assert rows_of(write_table("labels.csv", "path,label\na\\1.png,a\nb.png,b\n"), "path") == [
        ("a\\1.png",),
        ("b.png",),
    ]


@pytest.mark.parametrize("path", ["C:\\photos\\1.png", "c:/photos/1.png", "\\\\server\\1.png", "..\\1.png"])
def test_a_path_of_windows_cannot_leave_the_folder_either(write_table, path):
    with pytest.raises(InputError, match=r"labels.csv, row 2: .* is outside the table's folder"):
        find_images(write_table("labels.csv", f"path,label\n0.png,b\n{path},a\n"))


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding"),
    [("labels.csv", ";", "utf-8-sig"), ("labels.csv", "\t", "utf-16"), ("labels.tsv", "\t", "utf-8")],
)
def test_a_table_may_be_separated_and_encoded_as_spreadsheets_do(tmp_path, name, delimiter, encoding):
    lines = [("path", "label"), ("1.png", "\u00e4pfel, gr\u00fcn"), ("2.png", "birne")]
    (tmp_path / name).write_text("\r\n".join(map(delimiter.join, lines)), encoding=encoding)
    assert find_images(str(tmp_path / name)).class_names == ["birne", "\u00e4pfel, gr\u00fcn"]


def test_another_encoding_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "labels.csv").write_bytes("path,label\n1.png,\u00e4pfel\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"labels\.csv cannot be read as a table: .*; save it as UTF-8"):
        find_images(str(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("labels", "class_names"),
    [
        # As pandas writes whole numbers of a column that had a gap.
        (["3.0", "10.0", "2.0"], ["2", "3", "10"]),
        (["3.0", "10", "2"], ["2", "3", "10"]),
        (["3.5", "10.0", "2.0"], ["10.0", "2.0", "3.5"]),
        (["3.0", "ten", "2.0"], ["2.0", "3.0", "ten"]),
        (["-1", "10", "2"], ["-1", "2", "10"]),
        ([" cat", "cat ", "dog"], ["cat", "dog"]),
        (["cafe\u0301", "caf\u00e9", "tea"], ["caf\u00e9", "tea"]),
    ],
)
def test_labels_of_a_table_are_names_of_classes_in_their_order(write_table, labels, class_names):
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    assert find_images(write_table("labels.csv", f"path,label\n{rows}")).class_names == class_names


def test_a_label_that_is_not_a_number_is_none(tmp_path):
    table = pa.table({"path": ["1.png", "2.png", "3.png"], "label": [3.0, 10.0, float("nan")]})
    pq.write_table(table, tmp_path / "labels.parquet")
    with pytest.raises(InputError, match="row 3 has no label"):
        find_images(str(tmp_path / "labels.parquet"))
    pq.write_table(table.slice(0, 2), tmp_path / "labels.parquet")
    assert find_images(str(tmp_path / "labels.parquet")).class_names == ["3", "10"]
