"""The file format of a prepared dataset: what `trainer` reads of the output of `data_prep`.

DATASET/shards/NNNNN-TAG.arrow  Arrow IPC files: image, a uint8 fixed-shape tensor [image_size, image_size, channels]
DATASET/index.parquet       INDEX_SCHEMA: one row per image, in the order of the shards and of their rows
DATASET/rejected.parquet    path, reason: every file that was not used
DATASET/duplicates.parquet  group, path, split, leaks: images that are identical or nearly so
DATASET/README.md           a summary for people, with contact_sheet.png
DATASET/manifest.json       `Manifest` as JSON; written last, so that its presence is the commit
"""

import hashlib
import shlex
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from trainer.runtime import storage
from trainer.runtime.errors import InputError, RecordError
from trainer.runtime.markdown import shorten_digest
from trainer.runtime.record_format import Record

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.parquet"
REJECTED_NAME = "rejected.parquet"
DUPLICATES_NAME = "duplicates.parquet"
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
DuplicateRule = Literal["near", "exact"]

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),  # an index into the shards of the manifest
        ("row", pa.int32()),  # row of the image in its shard
        ("split", pa.string()),
        ("label", pa.int32()),  # an index into class_names
        ("path", pa.string()),  # relative to the source
        ("sha256", pa.binary(32)),  # hash of the source file's bytes
        ("pixels_sha256", pa.binary(32)),
        ("perceptual_hash", pa.binary(32)),
        ("given_split", pa.string()),  # null if the source does not give it
        ("pixel_sums", pa.list_(pa.int64())),  # sum of the pixels, for each channel
        ("pixel_squares", pa.list_(pa.int64())),  # sum of their squares, for each channel
    ]
)
# What a writer holds in memory, and what must be read of a bucket for one image.
_BATCH_BYTES = 16 * 2**20
_FIRST_FORMAT_WITH_SHARDS = 2


class Shard(BaseModel):
    """One file of images."""

    model_config = ConfigDict(frozen=True)

    path: str = Field(pattern=r"^shards/\d{5,}-[0-9a-f]{8}\.arrow$")
    """Path relative to the dataset, such as ``shards/00000-1f0c93aa.arrow``."""
    rows: int
    bytes: int
    sha256: str
    """Hash of the file, to detect a damaged or replaced one."""


class Split(BaseModel):
    """How many images a split has."""

    model_config = ConfigDict(frozen=True)

    rows_per_class: list[int]
    """Number of images of each class, in the order of the manifest's class_names."""

    @property
    def rows(self) -> int:
        """The number of images."""
        return sum(self.rows_per_class)


class Manifest(Record):
    """What a prepared dataset holds and how it was made."""

    FORMAT: ClassVar[int] = _FIRST_FORMAT_WITH_SHARDS
    RENAMED: ClassVar[Mapping[str, str]] = {"format_version": "format"}
    ADDED: ClassVar[Mapping[str, Any]] = {
        # In older formats, every image was stretched to a square, on white.
        "resize": "fit",
        "background": 255,
        "rejected": lambda old: {"unknown": old["rejected_rows"]} if old.get("rejected_rows") else {},
        # Older formats did not look for duplicates.
        "duplicate_images": 0,
        "leaked_images": 0,
        # In older formats, 16-bit images kept their high byte; others with more than 8 bits were rejected.
        "value_range": None,
        "value_range_given": False,
        # In format 1 each split was a folder of Parquet files: runs that were trained on one keep its manifest.
        "shards": [],
        "tables": {},
        "duplicates": "near",
        "value_counts": None,
    }

    image_size: int
    """Height and width in pixels."""
    channels: Literal[1, 3]
    resize: Literal["fit", "crop", "pad"]
    background: int
    value_range: tuple[float, float] | None
    """Values that became 0 and 255 in images with more than 8 bits per channel, unless the header of the image gives
    its range. None: there were no such images; 16-bit images decoded with this manifest keep their high byte."""
    value_range_given: bool
    """Whether value_range was given as an option, not determined from the images."""
    class_names: list[str]
    """A label is an index into this list."""
    splits: dict[SplitName, Split]
    shards: list[Shard]
    """In the order of the index."""
    tables: dict[str, str]
    """SHA-256 of each Parquet file by its name."""
    rejected: dict[str, int]
    """Number of files that were not used, by reason."""
    duplicates: DuplicateRule
    """Which images are kept in one split: those that are nearly identical, or identical ones only."""
    duplicate_images: int
    """Number of images that have a duplicate, by this rule."""
    leaked_images: int
    """Number of images with a duplicate in another split; above 0 only if the source gives the splits or images were
    appended."""
    pixel_mean: list[float]
    """Mean of each channel over the train split, in pixel values 0-255."""
    pixel_std: list[float]
    """Standard deviation of each channel over the train split, in pixel values 0-255."""
    value_counts: list[int] | None
    """How often each pixel value 0-255 occurs in a grid of pixels of all images, over all channels."""
    seed: int
    val_fraction: float
    test_fraction: float
    source: str
    fingerprint: str
    """SHA-256 of all that affects training: datasets with the same fingerprint train the same."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.image_size, self.image_size, self.channels

    @property
    def gray_levels(self) -> tuple[int, int] | None:
        """Gray levels (0-255) between which 99% of the values of the images lie; None if they were not counted."""
        if not self.value_counts:
            return None
        below = np.cumsum(self.value_counts) / sum(self.value_counts)
        return int(np.searchsorted(below, 0.005, side="right")), int(np.searchsorted(below, 0.995))


def read_manifest(dataset: str) -> Manifest | None:
    """Return the manifest of the dataset at a URI, or None if there is no finished dataset.

    Raises:
        RecordError: the manifest cannot be read by this version, or the dataset is of format 1.
        InputError: the storage cannot be read.
    """
    uri = storage.join(dataset, MANIFEST_NAME)
    try:
        manifest = Manifest.parse(storage.read_bytes(uri), uri)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise RecordError(f"{error}; or prepare the dataset again with --overwrite") from error
    if INDEX_NAME not in manifest.tables:
        raise RecordError(
            f"{uri} is of format 1, without shards; prepare it again: {_format_command(dataset, manifest)}"
        )
    return manifest


def _format_command(dataset: str, manifest: Manifest) -> str:
    """Return the command that prepares a dataset again as its manifest says."""
    names = ("image_size", "channels", "resize", "background", "val_fraction", "test_fraction", "seed")
    words = ["python", "jobs/prepare.py", manifest.source, dataset]
    for name in names:
        words += [f"--{name.replace('_', '-')}", str(getattr(manifest, name))]
    if manifest.value_range_given and manifest.value_range:
        words += ["--value-range", ":".join(f"{end:g}" for end in manifest.value_range)]
    return shlex.join([*words, "--overwrite"])


def read_index(dataset: str, manifest: Manifest, columns: list[str] | None = None) -> pa.Table:
    """Return the index of a dataset, after comparing it with its checksum.

    Raises:
        InputError: the index is missing or differs from what the manifest says.
    """
    uri = storage.join(dataset, INDEX_NAME)
    try:
        content = storage.map_file(uri)
    except FileNotFoundError as error:
        raise InputError(f"{error}, though the manifest names it; prepare {dataset} again with --overwrite") from error
    check_digest(uri, hashlib.sha256(content).hexdigest(), manifest.tables[INDEX_NAME])
    return pq.read_table(pa.BufferReader(content), columns=columns)


def binary_array(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return a column of binary values of one length as uint8 ``[rows, length]``."""
    array = column.combine_chunks()
    length = array.type.byte_width
    content = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * length : (array.offset + len(array)) * length]
    return content.reshape(-1, length)


def check_digest(uri: str, found: str, expected: str) -> None:
    """Raise InputError if the checksum of a file is not that of the manifest."""
    if found != expected:
        raise InputError(
            f"{uri} has sha256 {shorten_digest(found)}, the manifest says {shorten_digest(expected)}; the dataset is "
            "damaged or was changed: run its jobs/prepare.py again, with --overwrite if it was finished"
        )


def rows_per_batch(image_bytes: int) -> int:
    """Return how many images each record batch of a shard has, except for the last."""
    return max(1, _BATCH_BYTES // image_bytes)


def image_arrays(source: Any) -> list[npt.NDArray[np.uint8]]:
    """Return the images of each record batch of a shard, uint8 ``[rows, height, width, channels]``.

    Args:
        source: an open file, or a `pyarrow.MemoryMappedFile`, of which the arrays are a view without a copy.
    """
    reader = pa.ipc.open_file(source)
    return [reader.get_batch(one).column("image").to_numpy_ndarray() for one in range(reader.num_record_batches)]
