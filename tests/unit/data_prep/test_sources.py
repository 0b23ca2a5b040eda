import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import IMAGES_SCHEMA, find_images
from trainer.errors import InputError


@pytest.fixture
def write_files(tmp_path):
    """Returns a function that writes files, each holding its own path, and returns their folder."""

    def write(*paths: str) -> str:
        for path in paths:
            target = tmp_path / "source" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path)
        return str(tmp_path / "source")

    return write


@pytest.fixture
def write_table(tmp_path):
    """Returns a function that writes one text file and returns its path."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def rows_of(source: str, *columns: str, source_format=None) -> list[tuple]:
    images = find_images(source, source_format).images
    return [tuple(row[column] for column in columns) for row in images.to_pylist()]


def ignored_in(source: str) -> dict[str, str]:
    ignored = find_images(source).ignored.to_pydict()
    return dict(zip(ignored["path"], ignored["reason"], strict=True))


def test_a_folder_is_a_class_and_its_number_follows_the_sorted_names(write_files):
    source = write_files("b/1.png", "a-b/2.png", "a/3.png", "a/0.png")
    found = find_images(source)
    assert found.class_names == ["a", "a-b", "b"]
    assert found.images.schema == IMAGES_SCHEMA
    assert rows_of(source, "path", "label") == [("a-b/2.png", 1), ("a/0.png", 0), ("a/3.png", 0), ("b/1.png", 2)]


def test_files_have_no_split_unless_their_folders_say_so(write_files):
    source = write_files("a/1.png", "b/2.png")
    assert rows_of(source, "split", "container") == [(None, None), (None, None)]


def test_each_file_has_its_size(write_files):
    assert rows_of(write_files("a/1.png", "b/22.png"), "bytes") == [(7,), (8,)]


def test_images_are_found_at_any_depth_below_their_class(write_files):
    source = write_files("a/2023/april/1.png", "a/2.png", "b/x/3.png")
    assert rows_of(source, "path", "label") == [("a/2.png", 0), ("a/2023/april/1.png", 0), ("b/x/3.png", 1)]


@pytest.mark.parametrize(
    ("folder", "split"),
    [("val", "val"), ("valid", "val"), ("validation", "val"), ("dev", "val"), ("test", "test"), ("testing", "test")],
)
@pytest.mark.parametrize("train", ["train", "training"])
def test_split_folders_are_honoured(write_files, train, folder, split):
    source = write_files(f"{train}/a/1.png", f"{train}/b/2.png", f"{folder}/a/3.png")
    split_of = dict(rows_of(source, "path", "split"))
    assert split_of == {f"{train}/a/1.png": "train", f"{train}/b/2.png": "train", f"{folder}/a/3.png": split}
    assert find_images(source).class_names == ["a", "b"]


def test_a_class_may_be_called_test(write_files):
    source = write_files("test/1.png", "train/2.png", "question/3.png")
    assert find_images(source).class_names == ["question", "test", "train"]
    assert rows_of(source, "split") == [(None,), (None,), (None,)]


def test_without_a_train_folder_split_names_are_classes(write_files):
    assert find_images(write_files("test/1.png", "val/2.png")).class_names == ["test", "val"]


def test_folders_without_images_do_not_decide_whether_there_are_splits(write_files):
    source = write_files("train/a/1.png", "train/b/2.png", "docs/readme.txt", "notes.md")
    assert rows_of(source, "split") == [("train",), ("train",)]


def test_hidden_files_and_folders_are_passed_over(write_files):
    source = write_files("a/1.png", "b/2.png", "a/.3.png", ".cache/4.png", "a/.thumbs/5.png", "__MACOSX/a/1.png")
    assert rows_of(source, "path") == [("a/1.png",), ("b/2.png",)]
    assert ignored_in(source) == {}


def test_names_may_have_spaces_and_any_letters(write_files):
    source = write_files("grüne Äpfel/foto 1 (copy).png", "яблоки/#2 100%.png")
    assert rows_of(source, "path") == [("grüne Äpfel/foto 1 (copy).png",), ("яблоки/#2 100%.png",)]
    assert find_images(source).class_names == ["grüne Äpfel", "яблоки"]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "Png", "bmp", "gif", "tif", "TIFF", "webp"])
def test_image_names_are_told_by_their_suffix_in_any_case(write_files, suffix):
    assert rows_of(write_files(f"a/1.{suffix}", "b/2.png"), "path")[0] == (f"a/1.{suffix}",)


def test_other_files_are_listed_with_the_reason(write_files):
    source = write_files("a/1.png", "b/2.png", "a/labels.txt", "b/noext", "stray.png", "README.md")
    assert ignored_in(source) == {
        "a/labels.txt": "not_an_image_name",
        "b/noext": "not_an_image_name",
        "stray.png": "not_in_a_class_folder",
        "README.md": "not_in_a_class_folder",
    }


def test_an_image_directly_in_a_split_folder_has_no_class(write_files):
    source = write_files("train/a/1.png", "train/b/2.png", "train/3.png")
    assert ignored_in(source) == {"train/3.png": "not_in_a_class_folder"}


def test_split_folders_may_be_in_any_case(write_files):
    source = write_files("Train/a/1.png", "Train/b/2.png", "TESTING/a/3.png")
    assert find_images(source).class_names == ["a", "b"]
    assert rows_of(source, "split") == [("test",), ("train",), ("train",)]


def test_a_folder_beside_split_folders_is_refused_and_named(write_files):
    source = write_files("train/a/1.png", "train/b/2.png", "val/a/3.png", "extra/a/4.png")
    with pytest.raises(InputError, match=r"the folders train, val look like splits, and beside them is extra; move or"):
        find_images(source)


def test_a_class_may_be_called_like_a_split(write_files):
    assert find_images(write_files("train/red/1.png", "car/red/2.png")).class_names == ["car", "train"]


def test_a_name_that_is_not_utf8_costs_that_file(write_files):
    source = write_files("a/1.png", "b/2.png")
    Path(os.fsdecode(os.fsencode(source) + b"/a/caf\xe9.png")).touch()
    Path(os.fsdecode(os.fsencode(source) + b"/a/caf\xe9.txt")).touch()
    assert rows_of(source, "path") == [("a/1.png",), ("b/2.png",)]
    assert ignored_in(source) == {"a/caf\\udce9.png": "name_is_not_utf8", "a/caf\\udce9.txt": "not_an_image_name"}


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(InputError, match=f"{name}: no files there"):
            find_images(str(tmp_path / name))


def test_a_single_class_is_refused_and_named(write_files):
    with pytest.raises(InputError, match=r"images of 1 classes \(a\); two or more are needed"):
        find_images(write_files("a/1.png", "a/2.png"))


def test_a_folder_without_images_is_refused(write_files):
    with pytest.raises(InputError, match=r"images of 0 classes \(none\)"):
        find_images(write_files("a/1.txt", "b/2.txt"))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks_is_refused(write_files, split):
    with pytest.raises(InputError, match=f"{split} has classes that train has not: c, d;"):
        find_images(write_files("train/a/1.png", "train/b/2.png", f"{split}/d/3.png", f"{split}/c/4.png"))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="no URI that is known"):
        find_images("gs://bucket/images")


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


def test_suffixes_may_be_in_upper_case(tmp_path, write_table):
    assert rows_of(write_table("LABELS.CSV", CSV), "path")[0] == ("x/1.png",)
    write_parquet(tmp_path / "hub" / "A.PARQUET", ["b", "a"])
    assert rows_of(str(tmp_path / "hub"), "label", "container") == [(1, "A.PARQUET"), (0, "A.PARQUET")]
    members = {"0.JPG": b"", "0.CLS": b"a", "1.jpg": b"", "1.JSON": b'{"label": "b"}'}
    assert rows_of(write_tar(tmp_path / "X.TAR", members), "path") == [("X.TAR#0.JPG",), ("X.TAR#1.jpg",)]


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
    with pytest.raises(InputError, match=r"labels.csv, row 2: .* leaves the table's folder"):
        find_images(write_table("labels.csv", f"path,label\n0.png,b\n{path},a\n"))


def test_a_table_without_the_needed_columns_is_refused_with_those_it_has(write_table):
    with pytest.raises(InputError, match="has the columns image, label; needed are path"):
        find_images(write_table("labels.csv", "image,label\n1.png,a\n"))


def test_a_row_with_more_fields_than_the_header_is_refused(write_table):
    with pytest.raises(InputError, match=r"row 2 has more fields than the header; complete the header"):
        find_images(write_table("labels.csv", "path,label\n1.png,a\n2.png,b,train\n"))


def test_an_unknown_split_is_refused_with_its_row(write_table):
    with pytest.raises(InputError, match=r"row 2: split 'holdout' is unknown; use train, val or test"):
        find_images(write_table("labels.csv", "path,label,split\n1.png,a,train\n2.png,b,holdout\n"))


def test_an_image_that_is_named_twice_is_refused(write_table):
    with pytest.raises(InputError, match=r"names 'x/1\.png' more than once"):
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


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "images.parquet", "images.tar"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=name):
        find_images(str(tmp_path / name))


@pytest.mark.parametrize("name", ["images.parquet", "images.tar"])
def test_a_damaged_container_is_refused(write_table, name):
    with pytest.raises(InputError, match=name):
        find_images(write_table(name, "not what the name says" * 100))


def write_parquet(path: Path, labels: list, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": str(label).encode(), "path": None} for label in labels]
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), path)


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
    with pytest.raises(InputError, match="has the columns image, text; needed are image, label"):
        find_images(str(tmp_path / "images.parquet"))


def test_a_row_of_a_parquet_file_without_a_label_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "label": ["a", "b", None]}), tmp_path / "images.parquet")
    with pytest.raises(InputError, match=r"images\.parquet.*label"):
        find_images(str(tmp_path / "images.parquet"))


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_a_tar_has_images_beside_their_labels(tmp_path):
    members = {
        "0.jpg": b"first",
        "0.cls": b"dog\n",
        "x/1.seg.jpg": b"mask",
        "x/1.png": b"second!",
        "x/1.json": json.dumps({"label": "cat", "caption": "a cat"}).encode(),
    }
    source = write_tar(tmp_path / "shard.tar", members)
    found = find_images(source)
    assert found.class_names == ["cat", "dog"]
    assert rows_of(source, "path", "label", "bytes") == [("shard.tar#0.jpg", 1, 5), ("shard.tar#x/1.png", 0, 7)]
    assert ignored_in(source) == {"shard.tar#x/1.seg.jpg": "not_an_image_name"}
    content = Path(source).read_bytes()
    assert [content[offset : offset + size] for offset, size in rows_of(source, "offset", "bytes")] == [
        b"first",
        b"second!",
    ]


def test_an_image_of_a_tar_without_a_label_is_ignored(tmp_path):
    members = {"0.jpg": b"", "0.cls": b"a", "1.jpg": b"", "1.cls": b"b", "2.jpg": b"", "3.jpg": b"", "3.json": b"{}"}
    assert ignored_in(write_tar(tmp_path / "shard.tar", members)) == {
        "shard.tar#2.jpg": "no_label",
        "shard.tar#3.jpg": "no_label",
    }


def test_a_second_image_of_a_key_is_listed(tmp_path):
    source = write_tar(tmp_path / "shard.tar", {"0.jpg": b"", "0.cls": b"a", "0.png": b"", "1.jpg": b"", "1.cls": b"b"})
    assert ignored_in(source) == {"shard.tar#0.png": "second_image_of_its_key"}


@pytest.mark.parametrize(
    ("name", "content"), [("0.json", b'{"label": '), ("0.json", b"[1]"), ("0.json", b"\xff"), ("0.cls", b"\xff")]
)
def test_a_label_of_a_tar_that_cannot_be_read_is_refused_and_named(tmp_path, name, content):
    with pytest.raises(InputError, match=rf"shard\.tar#{name} cannot be read as a label: .*; mend it or remove it"):
        find_images(write_tar(tmp_path / "shard.tar", {"0.jpg": b"", name: content}))


def test_tars_take_their_split_from_their_name(tmp_path):
    members = {"0.jpg": b"", "0.cls": b"a", "1.jpg": b"", "1.cls": b"b"}
    for path in ("train/0.tar", "val-000.tar"):
        write_tar(tmp_path / "shards" / path, members)
    assert set(rows_of(str(tmp_path / "shards"), "container", "split")) == {
        ("train/0.tar", "train"),
        ("val-000.tar", "val"),
    }


def test_tfrecord_files_are_refused_with_what_to_do(write_files):
    with pytest.raises(InputError, match="TFRecord files are not read; write the images into"):
        find_images(write_files("train.tfrecord"))


def test_the_format_can_be_given(write_files):
    source = write_files("a/1.png", "b/2.png", "labels.csv")
    assert ignored_in(source) == {"labels.csv": "not_in_a_class_folder"}
    with pytest.raises(InputError, match="images of 0 classes"):
        find_images(source, "webdataset")
