import hashlib

import numpy as np
import pyarrow as pa
import pytest

from data_prep.columns import name_splits
from data_prep.index import draw_splits
from data_prep.manifest import INDEX_SCHEMA
from trainer.runtime.errors import InputError


def make_images(labels: list[int], given=None, pixels=None, splits=None) -> pa.Table:
    """Returns the rows of images; equal pixels are duplicates."""
    count = len(labels)
    digests = [hashlib.sha256(str(one).encode()).digest() for one in (pixels or range(count))]
    columns = {
        "label": labels,
        "path": [f"{row}.png" for row in range(count)],
        "pixels_sha256": digests,
        "perceptual_hash": digests,
        "given_split": given or [None] * count,
        "split": splits or [None] * count,
    }
    return pa.table({name: pa.array(column, INDEX_SCHEMA.field(name).type) for name, column in columns.items()})


def draw(images: pa.Table, *args, **kwargs) -> list[str]:
    return name_splits(draw_splits(images, *args, **kwargs)[0]).to_pylist()


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
    images = make_images(labels.tolist(), splits)
    with pytest.raises(InputError, match=message):
        draw_splits(images, "near", 0.15, 0.15, seed=0)


def test_one_image_for_val_is_enough():
    splits = draw(make_images([0] * 4 + [1]), "near", 0.25, 0.25, seed=0)
    assert sorted(splits) == ["test", "train", "train", "train", "val"]


def test_images_that_have_a_split_keep_it_and_the_others_are_drawn_by_themselves():
    old = ["val"] * 8 + ["train"] * 2
    splits = draw(make_images([0] * 30, splits=old + [None] * 20), "near", 0.2, 0.1, seed=0)
    assert splits[:10] == old
    assert sorted(splits[10:]) == ["test"] * 2 + ["train"] * 14 + ["val"] * 4


@pytest.mark.parametrize("rule", ["near", "exact"])
def test_a_new_duplicate_of_an_old_image_takes_its_split(rule):
    pixels = [*range(10), 3, 9, 3, *range(10, 20)]
    old = ["train"] * 3 + ["test"] + ["train"] * 5 + ["val"]
    images = make_images([0] * 23, pixels=pixels, splits=old + [None] * 13)
    splits = draw(images, rule, 0.2, 0.0, seed=0)
    assert splits[10:13] == ["test", "val", "test"]
    assert splits[13:].count("val") == 2


@pytest.mark.parametrize("old", [["val", "train"], ["train", "val"], ["test", "val", "train"]])
def test_a_new_duplicate_of_old_images_in_several_splits_takes_that_of_the_first(old):
    images = make_images([0] * (len(old) + 2), pixels=[0] * (len(old) + 2), splits=[None, *old, None])
    assert draw(images, "exact", 0.2, 0.2, seed=0) == [old[0], *old, old[0]]


def test_the_rule_decides_what_stays_together():
    near = np.zeros((2, 32), np.uint8)
    near[:, :30] = 255
    near[1, 0] = 127
    images = make_images([0] * 42)
    hashes = [*images["perceptual_hash"].to_pylist()[:40], *(one.tobytes() for one in near)]
    images = images.set_column(3, "perceptual_hash", pa.array(hashes, pa.binary(32)))
    for rule, together in (("near", True), ("exact", False)):
        groups = draw_splits(images, rule, 0.2, 0.2, seed=0)[1]
        assert (groups[40] == groups[41]) == together
