"""Prepares a dataset: list, decode and stage with Ray Data, draw the splits, write the files, commit the manifest.

    source --find_images--> slices --decode (Ray Data)--> staged chunks --assign_splits--> --write (Ray Data)--> dataset

The slices depend on the source and the options alone, so the same source, options and seed give the same dataset on any
number of nodes, and chunks that an interrupted attempt staged are used again.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.decode import RejectedImageError, decode_image
from data_prep.manifest import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS,
    DataFile,
    Manifest,
    Split,
    SplitName,
    read_manifest,
)
from data_prep.shards import (
    ROWS_SUFFIX,
    STAGED_SCHEMA,
    read_chunk_pixels,
    read_chunk_rows,
    write_chunk,
    write_data_file,
)
from data_prep.sources import Source, find_images
from data_prep.splits import assign_splits
from trainer import storage
from trainer.errors import InputError
from trainer.events import OnEvent, StageProgressed, ignore_event

# A slice is one task: small enough to keep every core busy on a small source and to lose little when a node dies, and
# its images fit a worker's memory many times over.
_MAX_SLICE_IMAGES = 256
_MAX_SLICE_BYTES = 32 * 2**20
_DATA_FILE_BYTES = 128 * 2**20
# Reads overlap the latency of an object store; decoding stays on the task's one core.
_READERS_PER_TASK = 8
_STAGING = "_staging"


class PrepareConfig(BaseModel):
    """What a prepared dataset depends on besides its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(250, ge=1)
    """Height and width in pixels; the notes used 250."""
    channels: Literal[1, 3] = 1
    """1 for gray, 3 for RGB."""
    val_fraction: float = Field(0.15, gt=0, lt=1)
    """Of each class, unless the source has a val folder."""
    test_fraction: float = Field(0.15, ge=0, lt=1)
    """Of each class, unless the source has splits of its own."""
    seed: int = 0
    """Of the split."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """More rejected files than this fail the preparation."""


def parse_config(**values: Any) -> PrepareConfig:
    """Returns the config that the values describe.

    Raises:
        InputError: a value is not allowed; names the option.
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
            "on; give fractions that are below 1 together"
        )
    return config


def prepare(
    source: str, dataset: str, config: PrepareConfig, *, overwrite: bool = False, on_event: OnEvent = ignore_event
) -> Manifest:
    """Makes a prepared dataset of a class-folder source; needs a Ray cluster to be connected.

    Args:
        source: local folder or s3:// prefix.
        dataset: local folder or s3:// prefix to write to.
        config: size, channels and splits.
        overwrite: replace a dataset that is there.
        on_event: told about finished tasks.

    Returns:
        The manifest, as in ``manifest.json``; the one that is there if the same preparation had been done before.

    Raises:
        InputError: the source or the dataset cannot be used, or too many files were rejected.
    """
    source, dataset = storage.resolve_uri(source), storage.resolve_uri(dataset)
    if storage.join(dataset, "").startswith(storage.join(source, "")):
        raise InputError(f"DATASET {dataset} lies in SOURCE {source}; give a folder outside it")
    if overwrite:
        _delete_dataset(dataset)
    elif existing := read_manifest(dataset):
        _check_same_preparation(existing, source, dataset, config)
        return existing

    found = find_images(source)
    slices = _slice_images(found, config)
    _open_staging(dataset, found, config)
    _stage_chunks(found.uri, dataset, slices, config, on_event)
    images, rejected = _read_staged_rows(dataset, len(slices))
    _check_rejected(rejected, len(found.images), config)

    splits = assign_splits(images, config.val_fraction, config.test_fraction, config.seed)
    files, histogram = _write_data_files(dataset, images, splits, config, on_event)
    manifest = _build_manifest(found, config, images, splits, files, histogram, len(rejected))
    all_rejected = pa.concat_tables([rejected, found.ignored.cast(rejected.schema)])
    storage.write_bytes(storage.join(dataset, REJECTED_NAME), storage.parquet_bytes(all_rejected.sort_by("path")))
    storage.write_bytes(storage.join(dataset, MANIFEST_NAME), manifest.model_dump_json(indent=2).encode())
    storage.delete_folder(storage.join(dataset, _STAGING))
    return manifest


def _delete_dataset(dataset: str) -> None:
    """Deletes what a preparation writes, and nothing else that may be in the folder; the commit goes first."""
    for name in (MANIFEST_NAME, REJECTED_NAME):
        storage.delete_file(storage.join(dataset, name))
    for name in (*SPLITS, _STAGING):
        storage.delete_folder(storage.join(dataset, name))


def _check_same_preparation(existing: Manifest, source: str, dataset: str, config: PrepareConfig) -> None:
    wanted = {"source": source, **config.model_dump(exclude={"max_bad_fraction"})}
    different = [
        f"{name} {getattr(existing, name)} there, {value} asked"
        for name, value in wanted.items()
        if getattr(existing, name) != value
    ]
    if different:
        raise InputError(
            f"{dataset} already holds a dataset prepared otherwise ({'; '.join(different)}); "
            "choose another DATASET or replace it with --overwrite"
        )


def _slice_images(found: Source, config: PrepareConfig) -> list[pa.Table]:
    image_bytes = config.image_size**2 * config.channels
    rows = max(1, min(_MAX_SLICE_IMAGES, _MAX_SLICE_BYTES // image_bytes))
    return [found.images.slice(start, rows) for start in range(0, len(found.images), rows)]


def _chunk_uri(dataset: str, index: int) -> str:
    return storage.join(dataset, _STAGING, f"chunk-{index:06d}")


def _open_staging(dataset: str, found: Source, config: PrepareConfig) -> None:
    """Keeps the chunks of an interrupted attempt at the same preparation and deletes those of any other."""
    digest = hashlib.sha256(config.model_dump_json(include={"image_size", "channels"}).encode())
    for column in found.images.columns:
        digest.update(json.dumps(column.to_pylist()).encode())
    plan = digest.hexdigest().encode()
    plan_uri = storage.join(dataset, _STAGING, "plan")
    try:
        if storage.read_bytes(plan_uri) == plan:
            return
    except FileNotFoundError:
        pass
    storage.delete_folder(storage.join(dataset, _STAGING))
    storage.write_bytes(plan_uri, plan)


def _stage_chunks(source: str, dataset: str, slices: list[pa.Table], config: PrepareConfig, on_event: OnEvent) -> None:
    staged = storage.find_files(storage.join(dataset, _STAGING))
    missing = [
        index
        for index in range(len(slices))
        if storage.basename(_chunk_uri(dataset, index)) + ROWS_SUFFIX not in staged
    ]
    items = [
        {
            "uri": _chunk_uri(dataset, index),
            **{name: slices[index][name].to_pylist() for name in ("path", "label", "split")},
        }
        for index in missing
    ]
    total = sum(map(len, slices))
    done = total - sum(len(slices[index]) for index in missing)
    on_event(StageProgressed("decode", done, total))
    for result in _run_tasks(_decode_slice, items, source=source, config=config):
        done += result["images"]
        on_event(StageProgressed("decode", done, total))


def _run_tasks(function: Callable[..., dict[str, Any]], items: list[dict[str, Any]], **arguments: Any) -> Any:
    """Yields ``function(item, **arguments)`` of each item as a Ray Data task of its own, as they finish."""
    if not items:
        return
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    yield from dataset.map(function, fn_kwargs=arguments).iter_rows()


def _decode_slice(item: dict[str, Any], source: str, config: PrepareConfig) -> dict[str, Any]:
    """Decodes the images of one slice and stages them as one chunk."""
    pixels = np.empty((len(item["path"]), config.image_size, config.image_size, config.channels), np.uint8)
    rows: list[dict[str, Any]] = []
    kept = 0
    with ThreadPoolExecutor(_READERS_PER_TASK) as readers:
        contents = readers.map(lambda path: storage.read_bytes(storage.join(source, path)), item["path"])
        for path, label, split, content in zip(item["path"], item["label"], item["split"], contents, strict=True):
            row = {"path": path, "label": label, "split": split, "sha256": hashlib.sha256(content).hexdigest()}
            try:
                pixels[kept] = decode_image(content, config.image_size, config.channels)
            except RejectedImageError as error:
                rows.append({**row, "reason": error.reason})
            else:
                rows.append({**row, "pixels_sha256": hashlib.sha256(pixels[kept].data).hexdigest()})
                kept += 1
    write_chunk(item["uri"], pixels[:kept], pa.Table.from_pylist(rows, schema=STAGED_SCHEMA))
    return {"images": len(rows)}


def _read_staged_rows(dataset: str, num_chunks: int) -> tuple[pa.Table, pa.Table]:
    """Returns the rows of all staged images, each with its chunk, and those of all rejected files."""
    tables = []
    for chunk in range(num_chunks):
        rows = read_chunk_rows(_chunk_uri(dataset, chunk))
        tables.append(rows.append_column("chunk", pa.array([chunk] * len(rows), pa.int32())))
    rows = pa.concat_tables(tables)
    return rows.filter(pc.field("reason").is_null()), rows.filter(pc.field("reason").is_valid()).select(
        ["path", "reason"]
    )


def _check_rejected(rejected: pa.Table, num_images: int, config: PrepareConfig) -> None:
    fraction = len(rejected) / num_images
    if fraction > config.max_bad_fraction or len(rejected) == num_images:
        first = ", ".join(f"{row['path']} ({row['reason']})" for row in rejected.slice(0, 3).to_pylist())
        raise InputError(
            f"{len(rejected)} of {num_images} images were rejected ({fraction:.1%}, allowed are "
            f"{config.max_bad_fraction:.1%}): {first}, ...; mend them or raise --max-bad-fraction"
        )


def _write_data_files(
    dataset: str, images: pa.Table, splits: list[SplitName], config: PrepareConfig, on_event: OnEvent
) -> tuple[dict[SplitName, list[DataFile]], npt.NDArray[np.int64]]:
    """Writes the Parquet files and returns them with the histogram [channels, 256] of the train split's pixels."""
    chunks = np.asarray(images["chunk"])
    split_of = np.asarray(splits)
    rows_per_file = max(1, _DATA_FILE_BYTES // (config.image_size**2 * config.channels))
    # Consecutive chunks go together until their images, of which train takes most, would fill one file.
    part_of_chunk = np.cumsum(np.bincount(chunks)) // rows_per_file
    items = []
    for part in np.unique(part_of_chunk):
        members = np.flatnonzero(part_of_chunk == part)
        items.append(
            {
                "part": int(part),
                "uris": [_chunk_uri(dataset, int(chunk)) for chunk in members],
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
    """Writes the images of some consecutive chunks as one Parquet file a split."""
    images = np.concatenate([read_chunk_pixels(uri) for uri in item["uris"]])
    rows = pa.concat_tables([read_chunk_rows(uri) for uri in item["uris"]]).filter(pc.field("reason").is_null())
    split_of = np.asarray(item["splits"])
    files: dict[str, Any] = {}
    for split in SPLITS:
        members = np.flatnonzero(split_of == split)
        if len(members):
            path = f"{split}/part-{item['part']:05d}.parquet"
            of_split = rows.take(members).select(["label", "path", "sha256"])
            files[split] = write_data_file(dataset, path, images[members], of_split).model_dump()
    histogram = _channel_histogram(images[split_of == "train"])
    return {"files": json.dumps(files), "histogram": histogram, "images": len(images)}


def _channel_histogram(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Returns how often each value occurs in each channel: exact whatever the order, unlike a sum of floats."""
    return np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])])


def _build_manifest(
    found: Source,
    config: PrepareConfig,
    images: pa.Table,
    splits: list[SplitName],
    files: dict[SplitName, list[DataFile]],
    histogram: npt.NDArray[np.int64],
    rejected_rows: int,
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
        class_names=found.class_names,
        splits=described,
        rejected_rows=rejected_rows,
        pixel_mean=mean.tolist(),
        pixel_std=std.tolist(),
        seed=config.seed,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        source=found.uri,
        fingerprint=hashlib.sha256(json.dumps(visible).encode()).hexdigest(),
    )
