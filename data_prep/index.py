"""Draw the splits of decoded images, and write the index and all that follows from it: no pixel is decoded again."""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.card import write_card
from data_prep.columns import NO_SPLIT, TRAIN, VAL, Splits, count_values, name_splits, parse_splits
from data_prep.duplicates import group_duplicates, list_duplicates
from data_prep.manifest import (
    DUPLICATES_NAME,
    INDEX_NAME,
    INDEX_SCHEMA,
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS,
    DuplicateRule,
    Manifest,
    Split,
    binary_array,
)
from data_prep.splits import assign_splits, least_class_size
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.lease import Lease
from trainer.runtime.markdown import format_count

_PIXEL_COLUMNS = ["pixel_sums", "pixel_squares"]


def draw_splits(
    images: pa.Table, duplicates: DuplicateRule, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Splits, npt.NDArray[np.int64]]:
    """Return the split and the group of duplicates of each image.

    Args:
        images: INDEX_SCHEMA; images that have a split keep it, and so do their duplicates.
        duplicates: which images are duplicates.
        val_fraction: see `data_prep.splits.assign_splits`.
        test_fraction: likewise.
        seed: likewise.

    Raises:
        InputError: the val split is empty.
    """
    groups = group_duplicates(images, duplicates)
    splits = np.full(len(images), NO_SPLIT, np.int8)
    if "split" in images.column_names:
        splits = parse_splits(images["split"])
        # Of duplicates in several splits, the first one counts: it is written last.
        kept = np.flatnonzero(splits != NO_SPLIT)[::-1]
        split_of_group = np.full(groups.max() + 1, NO_SPLIT, np.int8)
        split_of_group[groups[kept]] = splits[kept]
        splits = np.where(splits == NO_SPLIT, split_of_group[groups], splits)
    new = np.flatnonzero(splits == NO_SPLIT)
    drawn_from = images.select(["label", "given_split", "pixels_sha256"]).take(new)
    splits[new] = assign_splits(drawn_from, groups[new], val_fraction, test_fraction, seed)
    if VAL not in splits:
        raise InputError(_describe_empty_val(images, val_fraction, test_fraction))
    return splits, groups


def _describe_empty_val(images: pa.Table, val_fraction: float, test_fraction: float) -> str:
    drawn_from = images.filter(pc.field("given_split").is_null() | (pc.field("given_split") == "train"))
    sizes = drawn_from["label"].value_counts().field("counts").to_pylist()
    test_fraction = 0.0 if images["given_split"].null_count < len(images) else test_fraction
    needed = least_class_size(val_fraction, test_fraction)
    smallest = format_count(min(sizes), "image")
    return (
        f"the val split is empty: the smallest class has {smallest}, the largest {max(sizes)}; "
        f"with --val-fraction {val_fraction:g} and --test-fraction {test_fraction:g} a class needs {needed}, "
        "not counting duplicates, to give one to val; add images"
        + (" or give a larger --val-fraction" if max(sizes) > 1 else "")
    )


def write_index(
    dataset: str,
    images: pa.Table,
    splits: Splits,
    groups: npt.NDArray[np.int64],
    rejected: pa.Table,
    described: dict[str, Any],
    lease: Lease,
) -> Manifest:
    """Write the index, the tables beside it and the card of a dataset, and then its manifest.

    Args:
        dataset: URI of the dataset.
        images: INDEX_SCHEMA, with or without split.
        splits: split of each image.
        groups: group of duplicates of each image.
        rejected: path and reason of each file that was not used.
        described: fields of the manifest that do not follow from the others.
        lease: that of the dataset; the manifest is not written without it.
    """
    columns = {name: images[name] for name in INDEX_SCHEMA.names if name != "split"}
    index = pa.table({**columns, "split": name_splits(splits)}).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    duplicates = list_duplicates(index, groups, splits)
    rejected = rejected.sort_by("path")
    tables = {INDEX_NAME: index, DUPLICATES_NAME: duplicates, REJECTED_NAME: rejected}
    digests = {}
    for name, table in tables.items():
        content = storage.parquet_bytes(table)
        storage.write_bytes(storage.join(dataset, name), content)
        digests[name] = hashlib.sha256(content).hexdigest()
    labels = index["label"].to_numpy()
    num_classes = len(described["class_names"])
    mean, std = _mean_and_std(index.select(_PIXEL_COLUMNS).filter(pa.array(splits == TRAIN)), described)
    manifest = Manifest(
        **described,
        splits={
            split: Split(rows_per_class=np.bincount(labels[splits == number], minlength=num_classes).tolist())
            for number, split in enumerate(SPLITS)
        },
        tables=digests,
        rejected=dict(count_values(rejected["reason"]).most_common()),
        duplicate_images=len(duplicates),
        leaked_images=pc.sum(duplicates["leaks"]).as_py() or 0,
        pixel_mean=mean,
        pixel_std=std,
        fingerprint=_fingerprint(index, splits, described),
    )
    write_card(dataset, manifest, index)
    lease.check()
    storage.write_bytes(storage.join(dataset, MANIFEST_NAME), manifest.to_json())
    return manifest


def _mean_and_std(train: pa.Table, described: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each channel: of whole numbers, so exact in any order."""
    size = len(train) * described["image_size"] ** 2
    sums, squares = (
        train[name].combine_chunks().flatten().to_numpy().reshape(-1, described["channels"]).sum(axis=0) / size
        for name in _PIXEL_COLUMNS
    )
    return sums.tolist(), np.sqrt(squares - sums**2).tolist()


def _fingerprint(index: pa.Table, splits: Splits, described: dict[str, Any]) -> str:
    visible = {name: described[name] for name in ("image_size", "channels", "class_names")}
    digest = hashlib.sha256(json.dumps(visible).encode())
    for name in ("shard", "row", "label"):
        digest.update(index[name].to_numpy())
    digest.update(splits.data)
    digest.update(binary_array(index["pixels_sha256"]).ravel().data)
    return digest.hexdigest()
