"""Prepare a dataset: list the images, decode them to shards, draw the splits, write the index and the manifest.

    source --find_images--> ranges --stage_images (Ray Data)--> shards --draw_splits--> index, tables, card, manifest

The shards depend only on the source and the options that decide pixels. So the same source, options and seed give the
same dataset on any number of nodes, what an interrupted attempt decoded is used again, and other splits need no pixel.
"""

import re
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError

from data_prep.card import CARD_NAME, CONTACT_SHEET_NAME
from data_prep.decode import ImageOptions
from data_prep.formats import FORMATS
from data_prep.index import draw_splits, write_index
from data_prep.manifest import (
    DUPLICATES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS,
    DuplicateRule,
    Manifest,
    read_index,
    read_manifest,
)
from data_prep.names import MOST_NAMED, count_suffixes
from data_prep.sources import Source, SourceFormat, find_images
from data_prep.staging import (
    SHARDS_FOLDER,
    Staged,
    delete_records,
    delete_records_of,
    delete_staging,
    is_started,
    mark_started,
    open_staging,
    stage_images,
)
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.events import OnEvent, ignore_event
from trainer.runtime.lease import Lease, hold_lease
from trainer.runtime.markdown import format_count

# A class that loses more of its files than this is not usable, however many files the other classes have.
_MOST_BAD_OF_CLASS = 0.5
_SHARD_NAME = re.compile(r"\d{5,}-[0-9a-f]{8}\.arrow")
# Format 1 had a folder of these for each split; a dataset that is replaced may be of it.
_FORMER_FILE_NAME = re.compile(r"part-\d{5,}\.parquet")

Work = Literal["nothing", "draw", "append", "decode"]
"""What a preparation has to do: only the last two decode images, with Ray."""


class PrepareConfig(ImageOptions):
    """The options that determine a prepared dataset, together with its source."""

    val_fraction: float = Field(0.15, gt=0, lt=1)
    """Fraction of each class for the val split, unless the source has a val split."""
    test_fraction: float = Field(0.15, ge=0, lt=1)
    """Fraction of each class for the test split, unless the source has splits of its own."""
    seed: int = 0
    """Random seed of the splits."""
    duplicates: DuplicateRule = "near"
    """Which images are kept in one split: those that are nearly identical, or identical ones only."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest fraction of rejected files with which the preparation succeeds."""


# Another value of these draws the splits anew; another value of any other option changes pixels.
_OF_SPLITS = ("val_fraction", "test_fraction", "seed", "duplicates")
# Fields of the manifest that a preparation of the same images repeats.
_OF_IMAGES = (
    *("image_size", "channels", "resize", "background", "value_range", "value_range_given"),
    *("class_names", "shards", "value_counts", "source"),
)


def parse_config(**values: Any) -> PrepareConfig:
    """Return a config with the given values.

    Raises:
        InputError: a value is not allowed; the message names the option.
    """
    try:
        config = PrepareConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option} {first['input']}: {first['msg']}") from error
    if config.val_fraction + config.test_fraction >= 1:
        raise InputError(
            f"--val-fraction {config.val_fraction} and --test-fraction {config.test_fraction} leave no image to train "
            "on; give fractions with a sum below 1"
        )
    return config


def prepare(
    source: str,
    dataset: str,
    config: PrepareConfig,
    *,
    source_format: SourceFormat | None = None,
    overwrite: bool = False,
    append: bool = False,
    on_event: OnEvent = ignore_event,
) -> Manifest:
    """Prepare a dataset; Ray must be connected if `check_places` says that images are to be decoded.

    Args:
        source: local folder or file, or s3:// prefix or object; see `data_prep.sources`.
        dataset: local folder or s3:// prefix to write to.
        config: how to decode the images and draw the splits.
        source_format: format of the source; None detects it.
        overwrite: replace the dataset if there is one.
        append: add the images of the source that the dataset does not have; those that it has keep their splits.
        on_event: called with what was found in the source, and with the progress.

    Returns:
        The manifest, as in ``manifest.json``; that of the existing dataset if the same preparation was done before.

    Raises:
        InputError: the source or the dataset cannot be used, or too many files were rejected.
        JobError: a task of Ray Data failed, or the disk is full.
    """
    work = check_places(source, dataset, config, overwrite=overwrite, append=append)
    source, dataset = storage.resolve_uri(source), storage.resolve_uri(dataset)
    if work == "nothing" and (existing := read_manifest(dataset)):
        return existing
    # Not in the staging folder, which is deleted while the lease is held.
    with hold_lease(storage.join(dataset, "_lease"), f"DATASET {dataset}") as lease:
        # Another job may have finished the dataset in the meantime.
        work = _find_work(source, dataset, config, overwrite=overwrite, append=append)
        existing = read_manifest(dataset) if work != "decode" else None
        if existing is not None and work == "nothing":
            return existing
        if existing is not None and work == "draw":
            manifest = _draw_again(dataset, existing, config, lease)
        else:
            found = find_images(source, source_format)
            if found.listed.is_notable:
                on_event(found.listed)
            if overwrite:
                _delete_dataset(dataset)
            if existing is not None:
                manifest = _append(dataset, existing, found, config, lease, on_event)
            else:
                manifest = _prepare_all(source, dataset, found, config, lease, on_event)
        _delete_shards(dataset, kept=manifest)
        delete_staging(dataset)
    return manifest


def _prepare_all(
    source: str, dataset: str, found: Source, config: PrepareConfig, lease: Lease, on_event: OnEvent
) -> Manifest:
    staged, staging = _stage(dataset, None, found, found.images, ImageOptions.of(config), on_event)
    _check_rejected(staging, staged.images, staged.rejected, found.class_names, config)
    splits, groups = draw_splits(staged.images, **config.model_dump(include=set(_OF_SPLITS)))
    described = {
        **config.model_dump(exclude={"max_bad_fraction"}),
        "value_range": staged.value_range,
        "value_range_given": config.value_range is not None,
        "class_names": found.class_names,
        "shards": staged.shards,
        "value_counts": staged.value_counts.tolist(),
        "source": source,
    }
    rejected = _join_rejected(staged.rejected, found.ignored)
    return write_index(dataset, staged.images, splits, groups, rejected, described, lease)


def _draw_again(dataset: str, existing: Manifest, config: PrepareConfig, lease: Lease) -> Manifest:
    """Draw the splits of a dataset anew, from its index alone."""
    if is_started(dataset):
        # The index may be of an attempt that was killed before the manifest: then only its splits differ.
        index = storage.parquet_table(storage.read_bytes(storage.join(dataset, INDEX_NAME)))
    else:
        index = read_index(dataset, existing)
    mark_started(dataset)
    index = index.drop_columns(["split"])
    splits, groups = draw_splits(index, **config.model_dump(include=set(_OF_SPLITS)))
    described = {name: getattr(existing, name) for name in _OF_IMAGES} | config.model_dump(include=set(_OF_SPLITS))
    rejected = storage.parquet_table(storage.read_bytes(storage.join(dataset, REJECTED_NAME)))
    return write_index(dataset, index, splits, groups, rejected, described, lease)


def _append(
    dataset: str, existing: Manifest, found: Source, config: PrepareConfig, lease: Lease, on_event: OnEvent
) -> Manifest:
    """Decode the images of a source that a dataset does not have to shards after its own."""
    index = read_index(dataset, existing)
    class_names = [*existing.class_names, *(name for name in found.class_names if name not in existing.class_names)]
    new = found.images.filter(pc.invert(pc.is_in(found.images["path"], index["path"].combine_chunks())))
    if not len(new):
        return existing
    labels = pa.array([class_names.index(name) for name in found.class_names], pa.int32()).take(new["label"])
    new = new.set_column(new.schema.get_field_index("label"), "label", labels)
    # Images of one dataset have one range.
    options = ImageOptions.of(config).model_copy(update={"value_range": existing.value_range})
    staged, staging = _stage(dataset, existing, found, new, options, on_event)
    images = pa.concat_tables([index, staged.images], promote_options="default")
    _check_rejected(staging, images, staged.rejected, class_names, config)
    splits, groups = draw_splits(images, **config.model_dump(include=set(_OF_SPLITS)))
    described = {name: getattr(existing, name) for name in (*_OF_IMAGES, *_OF_SPLITS)} | {
        "value_range": staged.value_range,
        "class_names": class_names,
        "shards": [*existing.shards, *staged.shards],
        "value_counts": (np.asarray(existing.value_counts) + staged.value_counts).tolist(),
    }
    before = storage.parquet_table(storage.read_bytes(storage.join(dataset, REJECTED_NAME)))
    listed = pa.concat_arrays([*found.images["path"].chunks, *found.ignored["path"].cast(pa.string()).chunks])
    gone = before.filter(pc.invert(pc.is_in(before["path"], listed)))
    rejected = pa.concat_tables([_join_rejected(staged.rejected, found.ignored), gone])
    return write_index(dataset, images, splits, groups, rejected, described, lease)


def _stage(
    dataset: str,
    existing: Manifest | None,
    found: Source,
    listed: pa.Table,
    options: ImageOptions,
    on_event: OnEvent,
) -> tuple[Staged, str]:
    staging = open_staging(dataset, listed, options)
    if not storage.find_files(staging):
        # There is nothing to continue.
        _delete_shards(dataset, kept=existing)
    before = existing.shards if existing else []
    return stage_images(dataset, staging, found.uri, listed, options, before, on_event), staging


def _join_rejected(rejected: pa.Table, ignored: pa.Table) -> pa.Table:
    rejected = rejected.select(["path", "reason"])
    return pa.concat_tables([rejected, ignored.cast(rejected.schema)])


def check_modes(*, overwrite: bool, append: bool) -> None:
    """Raise InputError if a dataset would be both replaced and added to."""
    if overwrite and append:
        raise InputError("--overwrite replaces the dataset and --append adds to it; give one of them")


def check_places(
    source: str, dataset: str, config: PrepareConfig, *, overwrite: bool = False, append: bool = False
) -> Work:
    """Check that the source exists and that the dataset can be written, before connecting to a cluster.

    Returns:
        What is to be done.

    Raises:
        InputError: the source does not exist, or the dataset cannot be written or was prepared with other options.
    """
    source, dataset = storage.resolve_uri(source), storage.resolve_uri(dataset)
    if storage.join(dataset, "").startswith(storage.join(source, "")):
        raise InputError(f"DATASET {dataset} is inside SOURCE {source}; give a folder outside it")
    if storage.join(source, "").startswith(storage.join(dataset, "")):
        raise InputError(f"SOURCE {source} is inside DATASET {dataset}; give a folder outside it")
    work = _find_work(source, dataset, config, overwrite=overwrite, append=append)
    if work in ("append", "decode") and not storage.exists(source):
        raise InputError(
            f"SOURCE {source} does not exist; give a folder or prefix of images, or a file that lists them"
        )
    if work != "nothing":
        _check_names_are_free(dataset)
        storage.check_access(dataset)
    return work


def _check_names_are_free(dataset: str) -> None:
    """Check that a preparation would only replace files that a preparation wrote.

    Raises:
        InputError: a file with one of the names exists, and no preparation was started here; the message names it.
    """
    if storage.exists(storage.join(dataset, MANIFEST_NAME)) or is_started(dataset):
        return
    names = [INDEX_NAME, REJECTED_NAME, DUPLICATES_NAME, CARD_NAME, CONTACT_SHEET_NAME]
    taken = [name for name in names if storage.exists(storage.join(dataset, name))]
    taken += [f"{SHARDS_FOLDER}/{name}" for name in _find_named(dataset, SHARDS_FOLDER, _SHARD_NAME)]
    if taken:
        raise InputError(
            f"DATASET {dataset} contains {taken[0]}, which no preparation wrote and this one would replace; choose "
            "another folder, or move the file"
        )


def _delete_dataset(dataset: str) -> None:
    """Delete the files that a preparation writes, the manifest first, and no other file in the folder."""
    # If this process is killed now, the folder is still known as that of a preparation.
    mark_started(dataset)
    for name in (MANIFEST_NAME, INDEX_NAME, REJECTED_NAME, DUPLICATES_NAME, CARD_NAME, CONTACT_SHEET_NAME):
        storage.delete_file(storage.join(dataset, name))
    _delete_shards(dataset, kept=None)
    for split in SPLITS:
        for name in _find_named(dataset, split, _FORMER_FILE_NAME):
            storage.delete_file(storage.join(dataset, split, name))
    delete_records(dataset)


def _delete_shards(dataset: str, kept: Manifest | None) -> None:
    """Delete all shards that a manifest does not name."""
    named = {storage.basename(shard.path) for shard in kept.shards} if kept else set()
    for name in _find_named(dataset, SHARDS_FOLDER, _SHARD_NAME):
        if name not in named:
            storage.delete_file(storage.join(dataset, SHARDS_FOLDER, name))


def _find_named(dataset: str, folder: str, pattern: re.Pattern[str]) -> list[str]:
    return [name for name in storage.find_files(storage.join(dataset, folder)) if pattern.fullmatch(name)]


def _find_work(source: str, dataset: str, config: PrepareConfig, *, overwrite: bool, append: bool) -> Work:
    """Return what is to be done.

    Raises:
        InputError: the dataset was prepared from another source or with options that give other pixels.
    """
    existing = read_manifest(dataset) if not overwrite else None
    if existing is None:
        return "decode"
    wanted = {"source": source, **config.model_dump(exclude={"max_bad_fraction"})}
    there = {name: getattr(existing, name) for name in wanted}
    if not existing.value_range_given:
        # It was determined from the images, as it would be again.
        there["value_range"] = None
    different = {
        name: f"{name} is {there[name]}, not {value}" for name, value in wanted.items() if there[name] != value
    }
    if append and different:
        raise InputError(
            f"DATASET {dataset} was prepared differently ({'; '.join(different.values())}), and --append adds what "
            "is new in the same SOURCE; give the same options"
        )
    if different.keys() - set(_OF_SPLITS):
        raise InputError(
            f"DATASET {dataset} already contains a dataset that was prepared differently "
            f"({'; '.join(different.values())}); choose another DATASET, or replace it with --overwrite"
        )
    if append:
        return "append"
    return "draw" if different or not _is_whole(dataset, existing) else "nothing"


def _is_whole(dataset: str, existing: Manifest) -> bool:
    """Return whether no preparation was killed between the index and the manifest."""
    if not is_started(dataset):
        return True
    try:
        read_index(dataset, existing, columns=[])
    except InputError:
        return False
    return True


def _check_rejected(
    staging: str, images: pa.Table, rejected: pa.Table, class_names: list[str], config: PrepareConfig
) -> None:
    """Raise InputError if too many files were rejected, of all files or of one class."""
    num_images = len(images) + len(rejected)
    kept, lost = (np.bincount(table["label"].to_numpy(), minlength=len(class_names)) for table in (images, rejected))
    most_lost = np.maximum(config.max_bad_fraction, _MOST_BAD_OF_CLASS) * (kept + lost)
    is_gone = (kept == 0) & (lost > 0)
    gone = np.flatnonzero(is_gone | (lost > most_lost))
    fraction = len(rejected) / num_images
    if fraction <= config.max_bad_fraction and not len(gone):
        return
    # Else files that the user fixes would stay rejected: the plan may not change with a table or a permission.
    delete_records_of(staging, rejected)
    first = ", ".join(f"{row['path']} ({row['reason']})" for row in rejected.slice(0, 3).to_pylist())
    message = (
        f"{len(rejected)} of {format_count(num_images, 'image')} were rejected ({fraction:.1%}, allowed: "
        f"{config.max_bad_fraction:.1%}): {first}, ..."
    )
    if len(gone):
        classes = [
            f"{class_names[label]} {lost[label]} of {kept[label] + lost[label]} "
            f"({count_suffixes(rejected.filter(pc.field('label') == label)['path'].to_pylist())})"
            for label in gone[:MOST_NAMED]
        ]
        more = f" and {len(gone) - MOST_NAMED} more" if len(gone) > MOST_NAMED else ""
        message += f"; classes that lost most of their files: {', '.join(classes)}{more}"
    raise InputError(
        f"{message}; fix them, convert them to one of {', '.join(FORMATS)}, or "
        + ("remove the classes that have no image left" if is_gone.any() else "raise --max-bad-fraction")
    )
