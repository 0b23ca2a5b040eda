"""Assign images to train, val and test by content and seed alone, so that the number of nodes does not matter."""

import hashlib
import itertools
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.manifest import SplitName


def assign_splits(
    images: pa.Table, groups: npt.NDArray[np.int64], val_fraction: float, test_fraction: float, seed: int
) -> list[SplitName]:
    """Return the split of each row: the given one, or a stratified random one for rows that have none.

    A group of duplicates is never divided, even across classes. Within each class the groups are ordered by a hash of
    the seed and their pixels. Test gets the first ones, val the next ones, and train the rest, at least the last one.

    A source with splits of its own keeps them. Only val is drawn from train if it is missing, since training needs it;
    a test split is never taken from images that are meant for training.

    Args:
        images: table with the columns label (int32), given_split (string or null) and pixels_sha256 (binary).
        groups: int64 ``[rows]``, a group number for each row; rows of one group are duplicates.
        val_fraction: fraction of each class, rounded to whole images; at least one image of each class stays in train.
        test_fraction: likewise.
        seed: random seed; another seed gives other splits.
    """
    given: list[SplitName | None] = images["given_split"].to_pylist()
    drawn_from: SplitName | None = None
    if any(given):
        given = [split or "train" for split in given]
        test_fraction = 0.0
        drawn_from = "train" if "val" not in given else None
    labels: list[int] = images["label"].to_pylist()
    digests: list[bytes] = images["pixels_sha256"].to_pylist()

    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        if given[row] == drawn_from:
            members[group].append(row)
    order = {group: _draw(seed, [digests[row] for row in rows]) for group, rows in members.items()}
    groups_of_class: dict[int, set[int]] = defaultdict(set)
    for group, rows in members.items():
        for row in rows:
            groups_of_class[labels[row]].add(group)
    always_train = {max(of_class, key=order.__getitem__) for of_class in groups_of_class.values()}

    splits: list[SplitName] = [split or "train" for split in given]
    assigned = set(always_train)
    for label in sorted(groups_of_class):
        of_class = groups_of_class[label]
        total = sum(labels[row] == label for group in of_class for row in members[group])
        remaining: dict[SplitName, int] = {"test": round(total * test_fraction), "val": round(total * val_fraction)}
        for group in sorted(of_class - assigned, key=order.__getitem__):
            for split, wanted in remaining.items():
                if wanted >= len(members[group]):
                    remaining[split] -= len(members[group])
                    assigned.add(group)
                    for row in members[group]:
                        splits[row] = split
                    break
    return splits


def least_class_size(val_fraction: float, test_fraction: float) -> int:
    """Return how many images, without duplicates, a class needs to have one in val; test gets its share first."""
    return next(
        size
        for size in itertools.count(2)
        if round(size * val_fraction) >= 1 and round(size * test_fraction) < size - 1
    )


def _draw(seed: int, digests: list[bytes]) -> bytes:
    """Return the sort key of a group; it does not depend on the order of the images in the source."""
    return hashlib.sha256(f"{seed}:{min(digests).hex()}".encode()).digest()
