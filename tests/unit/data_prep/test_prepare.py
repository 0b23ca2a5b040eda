from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.prepare import (
    PrepareConfig,
    _check_rejected,
    _check_val,
    _open_staging,
    _write_part,
    check_places,
    parse_config,
    prepare,
)
from data_prep.shards import STAGED_SCHEMA, write_chunk
from data_prep.sources import find_images
from tests.conftest import write_stripes
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def test_defaults_are_those_of_the_notes():
    config = parse_config()
    assert (config.image_size, config.channels, config.val_fraction, config.test_fraction) == (250, 1, 0.15, 0.15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "--image-size 0: "),
        ({"channels": 2}, "--channels 2: "),
        ({"val_fraction": 0}, "--val-fraction 0: "),
        ({"test_fraction": 1}, "--test-fraction 1: "),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction 1.5: "),
        ({"resize": "stretch"}, "--resize stretch: "),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_option(values, message):
    with pytest.raises(InputError, match=message):
        parse_config(**values)


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(InputError, match=r"--val-fraction 0.5 and --test-fraction 0.5 leave no image to train on"):
        parse_config(val_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize("dataset", ["", "prepared", "a/b"])
def test_a_dataset_inside_its_source_is_refused(tmp_path, dataset):
    with pytest.raises(InputError, match="is inside SOURCE"):
        prepare(str(tmp_path), str(tmp_path / dataset), PrepareConfig(), overwrite=True)


@pytest.mark.parametrize("source", ["train", "labels.csv"])
def test_a_source_inside_its_dataset_is_refused(tmp_path, source):
    with pytest.raises(InputError, match=r"SOURCE .* is inside DATASET"):
        prepare(str(tmp_path / source), str(tmp_path), PrepareConfig(), overwrite=True)


def test_a_source_that_cannot_be_used_deletes_nothing(write_dataset, tmp_path):
    written = write_dataset()
    before = sorted(path for path in Path(written.uri).rglob("*") if path.is_file())
    with pytest.raises(InputError, match="does not exist"):
        prepare(str(tmp_path / "missing"), written.uri, PrepareConfig(), overwrite=True)
    assert sorted(path for path in Path(written.uri).rglob("*") if path.is_file()) == before


def test_a_bucket_that_is_not_there_is_refused_on_either_side(bucket, tmp_path):
    write_stripes(tmp_path / "images", images_per_class=1)
    for places in ((str(tmp_path / "images"), "s3://missing/prepared"), ("s3://missing/images", str(tmp_path / "out"))):
        with pytest.raises(InputError, match=r"bucket 'missing' at .* answered 'no such bucket'"):
            check_places(*places, PrepareConfig())


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"SOURCE .*/images does not exist; give a folder"):
        check_places(str(tmp_path / "images"), str(tmp_path / "prepared"), PrepareConfig())
    assert not (tmp_path / "prepared").exists()


def test_staged_images_that_were_damaged_are_not_written(tmp_path):
    row = {"path": "a.png", "label": 0, "pixels_sha256": "of other pixels"}
    uri = str(tmp_path / "chunk-000000")
    write_chunk(uri, np.zeros((1, 4, 4, 1), np.uint8), pa.Table.from_pylist([row], schema=STAGED_SCHEMA))
    with pytest.raises(InputError, match="staged images are damaged; decode them again with --overwrite"):
        _write_part({"part": 0, "uris": [uri], "splits": ["train"]}, str(tmp_path))
    assert not (tmp_path / "train").exists()


def test_a_task_of_a_killed_preparation_cannot_write_into_the_next_one(write_files, tmp_path):
    found = find_images(write_files("cat/a.png", "dog/b.png"))
    dataset = str(tmp_path / "prepared")
    killed = _open_staging(dataset, found, PrepareConfig(image_size=5))
    storage.write_bytes(storage.join(killed, "chunk-000000.rows.parquet"), b"of 5 pixels")
    other = _open_staging(dataset, found, PrepareConfig(image_size=7))
    assert not storage.find_files(killed)
    # The task goes on.
    storage.write_bytes(storage.join(killed, "chunk-000000.rows.parquet"), b"of 5 pixels")
    assert not storage.find_files(other)


def test_an_interrupted_preparation_keeps_its_chunks_but_not_its_data_files(write_files, tmp_path):
    found = find_images(write_files("cat/a.png", "dog/b.png"))
    dataset = str(tmp_path / "prepared")
    chunk = storage.join(_open_staging(dataset, found, PrepareConfig(seed=0)), "chunk-000000.rows.parquet")
    storage.write_bytes(chunk, b"rows")
    for name in ("part-00000.parquet", "own.txt"):
        storage.write_bytes(storage.join(dataset, "train", name), b"rows")
    # Another seed draws other splits from the same chunks.
    assert chunk.startswith(_open_staging(dataset, found, PrepareConfig(seed=1)))
    assert storage.exists(chunk)
    assert set(storage.find_files(storage.join(dataset, "train"))) == {"own.txt"}
    more = find_images(write_files("cat/a.png", "dog/b.png", "dog/c.png"))
    assert not chunk.startswith(_open_staging(dataset, more, PrepareConfig(seed=1)))
    assert not storage.exists(chunk)


def test_a_dataset_prepared_otherwise_is_kept(write_dataset):
    written = write_dataset()
    with pytest.raises(InputError, match=r"image_size is 5, not 7; channels is 1, not 3\).*--overwrite"):
        prepare("/photos", written.uri, PrepareConfig(image_size=7, channels=3))


def test_the_same_preparation_is_not_done_again(write_dataset):
    written = write_dataset()
    config = PrepareConfig(image_size=5, max_bad_fraction=0.5)
    assert prepare("/photos", written.uri, config) == written.manifest


def check_rejected(of_class: list[tuple[int, int]], max_bad_fraction: float, names: str = "{}.heic") -> None:
    """Check classes a, b, ... of which so many images were kept, and so many files rejected."""
    kept = [label for label, (count, _) in enumerate(of_class) for _ in range(count)]
    lost = [label for label, (_, count) in enumerate(of_class) for _ in range(count)]
    rejected = pa.table(
        {
            "path": [names.format(row) for row in range(len(lost))],
            "label": pa.array(lost, pa.int32()),
            "reason": ["not_an_image"] * len(lost),
            "chunk": pa.array([0] * len(lost), pa.int32()),
        }
    )
    config = PrepareConfig(max_bad_fraction=max_bad_fraction)
    _check_rejected("/nowhere", pa.table({"label": pa.array(kept, pa.int32())}), rejected, ["a", "b", "c"], config)


def test_as_many_rejected_files_as_allowed_are_no_error():
    check_rejected([(99, 1), (50, 0), (50, 0)], max_bad_fraction=0.005)
    with pytest.raises(InputError, match=r"2 of 200 images were rejected \(1.0%, allowed: 0.5%\): 0.heic \(not_an_i"):
        check_rejected([(98, 2), (50, 0), (50, 0)], max_bad_fraction=0.005)


def test_a_class_may_lose_half_of_its_files_but_no_more():
    check_rejected([(990, 0), (5, 5), (5, 5)], max_bad_fraction=0.02)
    with pytest.raises(
        InputError, match=r"lost most of their files: b 6 of 10 \(6 \.heic\); .*raise --max-bad-fraction$"
    ):
        check_rejected([(990, 0), (4, 6), (5, 4)], max_bad_fraction=0.02)


def test_a_class_may_lose_more_where_more_of_all_is_allowed():
    check_rejected([(99, 0), (1, 9), (1, 9)], max_bad_fraction=0.9)


def test_a_class_that_lost_all_its_files_is_an_error_in_any_case():
    with pytest.raises(
        InputError, match=r"b 8 of 8 \(8 without suffix\), c 2 of 2 .* remove the classes that have no image left$"
    ):
        check_rejected([(1, 1), (0, 8), (0, 2)], max_bad_fraction=1, names="{}")


@pytest.mark.parametrize(
    ("counts", "splits", "message"),
    [
        ([1, 1], [None, None], "the smallest class has 1 image, the largest 1; .* a class needs 4, .*; add images$"),
        (
            [1, 3],
            [None] * 4,
            "smallest class has 1 image, the largest 3; .* needs 4, .*or give a larger --val-fraction$",
        ),
        ([2, 2], ["train", "test"] * 2, r"class has 1 image, the largest 1; .*--test-fraction 0 a class needs 4,"),
    ],
)
def test_where_no_image_is_left_for_val_is_said_how_many_are_needed(counts, splits, message):
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = pa.table({"label": labels, "split": pa.array(splits, pa.string())})
    with pytest.raises(InputError, match=message):
        _check_val(images, [split or "train" for split in splits], PrepareConfig())


def test_one_image_for_val_is_enough():
    images = pa.table({"label": pa.array([0, 1], pa.int32()), "split": pa.array([None, None], pa.string())})
    _check_val(images, ["train", "val"], PrepareConfig())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["README.md", "rejected.parquet", "contact_sheet.png", "train/part-00000.parquet"])
def test_what_no_preparation_wrote_is_not_replaced(tmp_path, name, overwrite):
    own = tmp_path / "photos" / name
    own.parent.mkdir(parents=True)
    own.write_text("my own")
    Image.new("L", (8, 8)).save(tmp_path / "cat.png")
    with pytest.raises(InputError, match=rf"photos contains {name}, which no preparation wrote"):
        prepare(str(tmp_path / "cat.png"), str(own.parents[name.count("/")]), parse_config(), overwrite=overwrite)
    assert own.read_text() == "my own"
