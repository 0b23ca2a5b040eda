import os
from pathlib import Path

import pytest

from data_prep.sources import find_images
from tests.sources import ignored_in, rows_of, write_parquet, write_tar
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def test_hidden_files_and_folders_are_passed_over(write_files):
    visible, hidden = ("a/1.png", "b/2.png"), ("a/.3.png", ".cache/4.png", "a/.thumbs/5.png")
    left_behind = ("__MACOSX/a/1.png", "a/@eaDir/1.png", "a/Thumbs.db", "b/Thumbs.db", "b/desktop.ini", "b/.DS_Store")
    source = write_files(*visible, *hidden, *left_behind)
    assert rows_of(source, "path") == [("a/1.png",), ("b/2.png",)]
    assert ignored_in(source) == {}
    assert str(find_images(source).listed) == (
        "2 files to read, 2 classes; ignored: 3 hidden, 2 Thumbs.db, 1 .DS_Store, 1 @eaDir, 1 __MACOSX, 1 desktop.ini"
    )


def test_where_only_hidden_files_are_they_are_counted(write_files):
    with pytest.raises(InputError, match=r"no files found but 2 hidden, 1 Thumbs\.db; give"):
        find_images(write_files(".a/1.png", ".a/2.png", "a/Thumbs.db"))


def test_names_may_have_spaces_and_any_letters(write_files):
    source = write_files("grüne Äpfel/foto 1 (copy).png", "яблоки/#2 100%.png")
    assert rows_of(source, "path") == [("grüne Äpfel/foto 1 (copy).png",), ("яблоки/#2 100%.png",)]
    assert find_images(source).class_names == ["grüne Äpfel", "яблоки"]


@pytest.mark.parametrize(
    "name", ["1.JPEG", "1.jfif", "1.jpe", "1.pgm", "1.avif", "1.heic", "1.dcm", "1", "1.5", "a.b.x"]
)
def test_a_file_is_tried_whatever_its_name_says(write_files, name):
    source = write_files(f"a/{name}", "b/2.png")
    assert rows_of(source, "path", "label") == [(f"a/{name}", 0), ("b/2.png", 1)]
    assert not find_images(source).listed.is_notable


def test_other_files_are_listed_with_the_reason(write_files):
    source = write_files("a/1.png", "b/2.png", "a/labels.txt", "b/LICENSE", "stray.png", "README.md")
    assert ignored_in(source) == {
        "a/labels.txt": "not_an_image_name",
        "b/LICENSE": "not_an_image_name",
        "stray.png": "not_in_a_class_folder",
        "README.md": "not_in_a_class_folder",
    }


def test_a_name_that_is_not_utf8_costs_that_file(write_files):
    source = write_files("a/1.png", "b/2.png")
    Path(os.fsdecode(os.fsencode(source) + b"/a/caf\xe9.png")).touch()
    Path(os.fsdecode(os.fsencode(source) + b"/a/caf\xe9.txt")).touch()
    assert rows_of(source, "path") == [("a/1.png",), ("b/2.png",)]
    assert ignored_in(source) == {"a/caf\\udce9.png": "name_is_not_utf8", "a/caf\\udce9.txt": "not_an_image_name"}


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(InputError, match=f"{name}: no files found"):
            find_images(str(tmp_path / name))


def test_a_single_class_is_refused_and_named(write_files):
    with pytest.raises(InputError, match=r"images of 1 class \(a\); at least two are required"):
        find_images(write_files("a/1.png", "a/2.png"))


def test_a_folder_without_images_is_refused(write_files):
    with pytest.raises(InputError, match=r"images of 0 classes \(none\), not used not_an_image_name: 2;"):
        find_images(write_files("a/1.txt", "b/2.txt"))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks_is_refused(write_files, split):
    with pytest.raises(InputError, match=f"{split} has classes that train does not have: c, d;"):
        find_images(write_files("train/a/1.png", "train/b/2.png", f"{split}/d/3.png", f"{split}/c/4.png"))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="not a known kind of URI"):
        find_images("gs://bucket/images")


def test_suffixes_may_be_in_upper_case(tmp_path, write_table):
    assert rows_of(write_table("LABELS.CSV", "path,label\nx/1.png,a\nx/2.png,b\n"), "path")[0] == ("x/1.png",)
    write_parquet(tmp_path / "hub" / "A.PARQUET", ["b", "a"])
    assert rows_of(str(tmp_path / "hub"), "label", "container") == [(1, "A.PARQUET"), (0, "A.PARQUET")]
    members = {"0.JPG": b"", "0.CLS": b"a", "1.jpg": b"", "1.JSON": b'{"label": "b"}'}
    assert rows_of(write_tar(tmp_path / "X.TAR", members), "path") == [("X.TAR#0.JPG",), ("X.TAR#1.jpg",)]


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "images.parquet", "images.tar"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=name):
        find_images(str(tmp_path / name))


@pytest.mark.parametrize("name", ["images.parquet", "images.tar"])
def test_a_damaged_container_is_refused(write_table, name):
    with pytest.raises(InputError, match=name):
        find_images(write_table(name, "not what the name says" * 100))


def test_the_format_can_be_given(write_files):
    source = write_files("a/1.png", "b/2.png", "labels.csv")
    assert ignored_in(source) == {"labels.csv": "not_in_a_class_folder"}
    with pytest.raises(InputError, match="images of 0 classes"):
        find_images(source, "webdataset")


def test_classes_that_are_whole_numbers_are_in_their_order(write_files):
    source = write_files(*(f"{name}/{name}.png" for name in (10, 0, 2, "02", 11)))
    assert find_images(source).class_names == ["0", "02", "2", "10", "11"]
    assert dict(rows_of(source, "path", "label"))["10/10.png"] == 3


def test_a_table_beside_folders_of_images_is_named_and_not_used(write_files):
    source = write_files("a/1.png", "b/2.png", "metadata.csv", "b/notes.txt")
    assert find_images(source).class_names == ["a", "b"]
    assert str(find_images(source).listed) == (
        "2 files to read, 2 classes; not images by name: 1 .txt; classes come from the folders, not from metadata.csv"
    )


@pytest.mark.parametrize("files", [("1.png", "2.png"), ("images/1.png", "images/2.png"), ("train/1.png", "test/2.png")])
def test_where_folders_are_no_classes_the_table_beside_them_is_proposed(write_files, files):
    with pytest.raises(InputError, match=r"if metadata\.csv is a table of paths and labels, give it as SOURCE$"):
        find_images(write_files("metadata.csv", *files))


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("pets", "below pets, give {}/pets"),
        ("x/y", "below x/y, give {}/x/y"),
        ("train/pets", "below pets, move them up"),
    ],
)
def test_classes_one_folder_further_down_are_noticed(write_files, place, advice):
    source = write_files(f"{place}/cat/1.png", f"{place}/dog/2.png")
    advice = advice.format(source)
    with pytest.raises(InputError, match=f"images of 1 class .*; if the classes are cat, dog, {advice}$"):
        find_images(source)


@pytest.mark.parametrize("name", ["photo.png", "photo.jfif", "photo", "photo.xyz"])
def test_one_image_is_a_source_without_labels(tmp_path, name):
    (tmp_path / name).write_bytes(b"12345")
    found = find_images(str(tmp_path / name), labelled=False)
    assert found.images.select(["path", "label", "bytes"]).to_pylist() == [{"path": name, "label": None, "bytes": 5}]


@pytest.mark.parametrize("name", ["missing.png", "missing"])
def test_an_image_that_is_not_there_is_no_source(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: no files found"):
        find_images(str(tmp_path / name), labelled=False)


def test_without_an_image_the_other_files_are_counted(write_files):
    with pytest.raises(InputError, match="no images found, not used not_an_image_name: 2; give images"):
        find_images(write_files("a/1.txt", "2.md"), labelled=False)


def test_an_object_is_a_source_and_an_empty_one_with_the_name_of_a_folder_is_none(bucket):
    for name in ("photos/a/1.jfif", "photos/b/2"):
        storage.write_bytes(f"{bucket}/{name}", b"12345")
    for name in ("photos/a", "photos/c", "photos"):
        storage.write_bytes(f"{bucket}/{name}", b"")
    found = find_images(f"{bucket}/photos")
    assert found.images["path"].to_pylist() == ["a/1.jfif", "b/2"]
    assert found.ignored.to_pylist() == [{"path": "c", "reason": "not_in_a_class_folder"}]
    assert find_images(f"{bucket}/photos/b/2", labelled=False).images["path"].to_pylist() == ["2"]
    with pytest.raises(InputError, match="b/3: no files found"):
        find_images(f"{bucket}/photos/b/3", labelled=False)
