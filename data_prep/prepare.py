"""Prepare a dataset: list the images, decode them with Ray Data, draw the splits, write the files and the manifest.

    source --find_images--> slices --decode (Ray Data)--> staged chunks --assign_splits--> --write (Ray Data)--> dataset

Images with more than 8 bits per channel are measured first and decoded once the range of their values is known: see
`data_prep.values`.

The slices depend only on the source and the options. So the same source, options and seed give the same dataset on any
number of nodes, and chunks that an interrupted attempt staged are used again.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field, ValidationError

from data_prep.card import CARD_NAME, CONTACT_SHEET_NAME, write_card
from data_prep.decode import ImageOptions, Pixels, decode_or_measure
from data_prep.duplicates import HASH_BYTES, group_duplicates, list_duplicates, perceptual_hash
from data_prep.formats import FORMATS
from data_prep.images import decode_listed, slice_images
from data_prep.manifest import (
    DUPLICATES_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS,
    DataFile,
    Manifest,
    Split,
    SplitName,
    read_manifest,
)
from data_prep.names import MOST_NAMED, count_suffixes
from data_prep.shards import (
    ROWS_SUFFIX,
    STAGED_SCHEMA,
    read_chunk_pixels,
    read_chunk_rows,
    write_chunk,
    write_data_file,
)
from data_prep.sources import Source, SourceFormat, find_images
from data_prep.splits import assign_splits, least_class_size
from data_prep.values import ValueRange, find_value_range
from trainer.runtime import storage
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import OnEvent, StageProgressed, ValueRangeFound, ignore_event
from trainer.runtime.lease import hold_lease
from trainer.runtime.markdown import format_count

_DATA_FILE_BYTES = 128 * 2**20
# Ray Data takes about 0.1 s to notice the end of a task and to start the next. So a task gets several slices if there
# are enough of them to keep every core busy, but not so many that other cores wait long for the last task.
_LEAST_TASKS_PER_CORE = 4
_MAX_ITEMS_PER_TASK = 16
# A class that loses more of its files than this is not usable, however many files the other classes have.
_MOST_BAD_OF_CLASS = 0.5
_STAGING = "_staging"
# A file in the staging folder that says that a preparation was started here and has not been finished.
_STARTED_NAME = "plan"
_STAGING_NAME_LENGTH = 16
_CHUNK_PREFIX = "chunk-"
_DATA_FILE_NAME = re.compile(r"part-\d{5,}\.parquet")


class PrepareConfig(ImageOptions):
    """The options that determine a prepared dataset, together with its source."""

    val_fraction: float = Field(0.15, gt=0, lt=1)
    """Fraction of each class for the val split, unless the source has a val split."""
    test_fraction: float = Field(0.15, ge=0, lt=1)
    """Fraction of each class for the test split, unless the source has splits of its own."""
    seed: int = 0
    """Random seed of the splits."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest fraction of rejected files with which the preparation succeeds."""


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
    on_event: OnEvent = ignore_event,
) -> Manifest:
    """Prepare a dataset; Ray must be connected.

    Args:
        source: local folder or file, or s3:// prefix or object; see `data_prep.sources`.
        dataset: local folder or s3:// prefix to write to.
        config: how to decode the images and draw the splits.
        source_format: format of the source; None detects it.
        overwrite: replace the dataset if there is one.
        on_event: called with what was found in the source, and with the progress.

    Returns:
        The manifest, as in ``manifest.json``; that of the existing dataset if the same preparation was done before.

    Raises:
        InputError: the source or the dataset cannot be used, or too many files were rejected.
        JobError: a task of Ray Data failed, or the disk is full.
    """
    if existing := check_places(source, dataset, config, overwrite=overwrite):
        return existing
    source, dataset = storage.resolve_uri(source), storage.resolve_uri(dataset)
    # Not in the staging folder, which is deleted while the lease is held.
    with hold_lease(storage.join(dataset, "_lease"), f"DATASET {dataset}") as lease:
        # Another job may have finished the dataset in the meantime.
        if not overwrite and (existing := _read_same_preparation(source, dataset, config)):
            return existing
        found = find_images(source, source_format)
        if found.listed.is_notable:
            on_event(found.listed)
        if overwrite:
            _delete_dataset(dataset)
        slices = slice_images(found, config)
        staging = _open_staging(dataset, found, config)
        staged = _stage_images(found, staging, slices, ImageOptions.of(config), on_event)
        images, rejected = staged.rows.filter(_is_used()), staged.rows.filter(~_is_used())
        _check_rejected(staging, images, rejected, found.class_names, config)
        groups = group_duplicates(np.asarray(images["pixels_sha256"]), _stack_hashes(images["perceptual_hash"]))
        splits = assign_splits(images, groups, config.val_fraction, config.test_fraction, config.seed)
        _check_val(images, splits, config)
        files, histogram = _write_data_files(dataset, staged.uris, images, splits, config, on_event)

        duplicates = list_duplicates(images, groups, splits)
        storage.write_bytes(storage.join(dataset, DUPLICATES_NAME), storage.parquet_bytes(duplicates))
        rejected = rejected.select(["path", "reason"])
        rejected = pa.concat_tables([rejected, found.ignored.cast(rejected.schema)]).sort_by("path")
        storage.write_bytes(storage.join(dataset, REJECTED_NAME), storage.parquet_bytes(rejected))
        manifest = _build_manifest(
            source, found, config, staged.value_range, images, splits, files, histogram, rejected, duplicates
        )
        write_card(dataset, manifest)
        lease.check()
        storage.write_bytes(storage.join(dataset, MANIFEST_NAME), manifest.to_json())
        storage.delete_folder(storage.join(dataset, _STAGING))
    return manifest


def check_places(source: str, dataset: str, config: PrepareConfig, *, overwrite: bool = False) -> Manifest | None:
    """Check that the source exists and that the dataset can be written, before connecting to a cluster.

    Returns:
        The manifest of the existing dataset if the same preparation was done before and is not to be replaced, or None.

    Raises:
        InputError: the source does not exist, or the dataset cannot be written or was prepared with other options.
    """
    source, dataset = storage.resolve_uri(source), storage.resolve_uri(dataset)
    if storage.join(dataset, "").startswith(storage.join(source, "")):
        raise InputError(f"DATASET {dataset} is inside SOURCE {source}; give a folder outside it")
    if storage.join(source, "").startswith(storage.join(dataset, "")):
        raise InputError(f"SOURCE {source} is inside DATASET {dataset}; give a folder outside it")
    if not overwrite and (existing := _read_same_preparation(source, dataset, config)):
        return existing
    if not storage.exists(source):
        raise InputError(
            f"SOURCE {source} does not exist; give a folder or prefix of images, or a file that lists them"
        )
    _check_names_are_free(dataset)
    storage.check_access(dataset)
    return None


def _check_names_are_free(dataset: str) -> None:
    """Check that a preparation would only replace files that a preparation wrote.

    Raises:
        InputError: a file with one of the names exists, and no preparation was started here; the message names it.
    """
    if any(storage.exists(storage.join(dataset, *path)) for path in ((MANIFEST_NAME,), (_STAGING, _STARTED_NAME))):
        return
    names = [REJECTED_NAME, DUPLICATES_NAME, CARD_NAME, CONTACT_SHEET_NAME]
    taken = [name for name in names if storage.exists(storage.join(dataset, name))]
    for split in SPLITS:
        files = storage.find_files(storage.join(dataset, split))
        taken += [f"{split}/{name}" for name in files if _DATA_FILE_NAME.fullmatch(name)]
    if taken:
        raise InputError(
            f"DATASET {dataset} contains {taken[0]}, which no preparation wrote and this one would replace; choose "
            "another folder, or move the file"
        )


def _delete_dataset(dataset: str) -> None:
    """Delete the files that a preparation writes, the manifest first, and no other file in the folder."""
    # If this process is killed now, the folder is still known as that of a preparation.
    storage.write_bytes(storage.join(dataset, _STAGING, _STARTED_NAME), b"")
    for name in (MANIFEST_NAME, REJECTED_NAME, DUPLICATES_NAME, CARD_NAME, CONTACT_SHEET_NAME):
        storage.delete_file(storage.join(dataset, name))
    _delete_data_files(dataset)
    _delete_chunks(dataset)


def _delete_data_files(dataset: str) -> None:
    for split in SPLITS:
        for name in storage.find_files(storage.join(dataset, split)):
            if _DATA_FILE_NAME.fullmatch(name):
                storage.delete_file(storage.join(dataset, split, name))


def _read_same_preparation(source: str, dataset: str, config: PrepareConfig) -> Manifest | None:
    """Return the manifest of the existing dataset, or None if there is none.

    Raises:
        InputError: the dataset was prepared from another source or with other options.
    """
    existing = read_manifest(dataset)
    if existing is None:
        return None
    wanted = {"source": source, **config.model_dump(exclude={"max_bad_fraction"})}
    there = {name: getattr(existing, name) for name in wanted}
    if not existing.value_range_given:
        # It was determined from the images, as it would be again.
        there["value_range"] = None
    different = [f"{name} is {there[name]}, not {value}" for name, value in wanted.items() if there[name] != value]
    if different:
        raise InputError(
            f"DATASET {dataset} already contains a dataset that was prepared differently ({'; '.join(different)}); "
            "choose another DATASET, or replace it with --overwrite"
        )
    return existing


def _open_staging(dataset: str, found: Source, config: PrepareConfig) -> str:
    """Return the URI of the staging folder of this preparation; delete the chunks of any other preparation.

    The folder is named after all that the chunks depend on. An interrupted attempt at the same preparation left its
    chunks there. A task of another attempt that is still running writes to another folder.

    Data files of an interrupted attempt are deleted in any case: it may have drawn other splits.
    """
    digest = hashlib.sha256(config.model_dump_json(include=set(ImageOptions.model_fields)).encode())
    for batch in found.images.combine_chunks().to_batches():
        digest.update(batch.serialize())
    name = digest.hexdigest()[:_STAGING_NAME_LENGTH]
    if storage.exists(storage.join(dataset, _STAGING, _STARTED_NAME)):
        _delete_data_files(dataset)
    _delete_chunks(dataset, kept=name)
    storage.write_bytes(storage.join(dataset, _STAGING, _STARTED_NAME), b"")
    return storage.join(dataset, _STAGING, name)


def _delete_chunks(dataset: str, kept: str | None = None) -> None:
    """Delete all staged chunks, except for those in the staging folder with the name `kept`."""
    for path in storage.find_files(storage.join(dataset, _STAGING)):
        *folders, name = path.split("/")
        if name.startswith(_CHUNK_PREFIX) and folders != [kept]:
            storage.delete_file(storage.join(dataset, _STAGING, path))


def _chunk_uri(staging: str, index: int) -> str:
    return storage.join(staging, f"{_CHUNK_PREFIX}{index:06d}")


def _stage_images(
    found: Source, staging: str, slices: list[range], options: ImageOptions, on_event: OnEvent
) -> "_Staged":
    """Decode all images; in a second pass, once the range of values is known, those that need it to be scaled."""
    uris = [_chunk_uri(staging, index) for index in range(len(slices))]
    _stage_chunks("decode", found, staging, slices, uris, options, on_event)
    rows = _read_staged_rows(uris)
    waiting = rows.filter(pc.field("low").is_valid())
    if len(waiting):
        ranges = [
            ValueRange(*ends) for ends in zip(waiting["low"].to_pylist(), waiting["high"].to_pylist(), strict=True)
        ]
        value_range = find_value_range(ranges)
        of_all = ValueRange(min(one.low for one in ranges), max(one.high for one in ranges))
        dark = sum(one.high < value_range.low + (value_range.high - value_range.low) / 10 for one in ranges)
        on_event(ValueRangeFound(len(waiting), str(of_all), str(value_range), dark))
        options = options.model_copy(update={"value_range": value_range})
        chunks = waiting["chunk"].unique().to_pylist()
        for chunk in chunks:
            # The range is part of the name: if another file changes the range, these images are decoded again.
            uris[chunk] += f"-{value_range.low!r}_{value_range.high!r}"
        of_chunks = [slices[chunk] for chunk in chunks], [uris[chunk] for chunk in chunks]
        _stage_chunks("decode again", found, staging, *of_chunks, options, on_event)
        rows = _read_staged_rows(uris)
    return _Staged(uris, rows, options.value_range)


class _Staged(NamedTuple):
    """The staged chunks of a source."""

    uris: list[str]
    rows: pa.Table
    """One row per file of the source: the columns of STAGED_SCHEMA, and chunk, the index into uris."""
    value_range: ValueRange | None


def _stage_chunks(
    stage: str,
    found: Source,
    staging: str,
    slices: list[range],
    uris: list[str],
    options: ImageOptions,
    on_event: OnEvent,
) -> None:
    staged = storage.find_files(staging)
    items: list[dict[str, Any]] = [
        {"uri": uri, "start": rows.start, "rows": len(rows)}
        for uri, rows in zip(uris, slices, strict=True)
        if storage.basename(uri) + ROWS_SUFFIX not in staged
    ]
    total = sum(len(rows) for rows in slices)
    done = total - sum(item["rows"] for item in items)
    on_event(StageProgressed(stage, done, total))
    # One copy of the list per node, in Ray's shared memory.
    images = ray.put(found.images)
    for result in _run_tasks(_decode_slice, items, images=images, source=found.uri, options=options):
        done += result["images"]
        on_event(StageProgressed(stage, done, total))


def _run_tasks(function: Callable[..., dict[str, Any]], items: list[dict[str, Any]], **arguments: Any) -> Any:
    """Yield ``function(item, **arguments)`` for each item as the tasks of Ray Data that run it finish.

    Raises:
        InputError: a task raised it.
        JobError: a task failed with another error.
    """
    if not items:
        return
    least_tasks = int(_LEAST_TASKS_PER_CORE * ray.cluster_resources().get("CPU", 1))
    num_tasks = min(len(items), max(least_tasks, math.ceil(len(items) / _MAX_ITEMS_PER_TASK)))
    dataset = ray.data.from_items(items, override_num_blocks=num_tasks)
    try:
        for result in dataset.map(_report_error, fn_args=(function,), fn_kwargs=arguments).iter_rows():
            # If one row of a task has this column, Ray fills it with None in the others.
            if result.get("error") is not None:
                raise InputError(result["error"])
            yield result
    except ray.exceptions.RayError as error:
        # Ray keeps the error of the task only as text, above its own error.
        own = str(error).partition("\n\n")[0].splitlines()[-1]
        raise JobError(f"a task of Ray Data failed: {own}") from error


def _report_error(item: dict[str, Any], function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Return the result of the function, or an InputError as a row for `_run_tasks` to raise: Ray does not keep it."""
    try:
        return function(item, **arguments)
    except InputError as error:
        return {"error": str(error)}


def _decode_slice(item: dict[str, Any], images: Any, source: str, options: ImageOptions) -> dict[str, Any]:
    """Decode the images of one slice and stage them as one chunk."""
    uri = item["uri"]
    if storage.exists(uri + ROWS_SUFFIX):
        # Ray restarts a task whose node or process died; the chunks that it had committed are kept.
        return {"images": item["rows"]}
    listed = ray.get(images).slice(item["start"], item["rows"])
    pixels: list[Pixels] = []
    rows: list[dict[str, Any]] = []
    contents, outcomes = decode_listed(source, listed, options, decode_or_measure)
    for row, content, outcome in zip(
        listed.select(["path", "label", "split"]).to_pylist(), contents, outcomes, strict=True
    ):
        if isinstance(outcome, str):
            rows.append({**row, "reason": outcome})
            continue
        if isinstance(outcome, ValueRange):
            rows.append({**row, **outcome._asdict()})
            continue
        pixels.append(outcome)
        rows.append(
            {
                **row,
                "sha256": hashlib.sha256(content or b"").hexdigest(),
                "pixels_sha256": hashlib.sha256(outcome.data).hexdigest(),
                "perceptual_hash": perceptual_hash(outcome),
            }
        )
    shape = (len(pixels), options.image_size, options.image_size, options.channels)
    stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
    write_chunk(uri, stacked, pa.Table.from_pylist(rows, schema=STAGED_SCHEMA))
    return {"images": len(rows)}


def _stack_hashes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    flat = np.frombuffer(b"".join(column.to_pylist()), np.uint8)
    return flat.reshape(-1, HASH_BYTES)


def _read_staged_rows(uris: list[str]) -> pa.Table:
    """Return the rows of all staged chunks, each with the index of its chunk."""
    tables = []
    for chunk, uri in enumerate(uris):
        rows = read_chunk_rows(uri)
        tables.append(rows.append_column("chunk", pa.array([chunk] * len(rows), pa.int32())))
    return pa.concat_tables(tables)


def _is_used() -> pc.Expression:
    """Return the expression that is true for rows of images and false for rows of rejected files."""
    return pc.field("reason").is_null()


def _check_rejected(
    staging: str, images: pa.Table, rejected: pa.Table, class_names: list[str], config: PrepareConfig
) -> None:
    """Raise InputError if too many files were rejected, of all files or of one class."""
    num_images = len(images) + len(rejected)
    kept, lost = (np.bincount(table["label"].to_numpy(), minlength=len(class_names)) for table in (images, rejected))
    most_lost = np.maximum(config.max_bad_fraction, _MOST_BAD_OF_CLASS) * (kept + lost)
    gone = np.flatnonzero((kept == 0) | (lost > most_lost))
    fraction = len(rejected) / num_images
    if fraction <= config.max_bad_fraction and not len(gone):
        return
    # Else files that the user fixes would stay rejected: the plan may not change with a table or a permission.
    chunks = {storage.basename(_chunk_uri(staging, chunk)) for chunk in rejected["chunk"].unique().to_pylist()}
    for name in storage.find_files(staging):
        if name[: len(_CHUNK_PREFIX) + 6] in chunks and name.endswith(ROWS_SUFFIX):
            storage.delete_file(storage.join(staging, name))
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
        + ("remove the classes that have no image left" if (kept == 0).any() else "raise --max-bad-fraction")
    )


def _check_val(images: pa.Table, splits: list[SplitName], config: PrepareConfig) -> None:
    """Raise InputError if the val split is empty."""
    if "val" in splits:
        return
    drawn_from = images.filter(pc.field("split").is_null() | (pc.field("split") == "train"))
    sizes = drawn_from["label"].value_counts().field("counts").to_pylist()
    test_fraction = 0.0 if images["split"].null_count < len(images) else config.test_fraction
    needed = least_class_size(config.val_fraction, test_fraction)
    smallest = format_count(min(sizes), "image")
    raise InputError(
        f"the val split is empty: the smallest class has {smallest}, the largest {max(sizes)}; "
        f"with --val-fraction {config.val_fraction:g} and --test-fraction {test_fraction:g} a class needs {needed}, "
        "not counting duplicates, to give one to val; add images"
        + (" or give a larger --val-fraction" if max(sizes) > 1 else "")
    )


def _write_data_files(
    dataset: str,
    uris: list[str],
    images: pa.Table,
    splits: list[SplitName],
    config: PrepareConfig,
    on_event: OnEvent,
) -> tuple[dict[SplitName, list[DataFile]], npt.NDArray[np.int64]]:
    """Write the Parquet files; return them with the histogram ``[channels, 256]`` of the train split's pixels."""
    chunks = np.asarray(images["chunk"])
    split_of = np.asarray(splits)
    rows_per_file = max(1, _DATA_FILE_BYTES // (config.image_size**2 * config.channels))
    # Consecutive chunks are combined until their images, most of which are in train, would fill one file.
    part_of_chunk = np.cumsum(np.bincount(chunks)) // rows_per_file
    items = []
    for part in np.unique(part_of_chunk):
        members = np.flatnonzero(part_of_chunk == part)
        items.append(
            {
                "part": int(part),
                "uris": [uris[chunk] for chunk in members],
                "splits": split_of[np.isin(chunks, members)].tolist(),
            }
        )
    histogram = np.zeros((config.channels, 256), np.int64)
    files: dict[SplitName, list[DataFile]] = {split: [] for split in SPLITS}
    done = 0
    on_event(StageProgressed("write", done, len(splits)))
    for result in _run_tasks(_write_part, items, dataset=dataset):
        for split, file in json.loads(result["files"]).items():
            files[split].append(DataFile.model_validate(file))
        histogram += np.asarray(result["histogram"])
        done += result["images"]
        on_event(StageProgressed("write", done, len(splits)))
    return {split: sorted(of_split, key=lambda file: file.path) for split, of_split in files.items()}, histogram


def _write_part(item: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Write the images of consecutive chunks as one Parquet file per split."""
    images = [image for uri in item["uris"] for image in read_chunk_pixels(uri)]
    rows = pa.concat_tables([read_chunk_rows(uri) for uri in item["uris"]]).filter(_is_used())
    if [hashlib.sha256(image.data).hexdigest() for image in images] != rows["pixels_sha256"].to_pylist():
        raise InputError(
            f"{storage.join(dataset, _STAGING)}: staged images are damaged; decode them again with --overwrite"
        )
    split_of = np.asarray(item["splits"])
    files: dict[str, Any] = {}
    for split in SPLITS:
        members = np.flatnonzero(split_of == split)
        if len(members):
            path = f"{split}/part-{item['part']:05d}.parquet"
            of_split = rows.take(members).select(["label", "path", "sha256"])
            files[split] = write_data_file(dataset, path, [images[row] for row in members], of_split).model_dump()
    histogram = _channel_histogram([images[row] for row in np.flatnonzero(split_of == "train")], images[0].shape[-1])
    return {"files": json.dumps(files), "histogram": histogram, "images": len(images)}


def _channel_histogram(images: Sequence[Pixels], channels: int) -> npt.NDArray[np.int64]:
    """Return how often each value occurs in each channel; exact in any order, unlike a sum of floats."""
    histogram = np.zeros((channels, 256), np.int64)
    # One image at a time: OpenCV returns counts as float32, which is exact only up to 2**24.
    for image in images:
        for channel in range(channels):
            histogram[channel] += cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    return histogram


def _build_manifest(
    source: str,
    found: Source,
    config: PrepareConfig,
    value_range: ValueRange | None,
    images: pa.Table,
    splits: list[SplitName],
    files: dict[SplitName, list[DataFile]],
    histogram: npt.NDArray[np.int64],
    rejected: pa.Table,
    duplicates: pa.Table,
) -> Manifest:
    labels, split_of = np.asarray(images["label"]), np.asarray(splits)
    num_classes = len(found.class_names)
    described = {
        split: Split(
            rows_per_class=np.bincount(labels[split_of == split], minlength=num_classes).tolist(), files=files[split]
        )
        for split in SPLITS
    }
    values = np.arange(256)
    pixels = histogram.sum(axis=1)
    mean = histogram @ values / pixels
    std = np.sqrt(histogram @ values**2 / pixels - mean**2)
    visible = {
        "image_size": config.image_size,
        "channels": config.channels,
        "class_names": found.class_names,
        "files": {split: [file.content_sha256 for file in files[split]] for split in SPLITS},
    }
    return Manifest(
        image_size=config.image_size,
        channels=config.channels,
        resize=config.resize,
        background=config.background,
        value_range=value_range,
        value_range_given=config.value_range is not None,
        class_names=found.class_names,
        splits=described,
        rejected=dict(Counter(rejected["reason"].to_pylist()).most_common()),
        duplicate_images=len(duplicates),
        leaked_images=pc.sum(duplicates["leaks"]).as_py() or 0,
        pixel_mean=mean.tolist(),
        pixel_std=std.tolist(),
        gray_levels=_gray_levels(histogram.sum(axis=0)),
        seed=config.seed,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        source=source,
        fingerprint=hashlib.sha256(json.dumps(visible).encode()).hexdigest(),
    )


def _gray_levels(histogram: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return the gray levels between which 99% of the values lie, given how often each of the 256 levels occurs."""
    below = np.cumsum(histogram) / histogram.sum()
    return int(np.searchsorted(below, 0.005, side="right")), int(np.searchsorted(below, 0.995))
