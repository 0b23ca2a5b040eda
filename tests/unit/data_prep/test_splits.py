import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from data_prep.columns import name_splits
from data_prep.splits import assign_splits, least_class_size


def digest_of(pixels) -> bytes:
    return hashlib.sha256(str(pixels).encode()).digest()


def table(labels, digests=None, splits=None) -> pa.Table:
    digests = range(len(labels)) if digests is None else digests
    return pa.table(
        {
            "label": pa.array(labels, pa.int32()),
            "given_split": pa.array(splits or [None] * len(labels), pa.string()),
            "pixels_sha256": pa.array(map(digest_of, digests), pa.binary(32)),
        }
    )


def assign(images: pa.Table, groups=None, val=0.15, test=0.15, seed=0) -> list[str]:
    groups = np.arange(len(images)) if groups is None else np.asarray(groups)
    return name_splits(assign_splits(images, groups, val, test, seed)).to_pylist()


def counts_of(splits: list[str], labels) -> dict[int, dict[str, int]]:
    return {
        label: dict(Counter(split for split, one in zip(splits, labels, strict=True) if one == label))
        for label in set(labels)
    }


def test_each_class_gives_its_rounded_share_to_each_split():
    labels = [0] * 100 + [1] * 10 + [2] * 7
    assert counts_of(assign(table(labels), val=0.15, test=0.2), labels) == {
        0: {"train": 65, "val": 15, "test": 20},
        1: {"train": 6, "val": 2, "test": 2},
        2: {"train": 5, "val": 1, "test": 1},
    }


@pytest.mark.parametrize(
    ("images", "fraction", "drawn"),
    # On both sides of each half: below it nothing more is drawn, above it one more.
    [
        (3, 0.15, 0),
        (4, 0.15, 1),
        (9, 0.15, 1),
        (11, 0.15, 2),
        (16, 0.15, 2),
        (17, 0.15, 3),
        (49, 0.01, 0),
        (51, 0.01, 1),
    ],
)
def test_a_share_is_rounded_to_the_nearest_whole_image(images, fraction, drawn):
    assert Counter(assign(table([0] * images), val=fraction, test=0.0))["val"] == drawn
    assert Counter(assign(table([0] * images), val=0.01, test=fraction))["test"] == drawn


def test_the_draw_is_the_one_that_datasets_were_prepared_with():
    # Whoever prepares a source again must get the same split: a change here makes old results incomparable.
    labels, groups = [0] * 50 + [1] * 23 + [2] * 7, [*np.repeat(range(5), 2), *range(5, 73), 40, 41]
    paths = [f"{label}/{row:03d}.png" for row, label in enumerate(labels)]
    splits = assign(table(labels), groups, val=0.15, test=0.2, seed=7)
    of_split = {
        split: [path for path, one in zip(paths, splits, strict=True) if one == split]
        for split in ("train", "val", "test")
    }
    digests = {
        split: (len(of_one), hashlib.sha256("\n".join(of_one).encode()).hexdigest()[:16])
        for split, of_one in of_split.items()
    }
    assert digests == {
        "train": (52, "37b713fa2d3611bc"),
        "val": (12, "8b2b214066b0cac3"),
        "test": (16, "5c53984dacc722e1"),
    }


def draw_one_by_one(labels, groups, given, val, test, seed) -> list[str]:
    """Draws as the docstring says, image by image; the pixels of an image are the number of its row."""
    if any(given):
        given, test = [split or "train" for split in given], 0.0
    drawn_from = [row for row, split in enumerate(given) if split is None or (split == "train" and "val" not in given)]
    keys = {}
    for group in {groups[row] for row in drawn_from}:
        least = min(digest_of(row) for row in drawn_from if groups[row] == group)
        keys[group] = hashlib.sha256(f"{seed}:{least.hex()}".encode()).digest()
    classes = {
        label: sorted({groups[row] for row in drawn_from if labels[row] == label}, key=keys.__getitem__)
        for label in sorted({labels[row] for row in drawn_from})
    }
    drawn = {in_order[-1]: "train" for in_order in classes.values()}
    for label, in_order in classes.items():
        total = sum(labels[row] == label for row in drawn_from)
        left = {"test": round(total * test), "val": round(total * val)}
        for group in in_order:
            size = sum(groups[row] == group for row in drawn_from)
            fits = [split for split in left if left[split] >= size]
            if group not in drawn and fits:
                drawn[group] = fits[0]
                left[fits[0]] -= size
    return [drawn.get(groups[row], "train") if row in drawn_from else given[row] for row in range(len(labels))]


@pytest.mark.parametrize("given", [[None], [None, "test"], ["train", "test"], ["train", "val", None]])
@pytest.mark.parametrize(("val", "test"), [(0.15, 0.15), (0.25, 0.5), (0.5, 0.0), (0.01, 0.9), (0.125, 0.375)])
@pytest.mark.parametrize("seed", range(4))
def test_the_draw_is_that_of_a_walk_over_the_images(given, val, test, seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 200))
    labels = random.integers(0, 1 + seed * 3, count).tolist()
    # Groups of several classes and of all sizes, whose numbers say nothing and need not be dense.
    groups = (1000 - 7 * random.integers(0, 1 + count // (1 + seed), count)).tolist()
    splits = random.choice(np.array(given, object), count).tolist()
    assert assign(table(labels, splits=splits), groups, val, test, seed) == draw_one_by_one(
        labels, groups, splits, val, test, seed
    )


@pytest.mark.parametrize(("val", "test"), [(0.15, 0.15), (0.15, 0.0), (0.3, 0.0), (0.6, 0.0), (0.49, 0.5), (0.1, 0.8)])
def test_the_least_class_that_gives_an_image_to_val_is_known(val, test):
    size = least_class_size(val, test)
    assert "val" in assign(table([0] * size), val=val, test=test)
    assert "val" not in assign(table([0] * (size - 1)), val=val, test=test)


def test_without_a_test_fraction_nothing_tests():
    labels = [0] * 20 + [1] * 20
    assert counts_of(assign(table(labels), test=0.0), labels)[0] == {"train": 17, "val": 3}


@pytest.mark.parametrize("fraction", [0.15, 0.6, 0.99])
def test_a_class_with_one_image_trains(fraction):
    assert assign(table([0, 1]), val=fraction, test=0.0) == ["train", "train"]


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_at_least_one_image_of_each_class_trains(images):
    assert "train" in assign(table([0] * images), val=0.49, test=0.5)


def test_the_same_seed_gives_the_same_splits():
    images = table([0] * 50 + [1] * 50)
    assert assign(images, seed=3) == assign(images, seed=3)


def test_another_seed_gives_other_splits():
    images = table([0] * 50 + [1] * 50)
    assert len({tuple(assign(images, seed=seed)) for seed in range(5)}) == 5


def test_the_order_of_the_rows_and_the_numbers_of_the_groups_change_nothing():
    # Near duplicates: the pixels of a group differ, and some groups are of two classes.
    labels, groups = np.array([0] * 40 + [1] * 40), np.array([*np.repeat(range(20), 2), *range(15, 55)])
    digests = np.arange(80)
    splits = np.array(assign(table(labels, digests), groups))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(80)
        shuffled = assign(table(labels[order], digests[order]), 1000 - groups[order])
        assert shuffled == splits[order].tolist()


def test_an_image_keeps_its_split_when_another_class_grows():
    labels = [0] * 40 + [1] * 10
    more = [*labels, *[1] * 30]
    assert assign(table(more))[:40] == assign(table(labels))[:40]


@pytest.mark.parametrize("seed", range(5))
def test_a_group_of_duplicates_never_straddles(seed):
    labels = [0, 1] * 60
    groups = np.random.default_rng(seed).integers(0, 30, 120)
    splits = assign(table(labels, groups), groups, seed=seed)
    assert all(len({split for split, one in zip(splits, groups, strict=True) if one == group}) == 1 for group in groups)
    assert set(splits) == {"train", "val", "test"}


def test_the_share_is_kept_where_groups_can_fill_it():
    # 10 pairs and 80 single images.
    groups = np.array([*np.repeat(np.arange(10), 2), *range(10, 90)])
    images = table([0] * 100, groups)
    for seed in range(10):
        assert Counter(assign(images, groups, seed=seed)) == {"train": 70, "val": 15, "test": 15}


def test_a_class_whose_images_all_have_twins_in_another_class_trains_too():
    # Image 9 and image 10 have the same pixels; 10 is the only one of its class.
    labels, groups = [0] * 10 + [1], [*range(10), 9]
    images = table(labels, groups)
    assert {assign(images, groups, val=0.4, test=0.4, seed=seed)[10] for seed in range(10)} == {"train"}


def test_given_splits_are_kept():
    given = ["train", "val", "test", "test", "train", "val"]
    assert assign(table([0, 0, 0, 1, 1, 1], splits=given)) == given


def test_given_splits_are_kept_even_where_twins_straddle():
    assert assign(table([0, 0, 1, 1], [0, 0, 2, 3], ["train", "val", "train", "val"]), [0, 0, 2, 3]) == [
        "train",
        "val",
        "train",
        "val",
    ]


def test_val_is_drawn_from_train_where_it_is_missing():
    labels = [0] * 20 + [1] * 20 + [0, 1]
    given = ["train"] * 40 + ["test", "test"]
    assert counts_of(assign(table(labels, splits=given), val=0.25), labels) == {
        0: {"train": 15, "val": 5, "test": 1},
        1: {"train": 15, "val": 5, "test": 1},
    }


def test_test_is_never_drawn_from_given_splits():
    given = ["train"] * 30 + ["val"] * 10
    assert assign(table([0] * 40, splits=given), test=0.3) == given


def test_where_only_test_images_are_marked_val_is_drawn_from_the_rest():
    labels = [0] * 20 + [1] * 20
    given = ([None] * 16 + ["test"] * 4) * 2
    assert counts_of(assign(table(labels, splits=given), val=0.25), labels) == {
        0: {"train": 12, "val": 4, "test": 4},
        1: {"train": 12, "val": 4, "test": 4},
    }
