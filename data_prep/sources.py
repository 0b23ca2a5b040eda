"""Finds the images of a source: a folder or prefix with one folder per class, split or not."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from data_prep.manifest import SPLITS, SplitName
from trainer import storage
from trainer.errors import InputError

_SPLIT_FOLDERS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Source:
    """What a source holds, before any file is opened."""

    uri: str
    class_names: list[str]
    """Sorted; a label is an index into this list."""
    images: pa.Table
    """path (string, relative to the uri), label (int32), split (string or null), bytes (int64), sorted by path."""
    ignored: pa.Table
    """path, reason: files that are not images by their place or name."""

    @property
    def given_splits(self) -> list[SplitName]:
        """The splits that the source itself defines; empty where it has no train/ val/ test/ folders."""
        found = set(self.images["split"].unique().to_pylist())
        return [split for split in SPLITS if split in found]


def find_images(source: str) -> Source:
    """Lists a class-folder source once.

    Raises:
        InputError: there is no such folder, it has fewer than two classes, or a split has a class that train has not.
    """
    uri = storage.resolve_uri(source)
    sizes = storage.find_files(uri)
    if not sizes:
        raise InputError(f"{source}: no files there; give a folder or prefix that has one folder of images per class")
    rows, ignored = _sort_files(sizes)
    class_names = sorted({class_name for _, class_name, _ in rows})
    if len(class_names) < 2:
        raise InputError(
            f"{source}: {len(class_names)} class folders with images ({', '.join(class_names) or 'none'}); "
            "two or more are needed, as SOURCE/CLASS/image.jpg or SOURCE/train/CLASS/image.jpg"
        )
    _check_classes_of_splits(source, rows)
    label_of = {name: label for label, name in enumerate(class_names)}
    images = pa.table(
        {
            "path": pa.array([path for path, _, _ in rows], pa.string()),
            "label": pa.array([label_of[class_name] for _, class_name, _ in rows], pa.int32()),
            "split": pa.array([split for _, _, split in rows], pa.string()),
            "bytes": pa.array([sizes[path] for path, _, _ in rows], pa.int64()),
        }
    )
    return Source(uri, class_names, images, pa.table({"path": list(ignored), "reason": list(ignored.values())}))


def _sort_files(sizes: Iterable[str]) -> tuple[list[tuple[str, str, SplitName | None]], dict[str, str]]:
    """Returns (path, class name, split) of each image by its place, and the reason for each other file."""
    rows: list[tuple[str, str, SplitName | None]] = []
    ignored: dict[str, str] = {}
    visible = [PurePosixPath(path) for path in sizes if not _is_hidden(PurePosixPath(path))]
    # The folders are splits only if all of them are: a class may be called "test".
    top_folders = {path.parts[0] for path in visible if len(path.parts) > 1 and _is_image(path)}
    is_split = (
        bool(top_folders) and top_folders <= _SPLIT_FOLDERS.keys() and "train" in map(_SPLIT_FOLDERS.get, top_folders)
    )
    for path in visible:
        folders = path.parts[1:-1] if is_split else path.parts[:-1]
        if not folders:
            ignored[str(path)] = "not_in_a_class_folder"
        elif not _is_image(path):
            ignored[str(path)] = "not_an_image_name"
        else:
            rows.append((str(path), folders[0], _SPLIT_FOLDERS[path.parts[0]] if is_split else None))
    return rows, ignored


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES


def _check_classes_of_splits(source: str, rows: list[tuple[str, str, SplitName | None]]) -> None:
    classes: dict[SplitName | None, set[str]] = {}
    for _, class_name, split in rows:
        classes.setdefault(split, set()).add(class_name)
    for split in ("val", "test"):
        unknown = classes.get(split, set()) - classes.get("train", set())
        if unknown:
            raise InputError(
                f"{source}: {split} has classes that train has not: {', '.join(sorted(unknown))}; "
                "add training images of them or remove the folders"
            )
