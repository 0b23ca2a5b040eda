from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.manifest import SPLITS, read_manifest
from data_prep.prepare import (
    PrepareConfig,
    _check_rejected,
    check_places,
    parse_config,
    prepare,
)
from tests.conftest import read_split, write_stripes
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


def test_a_dataset_prepared_otherwise_is_kept(write_dataset):
    written = write_dataset()
    with pytest.raises(InputError, match=r"image_size is 5, not 7; channels is 1, not 3\).*--overwrite"):
        prepare("/photos", written.uri, PrepareConfig(image_size=7, channels=3))


def test_the_same_preparation_is_not_done_again(write_dataset):
    written = write_dataset()
    config = PrepareConfig(image_size=5, max_bad_fraction=0.5)
    assert check_places("/photos", written.uri, config) == "nothing"
    assert prepare("/photos", written.uri, config) == written.manifest


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"val_fraction": 0.2}, {"test_fraction": 0.0}, {"duplicates": "exact"}]
)
def test_other_splits_need_neither_the_source_nor_pixels(write_dataset, change):
    written, config = write_dataset(rows=(70, 10, 10)), PrepareConfig(image_size=5, **change)
    assert check_places("/photos", written.uri, config) == "draw"
    manifest = prepare("/photos", written.uri, config)
    assert {name: getattr(manifest, name) for name in change} == change
    assert (manifest.shards, manifest.class_names) == (written.manifest.shards, written.manifest.class_names)
    assert read_manifest(written.uri) == manifest
    rows = {split: read_split(written.uri, split) for split in SPLITS}
    assert {split: len(of_split) for split, of_split in rows.items()} == {
        split: described.rows for split, described in manifest.splits.items()
    }
    train = np.stack(rows["train"]["image"]).astype(np.float64)
    np.testing.assert_allclose([manifest.pixel_mean, manifest.pixel_std], [[train.mean()], [train.std()]])
    former = prepare("/photos", written.uri, PrepareConfig(image_size=5))
    prepare("/photos", written.uri, config)
    assert prepare("/photos", written.uri, PrepareConfig(image_size=5)) == former
    assert former.fingerprint != manifest.fingerprint or change == {"duplicates": "exact"}


def test_what_changes_pixels_or_was_prepared_elsewhere_does_not_draw(write_dataset):
    written = write_dataset()
    for source, config in (("/others", {"image_size": 5}), ("/photos", {"image_size": 5, "resize": "pad"})):
        with pytest.raises(InputError, match=r"prepared differently .*--overwrite"):
            check_places(source, written.uri, PrepareConfig(seed=1, **config))


def test_new_images_are_appended_with_the_same_options_only(write_dataset, tmp_path):
    written = write_dataset()
    with pytest.raises(InputError, match=r"seed is 0, not 1.*--append adds what is new in the same SOURCE"):
        check_places("/photos", written.uri, PrepareConfig(image_size=5, seed=1), append=True)
    with pytest.raises(InputError, match="SOURCE /photos does not exist"):
        check_places("/photos", written.uri, PrepareConfig(image_size=5), append=True)


def check_rejected(of_class: list[tuple[int, int]], max_bad_fraction: float, names: str = "{}.heic") -> None:
    """Check classes a, b, ... of which so many images were kept, and so many files rejected."""
    kept = [label for label, (count, _) in enumerate(of_class) for _ in range(count)]
    lost = [label for label, (_, count) in enumerate(of_class) for _ in range(count)]
    rejected = pa.table(
        {
            "path": [names.format(row) for row in range(len(lost))],
            "label": pa.array(lost, pa.int32()),
            "reason": ["not_an_image"] * len(lost),
            "number": pa.array([0] * len(lost), pa.int32()),
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


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["README.md", "rejected.parquet", "index.parquet", "shards/00000-0a1b2c3d.arrow"])
def test_what_no_preparation_wrote_is_not_replaced(tmp_path, name, overwrite):
    own = tmp_path / "photos" / name
    own.parent.mkdir(parents=True)
    own.write_text("my own")
    Image.new("L", (8, 8)).save(tmp_path / "cat.png")
    with pytest.raises(InputError, match=rf"photos contains {name}, which no preparation wrote"):
        prepare(str(tmp_path / "cat.png"), str(own.parents[name.count("/")]), parse_config(), overwrite=overwrite)
    assert own.read_text() == "my own"
