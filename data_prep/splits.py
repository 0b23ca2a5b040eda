"""Assign images to train, val and test by content and seed alone, so that the number of nodes does not matter."""

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.columns import NO_SPLIT, TEST, TRAIN, VAL, Splits, as_words, parse_splits, sort_by_keys
from data_prep.manifest import binary_array

_DIGEST_BYTES = 32


def assign_splits(
    images: pa.Table, groups: npt.NDArray[np.int64], val_fraction: float, test_fraction: float, seed: int
) -> Splits:
    """Return the split of each row: the given one, or a stratified random one for rows that have none.

    A group of duplicates is never divided, even across classes. Within each class the groups are ordered by a hash of
    the seed and their pixels. Test gets the first ones, val the next ones, and train the rest, at least the last one.

    A source with splits of its own keeps them. Only val is drawn from train if it is missing, since training needs it;
    a test split is never taken from images that are meant for training.

    Args:
        images: table with the columns label (int32), given_split (string or null) and pixels_sha256 (binary(32)).
        groups: int64 ``[rows]``, a group number for each row; rows of one group are duplicates.
        val_fraction: fraction of each class, rounded to whole images; at least one image of each class stays in train.
        test_fraction: likewise.
        seed: random seed; another seed gives other splits.
    """
    given = parse_splits(images["given_split"])
    splits = np.where(given == NO_SPLIT, np.int8(TRAIN), given)
    drawn_from = np.arange(len(splits))
    if (given != NO_SPLIT).any():
        test_fraction = 0.0
        drawn_from = np.flatnonzero(splits == TRAIN) if VAL not in splits else drawn_from[:0]
    if len(drawn_from):
        rows = images.select(["label", "pixels_sha256"]).take(drawn_from)
        group_of = _number_groups(binary_array(rows["pixels_sha256"]), groups[drawn_from], seed)
        split_of = _draw_groups(rows["label"].to_numpy(), group_of, val_fraction, test_fraction)
        splits[drawn_from] = split_of[group_of]
    return splits


def least_class_size(val_fraction: float, test_fraction: float) -> int:
    """Return how many images, without duplicates, a class needs to have one in val; test gets its share first."""
    return next(
        size
        for size in itertools.count(2)
        if round(size * val_fraction) >= 1 and round(size * test_fraction) < size - 1
    )


def _number_groups(digests: npt.NDArray[np.uint8], groups: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Return the group of each row, numbered in the order in which they are drawn.

    The order is that of a hash, and does not depend on the order of the images in the source.

    Args:
        digests: uint8 ``[rows, 32]``.
        groups: ``[rows]``.
        seed: random seed.
    """
    by_group = sort_by_keys(groups, *as_words(digests).T)
    is_first = np.diff(groups[by_group], prepend=groups[by_group[0]] - 1) > 0
    least = digests[by_group[is_first]].tobytes()
    keys = (
        hashlib.sha256(f"{seed}:{least[start : start + _DIGEST_BYTES].hex()}".encode()).digest()
        for start in range(0, len(least), _DIGEST_BYTES)
    )
    hashes = np.fromiter(keys, f"V{_DIGEST_BYTES}", len(least) // _DIGEST_BYTES)
    number = np.empty(len(hashes), np.int64)
    number[sort_by_keys(*as_words(hashes.view(np.uint8).reshape(-1, _DIGEST_BYTES)).T)] = np.arange(len(hashes))
    numbers = np.empty(len(groups), np.int64)
    numbers[by_group] = number[np.cumsum(is_first) - 1]
    return numbers


def _draw_groups(
    labels: npt.NDArray[np.int32], group_of: npt.NDArray[np.int64], val_fraction: float, test_fraction: float
) -> Splits:
    """Return the split of each group.

    Args:
        labels: ``[rows]``.
        group_of: ``[rows]``, the group of each row, as `_number_groups` numbers them.
        val_fraction: see `assign_splits`.
        test_fraction: likewise.
    """
    sizes, totals = np.bincount(group_of), np.bincount(labels)
    # The groups of each class, one class after another.
    of_label, in_class = np.divmod(np.unique(labels * np.int64(len(sizes)) + group_of), len(sizes))
    ends = np.flatnonzero(np.diff(of_label, append=-1)) + 1
    split_of = np.full(len(sizes), NO_SPLIT, np.int8)
    # Of all classes before any group is drawn, since a group can be of several classes.
    split_of[in_class[ends - 1]] = TRAIN
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        total = int(totals[of_label[start]])
        remaining = {TEST: round(total * test_fraction), VAL: round(total * val_fraction)}
        free = in_class[start:end]
        free = free[split_of[free] == NO_SPLIT]
        for group, size in zip(free.tolist(), sizes[free].tolist(), strict=True):
            split = next((split for split, wanted in remaining.items() if wanted >= size), None)
            if split is not None:
                remaining[split] -= size
                split_of[group] = split
            elif not any(remaining.values()):
                break
    split_of[split_of == NO_SPLIT] = TRAIN
    return split_of
