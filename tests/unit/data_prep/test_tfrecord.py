from pathlib import Path

import pytest
import tensorflow as tf

from data_prep.contents import read_contents
from data_prep.sources import find_images
from tests.sources import ignored_in, rows_of
from trainer.runtime.errors import InputError


def feature(value: bytes | int | float) -> tf.train.Feature:
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def write(path: Path, *examples: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            features = tf.train.Features(feature={name: feature(value) for name, value in example.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return path


@pytest.fixture
def digits(tmp_path) -> str:
    """A dataset as TensorFlow Datasets writes it."""
    folder = tmp_path / "digits" / "1.0.0"
    write(folder / "digits-train.tfrecord-00000-of-00002", {"image": b"a", "label": 1}, {"image": b"bb", "label": 0})
    write(folder / "digits-train.tfrecord-00001-of-00002", {"image": b"ccc", "label": 0})
    write(folder / "digits-test.tfrecord-00000-of-00001", {"image": b"d", "label": 1}, {"image": b"e", "label": -1})
    (folder / "label.labels.txt").write_text("two\none\n")
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def test_a_dataset_of_tensorflow_datasets_is_found_with_its_splits_and_the_order_of_its_classes(digits):
    found = find_images(digits)
    assert found.class_names == ["two", "one"]
    assert rows_of(digits, "path", "label", "split", "bytes") == [
        ("digits-test.tfrecord-00000-of-00001#00000000", 1, "test", 1),
        ("digits-train.tfrecord-00000-of-00002#00000000", 1, "train", 1),
        ("digits-train.tfrecord-00000-of-00002#00000001", 0, "train", 2),
        ("digits-train.tfrecord-00001-of-00002#00000000", 0, "train", 3),
    ]
    assert ignored_in(digits) == {
        "dataset_info.json": "not_a_tfrecord_file",
        "digits-test.tfrecord-00000-of-00001#00000001": "no_label",
        "label.labels.txt": "not_a_tfrecord_file",
    }


def test_the_bytes_of_an_image_are_read_from_within_the_file(digits):
    assert list(read_contents(digits, find_images(digits).images)) == [b"d", b"a", b"bb", b"ccc"]


@pytest.mark.parametrize(("name", "split"), [("train-00003-of-00128", "train"), ("all.tfrecords", None)])
def test_names_and_features_of_the_model_garden_are_known(tmp_path, name, split):
    common = {"image/height": 5, "image/score": 0.5, "image/format": b"jpeg"}
    one = {"image/encoded": b"x", "image/class/label": 1, "image/class/text": "Bär".encode(), **common}
    other = {"image/encoded": b"y", "image/class/label": 2, "image/class/text": b"ant", **common}
    source = str(write(tmp_path / name, one, other))
    found = find_images(source)
    assert found.class_names == ["Bär", "ant"]
    assert set(rows_of(source, "split")) == {(split,)}


def test_labels_without_names_are_classes_of_their_own(tmp_path):
    source = str(write(tmp_path / "d.tfrecord", {"image": b"x", "label": 10}, {"image": b"y", "label": 9}))
    assert find_images(source).class_names == ["9", "10"]


def test_images_without_labels_are_found_for_prediction_only(tmp_path):
    source = str(write(tmp_path / "d.tfrecord", {"image": b"x"}))
    assert len(find_images(source, labelled=False).images) == 1
    with pytest.raises(
        InputError, match=r"d.tfrecord, record 0 has the features image; required are an image \(image/enc"
    ):
        find_images(source)


def test_a_file_that_is_cut_off_and_one_of_something_else_are_refused(tmp_path):
    path = write(tmp_path / "d.tfrecord", {"image": b"x" * 100, "label": 1}, {"image": b"y" * 100, "label": 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"is damaged, cut off or compressed at byte {len(whole) // 2}; get the file"):
        find_images(str(path))
    path.write_bytes(b"something that is no record")
    with pytest.raises(InputError, match="is damaged, cut off or compressed at byte 0"):
        find_images(str(path))
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"\xff\xff no example")
    with pytest.raises(InputError, match="record 0 is not a tf"):
        find_images(str(path))
