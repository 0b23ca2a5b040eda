"""Decides which images train, validate and test: by content and seed alone, so on any number of nodes alike."""

import hashlib
from collections import defaultdict

import pyarrow as pa

from data_prep.manifest import SplitName


def assign_splits(images: pa.Table, val_fraction: float, test_fraction: float, seed: int) -> list[SplitName]:
    """Returns the split of each row: the given one, or a stratified draw among the rows that have none.

    Images with the same pixels form a group that is never divided, even across classes. Within each class the groups
    are ordered by a hash of the seed and their pixels; test takes the first, val the next, train the rest.

    A source with splits of its own keeps them. Only val is drawn from train where it is missing, since training needs
    it; a test split is never taken out of images that somebody meant to train on.

    Args:
        images: columns label (int32), split (string or null) and pixels_sha256 (string).
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

    groups: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests):
        if not found or given[row] == drawn_from:
            groups[digest].append(row)
    groups_of_class: dict[int, list[str]] = defaultdict(list)
    for digest, rows in groups.items():
        groups_of_class[labels[rows[0]]].append(digest)

    splits: list[SplitName] = [split or "train" for split in given]
    for class_groups in groups_of_class.values():
        class_groups.sort(key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        total = sum(len(groups[digest]) for digest in class_groups)
        remaining: dict[SplitName, int] = {"test": round(total * test_fraction), "val": round(total * val_fraction)}
        for digest in class_groups[:-1]:  # the last group always trains
            for split, wanted in remaining.items():
                if wanted >= len(groups[digest]):
                    remaining[split] -= len(groups[digest])
                    for row in groups[digest]:
                        splits[row] = split
                    break
    return splits
