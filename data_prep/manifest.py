"""The file format of a prepared dataset: what `trainer` reads of the output of `data_prep`.

DATASET/{train,val,test}/part-NNNNN.parquet
    image   uint8 fixed-shape tensor [image_size, image_size, channels]
    label   int32, an index into class_names
    path    string, relative to the source
    sha256  string, hash of the source file's bytes
DATASET/rejected.parquet    path, reason: every file that was not used
DATASET/duplicates.parquet  group, path, split, leaks: images that are identical or nearly so
DATASET/README.md           a summary for people, with contact_sheet.png
DATASET/manifest.json       `Manifest` as JSON; written last, so that its presence is the commit
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
    """Path relative to the dataset, such as ``train/part-00000.parquet``."""
    rows: int
    bytes: int
    sha256: str
    """Hash of the file, to detect a damaged or replaced one."""
    content_sha256: str
    """Hash of the rows (labels, paths, pixels), independent of the version of the Parquet writer."""


class Split(BaseModel):
    """The files of one split, in row order."""

    model_config = ConfigDict(frozen=True)

    rows_per_class: list[int]
    """Number of images of each class, in the order of the manifest's class_names."""
    files: list[DataFile]

    @property
    def rows(self) -> int:
        """The number of images."""
        return sum(self.rows_per_class)


class Manifest(Record):
    """What a prepared dataset holds and how it was made."""

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
        "gray_levels": None,
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
    rejected: dict[str, int]
    """Number of files that were not used, by reason."""
    duplicate_images: int
    """Number of images that have a duplicate, identical or nearly so."""
    leaked_images: int
    """Number of images with a duplicate in another split; above 0 only if the source gives the splits."""
    pixel_mean: list[float]
    """Mean of each channel over the train split, in pixel values 0-255."""
    pixel_std: list[float]
    """Standard deviation of each channel over the train split, in pixel values 0-255."""
    gray_levels: tuple[int, int] | None
    """Gray levels (0-255) between which 99% of the values of the train split lie."""
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


def read_manifest(dataset: str) -> Manifest | None:
    """Return the manifest of the dataset at a URI, or None if there is no finished dataset.

    Raises:
        RecordError: the manifest cannot be read by this version.
        InputError: the storage cannot be read.
    """
    uri = storage.join(dataset, MANIFEST_NAME)
    try:
        return Manifest.parse(storage.read_bytes(uri), uri)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise RecordError(f"{error}; or prepare the dataset again with --overwrite") from error
