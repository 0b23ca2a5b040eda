"""The written format of a prepared dataset: the one thing that `trainer` knows of `data_prep`.

DATASET/{train,val,test}/part-NNNNN.parquet
    image   uint8 fixed-shape tensor [image_size, image_size, channels]
    label   int32, an index into class_names
    path    string, relative to the source
    sha256  string, of the source file's bytes
DATASET/rejected.parquet    path, reason: every file that was not used
DATASET/duplicates.parquet  group, path, split, leaks: images that are the same or nearly so
DATASET/README.md           the same in words, with contact_sheet.png
DATASET/manifest.json       this model; written last, so that its presence is the commit
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.runtime import storage
from trainer.runtime.errors import RecordError
from trainer.runtime.record_format import Record

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.parquet"
DUPLICATES_NAME = "duplicates.parquet"
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


class DataFile(BaseModel):
    """One Parquet file of a split."""

    model_config = ConfigDict(frozen=True)

    path: str = Field(pattern=r"^(train|val|test)/[\w-]+\.parquet$")
    """Relative to the dataset and below it, for example ``train/part-00000.parquet``."""
    rows: int
    bytes: int
    sha256: str
    """Of the file, to notice a damaged or exchanged one."""
    content_sha256: str
    """Of its rows (labels, paths, pixels), independent of the Parquet writer's version."""


class Split(BaseModel):
    """The files of one split, in row order."""

    model_config = ConfigDict(frozen=True)

    rows_per_class: list[int]
    """One count for each of the manifest's class_names."""
    files: list[DataFile]

    @property
    def rows(self) -> int:
        """The number of images."""
        return sum(self.rows_per_class)


class Manifest(Record):
    """What a prepared dataset holds and how it was made."""

    RENAMED: ClassVar[Mapping[str, str]] = {"format_version": "format"}
    ADDED: ClassVar[Mapping[str, Any]] = {
        # Every image was stretched to a square, on white.
        "resize": "fit",
        "background": 255,
        "rejected": lambda old: {"unknown": old["rejected_rows"]} if old.get("rejected_rows") else {},
        # Duplicates were not looked for.
        "duplicate_images": 0,
        "leaked_images": 0,
        # 16-bit images kept their high byte, others of more than 8 bits were rejected.
        "value_range": None,
        "value_range_given": False,
        "gray_levels": None,
    }

    image_size: int
    """Height and width in pixels."""
    channels: Literal[1, 3]
    resize: Literal["fit", "crop", "pad"]
    background: int
    value_range: tuple[float, float] | None
    """The values that became 0 and 255 in images with more than 8 bits a pixel, unless their header says it. None:
    there were none; what is read by this manifest keeps the high byte of 16 bits."""
    value_range_given: bool
    """Given as an option, not found in the images."""
    class_names: list[str]
    """A label is an index into this list."""
    splits: dict[SplitName, Split]
    rejected: dict[str, int]
    """Files that were not used, by reason."""
    duplicate_images: int
    """Images that have a twin, the same or nearly so."""
    leaked_images: int
    """Of these, images with a twin in another split: only where the source gave the splits."""
    pixel_mean: list[float]
    """One value a channel over the train split, in pixel values 0-255."""
    pixel_std: list[float]
    gray_levels: tuple[int, int] | None
    """The gray levels between which 99% of the values of the train split lie."""
    seed: int
    val_fraction: float
    test_fraction: float
    source: str
    fingerprint: str
    """SHA-256 over all that a training run can see: two datasets with the same fingerprint train the same."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def read_manifest(dataset: str) -> Manifest | None:
    """Returns the manifest of the dataset at a URI, or None where none has been committed.

    Raises:
        RecordError: there is one that this program cannot read.
        InputError: the storage cannot be read.
    """
    uri = storage.join(dataset, MANIFEST_NAME)
    try:
        return Manifest.parse(storage.read_bytes(uri), uri)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise RecordError(f"{error}; or prepare the dataset again with --overwrite") from error
