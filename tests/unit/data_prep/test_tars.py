import io
import json
import tarfile
from pathlib import Path

import pytest

from data_prep.sources import find_images
from tests.sources import ignored_in, rows_of, write_tar
from trainer.runtime.errors import InputError


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
    with pytest.raises(InputError, match=rf"shard\.tar#{name} cannot be read as a label: .*; fix it or remove it"):
        find_images(write_tar(tmp_path / "shard.tar", {"0.jpg": b"", name: content}))


def test_tars_take_their_split_from_their_name(tmp_path):
    members = {"0.jpg": b"", "0.cls": b"a", "1.jpg": b"", "1.cls": b"b"}
    for path in ("train/0.tar", "val-000.tar"):
        write_tar(tmp_path / "shards" / path, members)
    assert set(rows_of(str(tmp_path / "shards"), "container", "split")) == {
        ("train/0.tar", "train"),
        ("val-000.tar", "val"),
    }


def test_a_member_of_any_other_name_is_tried_where_none_has_that_of_an_image(tmp_path):
    members = {"0.heic": b"", "0.txt": b"a caption", "0.cls": b"10", "1.emb": b"", "1.jpeg": b"", "1.cls": b"9"}
    source = write_tar(tmp_path / "shard.tar", members)
    assert rows_of(source, "path") == [("shard.tar#0.heic",), ("shard.tar#1.jpeg",)]
    assert ignored_in(source) == {"shard.tar#0.txt": "not_an_image_name", "shard.tar#1.emb": "not_an_image_name"}
    assert find_images(source).class_names == ["9", "10"]


def test_a_class_of_which_no_sample_has_an_image_is_refused(tmp_path):
    members = {"0.png": b"", "0.cls": b"a", "1.png": b"", "1.cls": b"b", "2.txt": b"", "2.cls": b"c", "3.cls": b"c"}
    with pytest.raises(InputError, match=r"no image in 1 of 3 classes: c \(2 \.cls, 1 \.txt\)"):
        find_images(write_tar(tmp_path / "shard.tar", members))


def test_what_systems_leave_behind_is_passed_over_and_counted(tmp_path):
    members = {"0.png": b"", "0.cls": b"a", "1.png": b"", "1.cls": b"b", "._1.png": b"", "__MACOSX/._0.png": b""}
    source = write_tar(tmp_path / "shard.tar", members)
    assert ignored_in(source) == {}
    assert find_images(source).listed.left_behind == "1 __MACOSX, 1 hidden"


@pytest.mark.parametrize("folder", ["", "./", "pets/", "./a/b/"])
def test_tars_without_labels_are_read_like_the_folder_that_they_were_made_of(tmp_path, folder):
    # The names are those of Kaggle's dogs-vs-cats: in WebDataset the key of each would end at its first dot.
    members = {f"{folder}{kind}/{kind}.{number}.jpg": b"" for kind in ("cat", "dog") for number in range(2)}
    source = write_tar(tmp_path / "pets.tar", members | {f"{folder}cat/note.txt": b""})
    inner = folder.removeprefix("./")
    assert rows_of(source, "path", "label", "split", "container") == [
        (f"pets.tar#{inner}cat/cat.0.jpg", 0, None, "pets.tar"),
        (f"pets.tar#{inner}cat/cat.1.jpg", 0, None, "pets.tar"),
        (f"pets.tar#{inner}dog/dog.0.jpg", 1, None, "pets.tar"),
        (f"pets.tar#{inner}dog/dog.1.jpg", 1, None, "pets.tar"),
    ]
    assert ignored_in(source) == {f"pets.tar#{inner}cat/note.txt": "not_an_image_name"}


def test_a_tar_of_split_folders_has_splits(tmp_path):
    members = {f"pets/{split}/{kind}/{kind}.0.jpg": b"" for split in ("train", "val") for kind in ("cat", "dog")}
    source = write_tar(tmp_path / "pets.tar", members)
    assert rows_of(source, "label", "split") == [(0, "train"), (1, "train"), (0, "val"), (1, "val")]


def test_several_tars_without_labels_are_one_folder(tmp_path):
    write_tar(tmp_path / "pets" / "train-0.tar", {"cat/1.jpg": b"", "cat/2.jpg": b""})
    write_tar(tmp_path / "pets" / "train-1.tar", {"dog/1.jpg": b""})
    write_tar(tmp_path / "pets" / "val-0.tar", {"dog/1.jpg": b""})
    assert rows_of(str(tmp_path / "pets"), "label", "split") == [(0, "train"), (0, "train"), (1, "train"), (1, "val")]


def test_a_tar_without_classes_says_how_to_give_them(tmp_path):
    source = write_tar(tmp_path / "train.tar", {"train/cat.0.jpg": b"", "train/dog.0.jpg": b""})
    with pytest.raises(InputError, match=r"not_in_a_class_folder: 2; .*give a table with the columns path and label"):
        find_images(source)


def test_a_dotted_name_has_the_label_beside_it(tmp_path):
    members = {
        "cat.0.jpg": b"",
        "cat.0.cls": b"cat",
        "dog.0.jpg": b"",
        "dog.0.json": b'{"label": "dog"}',
        "x.0.jpg": b"",
    }
    source = write_tar(tmp_path / "pets.tar", members)
    assert rows_of(source, "path", "label") == [("pets.tar#cat.0.jpg", 0), ("pets.tar#dog.0.jpg", 1)]
    assert ignored_in(source) == {"pets.tar#x.0.jpg": "no_label"}


def test_other_data_of_a_key_is_no_label(tmp_path):
    members = {"0.jpg": b"", "0.cls": b"a", "0.seg.json": b"[[0, 1]]", "1.jpg": b"", "1.cls": b"b", "1.seg.cls": b"c"}
    source = write_tar(tmp_path / "shard.tar", members)
    assert rows_of(source, "path", "label") == [("shard.tar#0.jpg", 0), ("shard.tar#1.jpg", 1)]


def test_of_two_members_with_one_name_the_later_counts(tmp_path):
    source = tmp_path / "shard.tar"
    write_tar(source, {"0.jpg": b"old", "0.cls": b"a", "1.jpg": b"", "1.cls": b"b"})
    with tarfile.open(source, "a") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = 6
        tar.addfile(member, io.BytesIO(b"newest"))
    ((offset, size), _) = rows_of(str(source), "offset", "bytes")
    assert source.read_bytes()[offset : offset + size] == b"newest"
