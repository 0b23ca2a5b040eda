"""Decode the images of a source to the shards of a dataset, as tasks of Ray Data that an interruption hardly costs.

Each task decodes a fixed range of the listed files to one shard, and then records it in a table of the staging folder.
A preparation that was interrupted uses what is recorded. Images with more than 8 bits per channel are measured first,
and their shards are decoded once the range of their values is known: see `data_prep.values`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from data_prep.decode import ImageOptions, Pixels, decode_or_measure
from data_prep.duplicates import perceptual_hash
from data_prep.images import decode_listed
from data_prep.manifest import INDEX_SCHEMA, Shard
from data_prep.shards import write_shard
from data_prep.values import ValueRange, find_value_range
from trainer.runtime import storage
from trainer.runtime.ahead import call_ahead
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import OnEvent, StageProgressed, TasksFinished, ValueRangeFound

SHARDS_FOLDER = "shards"
_STAGING = "_staging"
# A file in the staging folder that says that a preparation was started here and has not been finished.
_STARTED_NAME = "plan"
_STAGING_NAME_LENGTH = 16
_ROWS_PREFIX, _ROWS_SUFFIX = "chunk-", ".rows.parquet"
_SHARD_BYTES = 128 * 2**20
# A small dataset has smaller shards, so that many cores can decode it, but none so small that it is not worth a file.
_SHARDS_OF_SMALL_DATASET = 64
_LEAST_SHARD_IMAGES = 256
# A task gets several shards if there are so many that cores do not wait long for the last task.
_LEAST_TASKS_PER_CORE = 4
_MAX_ITEMS_PER_TASK = 16
# Reads of records overlap the latency of an object store.
_READERS = 8
# Values are counted in a grid of about this many pixels a side.
_COUNTED_SIDE = 64

STAGED_SCHEMA = pa.schema(
    [
        *(INDEX_SCHEMA.field(name) for name in INDEX_SCHEMA.names if name not in ("shard", "row", "split")),
        ("reason", pa.string()),  # null, or why the file was rejected
        ("low", pa.float64()),  # null, or the smallest value of an image that needs the range of the dataset
        ("high", pa.float64()),  # null, or the largest value of such an image
    ]
)


class Staged(NamedTuple):
    """The decoded images of a source."""

    images: pa.Table
    """INDEX_SCHEMA without split, in the order of the shards."""
    rejected: pa.Table
    """STAGED_SCHEMA, one row per file that was rejected, and number, that of its range of files."""
    shards: list[Shard]
    value_range: ValueRange | None
    value_counts: npt.NDArray[np.int64]
    """``[256]``, how often each value occurs in a grid of pixels of all images."""


def is_started(dataset: str) -> bool:
    """Return whether a preparation of the dataset was started and has not been finished."""
    return storage.exists(storage.join(dataset, _STAGING, _STARTED_NAME))


def mark_started(dataset: str) -> None:
    """Record that a preparation of the dataset was started: if it is killed, its files are known as such."""
    storage.write_bytes(storage.join(dataset, _STAGING, _STARTED_NAME), b"")


def open_staging(dataset: str, listed: pa.Table, options: ImageOptions) -> str:
    """Return the URI of the staging folder of a preparation; delete what others staged.

    The folder is named after all that the pixels depend on. An interrupted attempt at the same preparation left its
    records there. A task of another attempt that is still running writes to another folder, and other shards.
    """
    digest = hashlib.sha256(options.model_dump_json(include=set(ImageOptions.model_fields)).encode())
    for batch in listed.combine_chunks().to_batches():
        digest.update(batch.serialize())
    name = digest.hexdigest()[:_STAGING_NAME_LENGTH]
    delete_records(dataset, kept=name)
    mark_started(dataset)
    return storage.join(dataset, _STAGING, name)


def delete_records(dataset: str, kept: str | None = None) -> None:
    """Delete all records of staged shards, except for those in the staging folder with the name `kept`."""
    for path in storage.find_files(storage.join(dataset, _STAGING)):
        *folders, name = path.split("/")
        if name.startswith(_ROWS_PREFIX) and folders != [kept]:
            storage.delete_file(storage.join(dataset, _STAGING, path))


def delete_staging(dataset: str) -> None:
    """Delete the staging folder: the preparation is finished."""
    storage.delete_folder(storage.join(dataset, _STAGING))


def delete_records_of(staging: str, rejected: pa.Table) -> None:
    """Delete the records of the ranges in which files were rejected: the user may fix these files."""
    numbers = {f"{_ROWS_PREFIX}{number:06d}" for number in rejected["number"].unique().to_pylist()}
    for name in storage.find_files(staging):
        if name[: len(_ROWS_PREFIX) + 6] in numbers and name.endswith(_ROWS_SUFFIX):
            storage.delete_file(storage.join(staging, name))


def stage_images(
    dataset: str,
    staging: str,
    source: str,
    listed: pa.Table,
    options: ImageOptions,
    before: list[Shard],
    on_event: OnEvent,
) -> Staged:
    """Decode the listed files to shards, unless an earlier attempt did.

    Args:
        dataset: URI of the dataset.
        staging: from `open_staging`.
        source: URI of the folder that paths and containers are relative to.
        listed: table with the columns of `data_prep.sources.IMAGES_SCHEMA`, at least one row.
        options: how to decode.
        before: shards of the dataset that the new ones come after.
        on_event: called with the progress.

    Raises:
        InputError: the source or the dataset cannot be used.
        JobError: a task failed, or the disk is full.
    """
    first = _next_number(before)
    items = [
        {"record": storage.join(staging, f"{_ROWS_PREFIX}{number:06d}"), "number": first + number}
        | {"start": rows.start, "rows": len(rows)}
        for number, rows in enumerate(_divide(len(listed), options))
    ]
    decode = _Decode(dataset, staging, source, listed)
    decode.run("decode", items, options, on_event)
    records = _read_records(items)
    rows = _join_records(records)
    waiting = rows.filter(pc.field("low").is_valid())
    if len(waiting):
        ranges = [
            ValueRange(*ends) for ends in zip(*(waiting[end].to_pylist() for end in ("low", "high")), strict=True)
        ]
        value_range = find_value_range(ranges)
        of_all = ValueRange(min(one.low for one in ranges), max(one.high for one in ranges))
        dark = sum(one.high < value_range.low + (value_range.high - value_range.low) / 10 for one in ranges)
        on_event(ValueRangeFound(len(waiting), str(of_all), str(value_range), dark))
        options = options.model_copy(update={"value_range": value_range})
        again = [items[number] for number in waiting["number"].unique().to_pylist()]
        for item in again:
            # The range is part of the name: if another file changes the range, these images are decoded again.
            item["record"] += f"-{value_range.low!r}_{value_range.high!r}"
        decode.run("decode again", again, options, on_event)
        records = _read_records(items)
        rows = _join_records(records)
    all_shards = [Shard.model_validate_json(one.schema.metadata[b"shard"]) for one in records]
    _check_shards(dataset, items, all_shards)
    shards = [shard for shard in all_shards if shard.rows]
    counts = sum(
        (np.array(json.loads(one.schema.metadata[b"value_counts"])) for one in records), np.zeros(256, np.int64)
    )
    rejected = rows.filter(pc.field("reason").is_valid())
    images = _place_rows(rows.filter(pc.field("reason").is_null()), shards, len(before))
    return Staged(images, rejected, shards, options.value_range, counts)


def _next_number(before: list[Shard]) -> int:
    """Return the number of the first shard after others, so that their order is also that of their names."""
    return int(storage.basename(before[-1].path).partition("-")[0]) + 1 if before else 0


def _check_shards(dataset: str, items: list[dict[str, Any]], shards: list[Shard]) -> None:
    """Check that every recorded shard is there; delete the record of one that is not.

    Raises:
        InputError: a shard is missing, or not of the size that was recorded.
    """
    sizes = storage.find_files(storage.join(dataset, SHARDS_FOLDER))
    lost = [
        (item, shard)
        for item, shard in zip(items, shards, strict=True)
        if shard.rows and sizes.get(storage.basename(shard.path)) != shard.bytes
    ]
    for item, _ in lost:
        storage.delete_file(item["record"] + _ROWS_SUFFIX)
    if lost:
        raise InputError(
            f"{storage.join(dataset, lost[0][1].path)} is missing or incomplete, though it was written; run the same "
            "command again to decode its images again"
        )


def _divide(num_images: int, options: ImageOptions) -> list[range]:
    """Return the range of rows of each shard; the same number and options always give the same ranges."""
    most = _SHARD_BYTES // (options.image_size**2 * options.channels)
    rows = max(1, min(most, max(_LEAST_SHARD_IMAGES, math.ceil(num_images / _SHARDS_OF_SMALL_DATASET))))
    return [range(start, min(start + rows, num_images)) for start in range(0, num_images, rows)]


def _place_rows(images: pa.Table, shards: list[Shard], first: int) -> pa.Table:
    """Return the rows of images with the number of their shard and their row in it: shards hold them in this order."""
    sizes = [shard.rows for shard in shards]
    columns = {
        "shard": pa.array(np.repeat(np.arange(first, first + len(sizes), dtype=np.int32), sizes)),
        "row": pa.array(np.concatenate([np.arange(size, dtype=np.int32) for size in (*sizes, 0)])),
    }
    kept = [name for name in INDEX_SCHEMA.names if name in images.column_names]
    return pa.table({**columns, **{name: images[name] for name in kept}})


class _Decode(NamedTuple):
    """What all decoding tasks of a preparation have in common."""

    dataset: str
    staging: str
    source: str
    listed: pa.Table

    def run(self, stage: str, items: list[dict[str, Any]], options: ImageOptions, on_event: OnEvent) -> None:
        """Decode the items whose record is missing."""
        staged = storage.find_files(self.staging)
        missing = [item for item in items if storage.basename(item["record"]) + _ROWS_SUFFIX not in staged]
        total = sum(item["rows"] for item in items)
        done = total - sum(item["rows"] for item in missing)
        on_event(StageProgressed(stage, done, total))
        # One copy of the list per node, in Ray's shared memory.
        listed = ray.put(self.listed)
        common = {"listed": listed, "dataset": self.dataset, "source": self.source, "options": options}

        def report(statistics: str) -> None:
            on_event(TasksFinished(stage, statistics))

        for result in run_tasks(_decode_range, missing, report, **common):
            done += result["images"]
            on_event(StageProgressed(stage, done, total))


def run_tasks(
    function: Callable[..., dict[str, Any]],
    items: list[dict[str, Any]],
    on_end: Callable[[str], None] = lambda statistics: None,
    **arguments: Any,
) -> Iterator[Any]:
    """Yield ``function(item, **arguments)`` for each item as the tasks of Ray Data that run it finish.

    Args:
        function: what a task calls for each of its items.
        items: arguments of the calls.
        on_end: called with Ray Data's statistics after the last result.
        **arguments: further arguments of each call.

    Raises:
        InputError: a task raised it.
        JobError: a task failed with another error.
    """
    if not items:
        return
    least_tasks = int(_LEAST_TASKS_PER_CORE * ray.cluster_resources().get("CPU", 1))
    num_tasks = min(len(items), max(least_tasks, math.ceil(len(items) / _MAX_ITEMS_PER_TASK)))
    dataset = ray.data.from_items(items, override_num_blocks=num_tasks)
    # All tasks wait in the queue of Ray, which starts one as soon as a core is free. With a reservation Ray Data would
    # start a task only 0.1 s after another ended, and in the first second only one. Their results take no memory.
    dataset.context.op_resource_reservation_enabled = False
    results = dataset.map(_report_error, fn_args=(function,), fn_kwargs=arguments)
    try:
        for result in results.iter_rows():
            # If one row of a task has this column, Ray fills it with None in the others.
            if result.get("error") is not None:
                raise InputError(result["error"])
            yield result
        on_end(results.stats())
    except ray.exceptions.RayError as error:
        # Ray keeps the error of the task only as text, above its own error.
        own = str(error).partition("\n\n")[0].splitlines()[-1]
        raise JobError(f"a task of Ray Data failed: {own}") from error


def _report_error(item: dict[str, Any], function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Return the result of the function, or an InputError as a row for `run_tasks` to raise: Ray does not keep it."""
    try:
        return function(item, **arguments)
    except InputError as error:
        return {"error": str(error)}


def _decode_range(
    item: dict[str, Any], listed: Any, dataset: str, source: str, options: ImageOptions
) -> dict[str, Any]:
    """Decode one range of the listed files to a shard, and record it."""
    record = item["record"]
    if storage.exists(record + _ROWS_SUFFIX):
        # Ray restarts a task whose node or process died; the shards that it had recorded are kept.
        return {"images": item["rows"]}
    tag = hashlib.sha256("/".join(record.split("/")[-2:]).encode()).hexdigest()[:8]
    path = f"{SHARDS_FOLDER}/{item['number']:05d}-{tag}.arrow"
    of_range = ray.get(listed).slice(item["start"], item["rows"])
    counts = np.zeros(256, np.int64)
    rows: list[dict[str, Any]] = []
    shape = (options.image_size, options.image_size, options.channels)
    with write_shard(storage.join(dataset, path), shape) as shard:
        named = zip(
            of_range["path"].to_pylist(), of_range["label"].to_pylist(), of_range["split"].to_pylist(), strict=True
        )
        decoded = decode_listed(source, of_range, options, decode_or_measure)
        for (name, label, split), (content, outcome) in zip(named, decoded, strict=True):
            row: dict[str, Any] = {"path": name, "label": label, "given_split": split}
            if isinstance(outcome, str):
                row["reason"] = outcome
            elif isinstance(outcome, ValueRange):
                row |= outcome._asdict()
            else:
                shard.add(outcome)
                row |= _describe(content or b"", outcome, counts)
            rows.append(row)
    described = shard.describe(path).model_dump()
    if not described["rows"] or any("low" in row for row in rows):
        # The shard has no image, or will have more of them once their range is known.
        storage.delete_file(storage.join(dataset, path))
    metadata = {"shard": json.dumps(described), "value_counts": json.dumps(counts.tolist())}
    table = pa.Table.from_pylist(rows, schema=STAGED_SCHEMA).replace_schema_metadata(metadata)
    # Written last: its presence says that the shard is there.
    storage.write_bytes(record + _ROWS_SUFFIX, storage.parquet_bytes(table), sync=False)
    return {"images": len(rows)}


def _describe(content: bytes, pixels: Pixels, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return what the index says of an image, and add some of its values to the counts."""
    mean, std = (ends.ravel() for ends in cv2.meanStdDev(pixels))
    size = pixels.shape[0] * pixels.shape[1]
    step = -(-pixels.shape[0] // _COUNTED_SIDE)
    counts += np.bincount(pixels[::step, ::step].ravel(), minlength=256)
    return {
        "sha256": hashlib.sha256(content).digest(),
        "pixels_sha256": hashlib.sha256(pixels.data).digest(),
        "perceptual_hash": perceptual_hash(pixels),
        # Whole numbers below 2**53, so that rounding restores them exactly.
        "pixel_sums": np.rint(mean * size).astype(np.int64).tolist(),
        "pixel_squares": np.rint((std**2 + mean**2) * size).astype(np.int64).tolist(),
    }


def _read_records(items: list[dict[str, Any]]) -> list[pa.Table]:
    """Return the table of each record, whose metadata describe the shard."""
    names = [item["record"] + _ROWS_SUFFIX for item in items]
    contents = call_ahead(storage.read_bytes, names, ahead=_READERS, threads=_READERS)
    return [storage.parquet_table(content.result()) for content in contents]


def _join_records(records: list[pa.Table]) -> pa.Table:
    """Return the rows of all records, each with the number of its record."""
    numbers = np.repeat(np.arange(len(records), dtype=np.int32), [len(one) for one in records])
    joined = pa.concat_tables([one.replace_schema_metadata(None) for one in records])
    return joined.append_column("number", pa.array(numbers))
