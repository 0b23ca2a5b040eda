"""Decides which images train, validate and test: by content and seed alone, so on any number of nodes alike."""

import hashlib
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.manifest import SplitName


def assign_splits(
    images: pa.Table, groups: npt.NDArray[np.int64], val_fraction: float, test_fraction: float, seed: int
) -> list[SplitName]:
    """Returns the split of each row: the given one, or a stratified draw among the rows that have none.

    A group of duplicates is never divided, even across classes. Within each class the groups are ordered by a hash of
    the seed and their pixels; test takes the first, val the next, train the rest.

    A source with splits of its own keeps them. Only val is drawn from train where it is missing, since training needs
    it; a test split is never taken out of images that somebody meant to train on.

    Args:
        images: columns label (int32), split (string or null) and pixels_sha256 (string).
        groups: a number for each row; rows of one group are duplicates.
        val_fraction: of each class, rounded to whole images; at least one image of each class stays in train.
        test_fraction: likewise.
        seed: another seed gives another draw.
    """
    given: list[SplitName | None] = images["split"].to_pylist()
    found = set(given) - {None}
    if found:
        test_fraction = 0.0
        drawn_from = "train" if "val" not in found else None
    else:
        drawn_from = None
    labels: list[int] = images["label"].to_pylist()
    digests: list[str] = images["pixels_sha256"].to_pylist()

    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        if not found or given[row] == drawn_from:
            members[group].append(row)
    # What orders a group must not depend on where its images stand in the source.
    digest_of = {group: min(digests[row] for row in rows) for group, rows in members.items()}
    groups_of_class: dict[int, list[int]] = defaultdict(list)
    for group, rows in members.items():
        groups_of_class[min(labels[row] for row in rows)].append(group)

    splits: list[SplitName] = [split or "train" for split in given]
    for class_groups in groups_of_class.values():
        class_groups.sort(key=lambda group: hashlib.sha256(f"{seed}:{digest_of[group]}".encode()).digest())
        total = sum(len(members[group]) for group in class_groups)
        remaining: dict[SplitName, int] = {"test": round(total * test_fraction), "val": round(total * val_fraction)}
        for group in class_groups[:-1]:  # the last group always trains
            for split, wanted in remaining.items():
                if wanted >= len(members[group]):
                    remaining[split] -= len(members[group])
                    for row in members[group]:
                        splits[row] = split
                    break
    return splits
