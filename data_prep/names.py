"""Interpret the names in a source before any file is read: what cannot be an image, which split, which class."""

import functools
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from data_prep.formats import FORMATS
from data_prep.manifest import SplitName
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_count

_SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# Files and folders that operating systems, file servers and notebooks leave behind; in lower case.
_LEFT_BEHIND = {
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
}
# Text, documents, programs, archives, audio and video. Any other file is tried: its bytes say what it is.
_OTHER_SUFFIXES = {
    *(".txt", ".md", ".rst", ".log", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml"),
    *(".ini", ".cfg", ".htm", ".html", ".css", ".js", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx"),
    *(".py", ".pyc", ".ipynb", ".sh", ".bat", ".cpp", ".exe", ".dll", ".so"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".md5", ".sha256", ".parquet", ".sqlite", ".db"),
    *(".mp3", ".wav", ".flac", ".ogg", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"),
}
_OTHER_NAMES = {"license", "licence", "copying", "notice", "readme", "authors", "changelog", "makefile", "_success"}
# How many names a message lists at most.
MOST_NAMED = 5
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_WHOLE_FLOAT = re.compile(r"(-?[0-9]{1,18})(\.0+)?")


def parts_of(path: str) -> list[str]:
    """Return the folders and the name of a path; called for millions of paths, for which pathlib is too slow."""
    return [part for part in path.split("/") if part]


def suffix_of(path: str) -> str:
    """Return the suffix of a path or URI in lower case, with its dot; empty if there is none."""
    suffix = posixpath.splitext(path)[1].lower()
    return "" if suffix == "." else suffix


def name_some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are: ``a, b, c, d, e and 995 more``."""
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def count_suffixes(paths: Iterable[str]) -> str:
    """Return how often each suffix occurs, such as ``8 .heic, 2 without suffix``, the most frequent first."""
    counts = Counter(suffix_of(path) or "without suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


@functools.cache
def image_suffixes() -> set[str]:
    """Return the suffixes of the supported formats; used only to detect the format of a source."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def left_behind_as(path: str) -> str:
    """Return the kind of a file left behind by a system, such as ``Thumbs.db`` or ``hidden``; empty for other files."""
    folder, _, name = path.rpartition("/")
    return (_folder_left_behind_as(folder) if folder else "") or _name_left_behind_as(name)


@functools.lru_cache(maxsize=1024)
def _folder_left_behind_as(folder: str) -> str:
    return next((kind for part in parts_of(folder) if (kind := _name_left_behind_as(part))), "")


def _name_left_behind_as(name: str) -> str:
    if name.lower() in _LEFT_BEHIND or name == ".DS_Store":
        return name
    return "hidden" if name.startswith(".") else ""


def is_plainly_other(path: str) -> bool:
    """Return whether the name alone says that a file is not an image: a text, an archive, a video, ..."""
    return suffix_of(path) in _OTHER_SUFFIXES or posixpath.basename(path).lower() in _OTHER_NAMES


def split_called(name: str) -> SplitName | None:
    """Return the split with this name, ignoring case, or None."""
    return _SPLIT_NAMES.get(name.lower())


def split_alluded_to(name: str) -> SplitName | None:
    """Return the split that is the first or last word of a name (``seg_train``, ``TestSet``, ``val2017``), or None."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return next((split for word in (*words[:1], *words[-1:]) if (split := split_called(word))), None)


def split_of_file(path: str) -> SplitName | None:
    """Return the split with which the name of a file or of a folder above it starts (``train-0.parquet``), or None."""
    words = (re.split(r"[-_.]", part, maxsplit=1)[0] for part in parts_of(path))
    return next((split for word in words if (split := split_called(word))), None)


def parse_split(name: str, row: int, split: Any) -> SplitName | None:
    """Return the split given in a row of a table, or None if it is empty.

    Args:
        name: name of the table, for messages.
        row: number of the row, for messages.
        split: value of the column.

    Raises:
        InputError: the split is unknown.
    """
    if split is None or split == "":
        return None
    known = split_called(str(split))
    if known is None:
        raise InputError(f"{name}, row {row}: split {split!r} is unknown; use train, val or test")
    return known


def to_class_name(label: Any) -> str | None:
    """Return a label as a class name, in composed form (NFC), or None if it is empty or NaN."""
    if label is None or label != label:
        return None
    return unicodedata.normalize("NFC", str(label)) or None


def to_class_names(labels: Sequence[Any]) -> list[str | None]:
    """Return a column of labels as class names, without surrounding spaces.

    One missing value turns a column of integers into floats: if every label is a whole number, ``3.0`` is class ``3``.
    """
    names = [None if name is None else name.strip() or None for name in map(to_class_name, labels)]
    matches = [_WHOLE_FLOAT.fullmatch(name) for name in names if name is not None]
    if not all(matches):
        return names
    return [None if name is None else name.partition(".")[0] for name in names]


def name_declared(uri: str, declared: Sequence[str], labels: Sequence[int | None]) -> list[str | None]:
    """Return the class names of labels that are indices into declared names; None for a label that is not published.

    Raises:
        InputError: there are fewer names than labels.
    """
    known = [label for label in labels if label is not None]
    if known and max(known) >= len(declared):
        raise InputError(
            f"{uri} has the label {max(known)}, but declares {format_count(len(declared), 'class')}; "
            "declare every class"
        )
    # On the Hugging Face Hub, -1 marks such a label.
    return [None if label is None or label < 0 else declared[label] for label in labels]


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Return class names in the order of their labels: sorted as numbers if all are whole numbers, else as text."""
    distinct = sorted(set(names))
    return sorted(distinct, key=int) if all(map(_WHOLE_NUMBER.fullmatch, distinct)) else distinct
