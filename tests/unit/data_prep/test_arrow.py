import json
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.contents import read_contents
from data_prep.sources import find_images
from tests.sources import ignored_in, rows_of
from trainer.runtime.errors import InputError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def save(path: Path, images: list[dict], labels: list, names: list[str] | None = None, options=None, **columns) -> Path:
    """Writes a file as `datasets.Dataset.save_to_disk` does: a stream, in batches, that declares its features."""
    label = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "string"}
    features = {"image": {"_type": "Image"}, "label": label}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": pa.array(images, IMAGE), "label": labels, **columns}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def picture(text: str) -> dict:
    return {"bytes": text.encode(), "path": f"{text}.png"}


@pytest.fixture
def saved(tmp_path) -> str:
    """A Hugging Face dataset of two splits."""
    names = ["dog", "cat"]
    save(tmp_path / "hf" / "train" / "data-00000-of-00001.arrow", [picture(t) for t in "abc"], [0, 1, 1], names)
    save(tmp_path / "hf" / "test" / "data-00000-of-00001.arrow", [picture("de"), picture("")], [0, -1], names)
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
        (tmp_path / "hf" / name).write_text("{}")
    return str(tmp_path / "hf")


def test_a_dataset_saved_to_disk_is_found_with_its_splits_and_the_order_of_its_classes(saved):
    found = find_images(saved)
    assert found.class_names == ["dog", "cat"]
    assert rows_of(saved, "path", "label", "split") == [
        ("test/data-00000-of-00001.arrow#00000000", 0, "test"),
        ("train/data-00000-of-00001.arrow#00000000", 0, "train"),
        ("train/data-00000-of-00001.arrow#00000001", 1, "train"),
        ("train/data-00000-of-00001.arrow#00000002", 1, "train"),
    ]
    assert ignored_in(saved)["test/data-00000-of-00001.arrow#00000001"] == "no_label"
    assert ignored_in(saved)["train/state.json"] == "not_an_arrow_file"


def test_the_bytes_of_an_image_are_read_from_within_the_file(saved):
    assert list(read_contents(saved, find_images(saved).images)) == [b"de", b"a", b"b", b"c"]


def test_a_random_access_file_of_plain_bytes_is_read_too(tmp_path):
    images = pa.array([b"one", b"two", b"three"], pa.large_binary())
    table = pa.table({"image": images, "label": ["x", "y", "x"], "split": ["val", "train", "train"]})
    with pa.ipc.new_file(tmp_path / "images.arrow", table.schema) as writer:
        writer.write_table(table)
    source = str(tmp_path / "images.arrow")
    assert rows_of(source, "label", "split") == [(0, "val"), (1, "train"), (0, "train")]
    assert list(read_contents(str(tmp_path), find_images(source).images)) == [b"one", b"two", b"three"]


def test_the_split_can_be_a_word_of_the_name(tmp_path):
    save(tmp_path / "digits-train.arrow", [picture("a"), picture("b")], ["x", "y"])
    assert rows_of(str(tmp_path), "split") == [("train",), ("train",)]


def test_an_image_that_is_only_a_path_is_left_out(tmp_path):
    save(tmp_path / "d.arrow", [picture("a"), {"bytes": None, "path": "/b.png"}, picture("c")], ["x", "y", "y"])
    assert rows_of(str(tmp_path), "path") == [("d.arrow#00000000",), ("d.arrow#00000002",)]
    assert ignored_in(str(tmp_path)) == {"d.arrow#00000001": "bytes_are_elsewhere"}


def test_a_compressed_file_is_refused(tmp_path):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    save(tmp_path / "d.arrow", [picture("a" * 500), picture("b" * 500)], ["x", "y"], options=options)
    with pytest.raises(InputError, match="is compressed; write it without compression, or as Parquet"):
        find_images(str(tmp_path))


def test_a_file_without_images_and_a_damaged_one_are_refused(tmp_path):
    table = pa.table({"text": ["x"]})
    with pa.ipc.new_stream(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="has the columns text; required are image and label"):
        find_images(str(tmp_path))
    (tmp_path / "d.arrow").write_bytes(b"no such format")
    with pytest.raises(InputError, match="is damaged, or not of the format that its name says"):
        find_images(str(tmp_path))
