"""Finds the images of a source, before any of them is read: where each one is, its class, and its split if it has one.

    folder       SOURCE/CLASS/**/image.jpg or SOURCE/{train,val,test}/CLASS/**/image.jpg
    table        CSV, JSON lines or Parquet with columns path (or file_name), label and, if wanted, split; paths are
                 relative to the table's folder and stay inside it
    parquet      one file or a folder of them, with image bytes in a column image (bytes, or a struct with a field
                 bytes, as on the Hugging Face hub), label and, if wanted, split
    webdataset   one tar or a folder of them, with KEY.jpg and KEY.cls (or KEY.json with a field label) side by side

Files of the last two take their split from a split column or from their name (train-00000.parquet, val/0.tar).
"""

import csv
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.manifest import SplitName
from trainer import storage
from trainer.errors import InputError

SourceFormat = Literal["folder", "table", "parquet", "webdataset"]
SOURCE_FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)

IMAGES_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # names the image within the source
        ("label", pa.int32()),  # null where the source does not say
        ("split", pa.string()),  # null where the source does not say
        ("container", pa.string()),  # null, or the tar or Parquet file that holds the bytes, relative to the source
        ("offset", pa.int64()),  # in a tar: of its first byte; in a Parquet file: its row
        ("bytes", pa.int64()),  # in a tar or a folder: its size
    ]
)

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
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_TABLE_SUFFIXES = {".csv", ".jsonl", ".ndjson"}


@dataclass(frozen=True)
class Source:
    """What a source holds, before any image is read."""

    uri: str
    """The folder that paths and containers are relative to."""
    class_names: list[str]
    """Sorted as text; a label is an index into this list."""
    images: pa.Table
    """Columns of IMAGES_SCHEMA, sorted by path."""
    ignored: pa.Table
    """path, reason: files that are not images by their place or name."""


@dataclass
class _Found:
    """One image while the classes are not known yet."""

    path: str
    class_name: str | None
    split: SplitName | None = None
    container: str | None = None
    offset: int = 0
    bytes: int = 0


def find_images(source: str, source_format: SourceFormat | None = None, *, labelled: bool = True) -> Source:
    """Lists a source once.

    Args:
        source: local path or s3:// URI of a folder or a file.
        source_format: as in the module's description; None tells it from the source.
        labelled: every image must have a class, and there must be two or more. Otherwise images without a class have no
            label, and a single image is a source too.

    Raises:
        InputError: there is nothing there, it is of a format that is not read, it has fewer than two classes, or a
            split has a class that train has not.
    """
    uri = storage.resolve_uri(source)
    file_suffixes = {*_TABLE_SUFFIXES, ".parquet", ".tar", ".tfrecord", ".tfrecords"}
    is_file = suffix_of(uri) in (file_suffixes if labelled else file_suffixes | _IMAGE_SUFFIXES)
    root = storage.parent(uri) if is_file else uri
    sizes = {storage.basename(uri): 0} if is_file else storage.find_files(uri)
    visible = {path: size for path, size in sizes.items() if not _is_hidden(PurePosixPath(path))}
    if not visible:
        raise InputError(f"{source}: no files there; give a folder or prefix that has one folder of images per class")
    ignored: dict[str, str] = {}
    try:
        match source_format or _detect_format(root, visible):
            case "folder":
                found = list(_find_in_folders(source, visible, ignored, labelled))
            case "table":
                found = list(_find_in_table(root, _find_table(source, visible), labelled))
            case "parquet":
                found = [image for path in sorted(visible) for image in _find_in_parquet(root, path, ignored, labelled)]
            case "webdataset":
                found = [image for path in sorted(visible) for image in _find_in_tar(root, path, ignored, labelled)]
    except FileNotFoundError as error:
        raise InputError(f"{error}; give a folder, a table, a Parquet file or a tar that is there") from error
    except (pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(f"{source} is damaged or not what its name says: {str(error).splitlines()[0]}") from error
    found = _drop_unnamable(found, ignored)
    if labelled:
        _check_classes(source, found)
    elif not found:
        raise InputError(f"{source}: no images there ({len(ignored)} files of other kinds); give a folder of images")
    return _to_source(source, root, found, ignored)


def suffix_of(path: str | PurePosixPath) -> str:
    """Returns the suffix of a path or URI in lower case, with its dot; empty where there is none."""
    return PurePosixPath(path).suffix.lower()


def _detect_format(root: str, paths: Iterable[str]) -> SourceFormat:
    suffixes = {suffix_of(path) for path in paths}
    if suffixes & {".tfrecord", ".tfrecords"}:
        raise InputError(
            f"{root}: TFRecord files are not read; write the images into class folders, a WebDataset tar or Parquet"
        )
    if suffixes & _IMAGE_SUFFIXES:
        return "folder"
    if suffixes & _TABLE_SUFFIXES:
        return "table"
    if ".tar" in suffixes:
        return "webdataset"
    if ".parquet" in suffixes:
        first = next(path for path in paths if suffix_of(path) == ".parquet")
        names = storage.read_parquet_schema(storage.join(root, first)).names
        return "parquet" if "image" in names else "table"
    return "folder"


def _find_in_folders(source: str, sizes: dict[str, int], ignored: dict[str, str], labelled: bool) -> Iterator[_Found]:
    paths = [PurePosixPath(path) for path in sizes]
    is_split = _has_split_folders(source, [path for path in paths if len(path.parts) > 1 and _is_image(path)])
    for path in paths:
        folders = path.parts[1:-1] if is_split else path.parts[:-1]
        if labelled and not folders:
            ignored[str(path)] = "not_in_a_class_folder"
        elif not _is_image(path):
            ignored[str(path)] = "not_an_image_name"
        else:
            split = _SPLIT_NAMES[path.parts[0].lower()] if is_split else None
            yield _Found(str(path), folders[0] if folders else None, split, bytes=sizes[str(path)])


def _has_split_folders(source: str, images: list[PurePosixPath]) -> bool:
    """Returns whether the folders at the top are splits: only if all of them are, since a class may be called "test".

    Raises:
        InputError: several are called like splits and have folders of their own, others are not.
    """
    top_folders = {path.parts[0] for path in images}
    named = {name for name in top_folders if name.lower() in _SPLIT_NAMES}
    if "train" not in {_SPLIT_NAMES[name.lower()] for name in named}:
        return False
    others = top_folders - named
    if others and len(named) > 1 and any(len(path.parts) > 2 for path in images if path.parts[0] in named):
        raise InputError(
            f"{source}: the folders {', '.join(sorted(named))} look like splits, and beside them is "
            f"{', '.join(sorted(others))}; move or rename the ones or the others"
        )
    return not others


def _find_in_table(root: str, name: str, labelled: bool) -> Iterator[_Found]:
    rows = _read_table(storage.join(root, name))
    columns = list(rows[0]) if rows else []
    path_column = next((column for column in ("path", "file_name") if column in columns), None)
    if path_column is None or (labelled and "label" not in columns):
        raise InputError(
            f"{name} has the columns {', '.join(columns) or '(none)'}; needed are path (or file_name), label and, if "
            "wanted, split"
        )
    for number, row in enumerate(rows, start=1):
        given, label = row.get(path_column), row.get("label")
        if given in (None, "") or (labelled and label in (None, "")):
            raise InputError(
                f"{name}, row {number} has no {path_column if given in (None, '') else 'label'}; complete it"
            )
        path = posixpath.normpath(str(given))
        if path.startswith(("/", "../")) or path == ".." or "://" in str(given):
            raise InputError(
                f"{name}, row {number}: {given!r} leaves the table's folder {root}; give paths relative to it"
            )
        yield _Found(path, _to_class_name(label), _parse_split(name, number, row.get("split")))


def _find_table(source: str, paths: Iterable[str]) -> str:
    tables = [path for path in paths if suffix_of(path) in {*_TABLE_SUFFIXES, ".parquet"}]
    if len(tables) != 1:
        raise InputError(
            f"{source} holds {len(tables)} tables ({', '.join(tables) or 'none'}); give one of them as SOURCE"
        )
    return tables[0]


def _read_table(uri: str) -> list[dict[str, Any]]:
    content = storage.read_bytes(uri)
    try:
        if suffix_of(uri) == ".parquet":
            return storage.parquet_table(content).to_pylist()  # type: ignore[no-any-return]
        text = content.decode("utf-8-sig")
        if suffix_of(uri) == ".csv":
            return _check_widths(uri, list(csv.DictReader(io.StringIO(text), strict=True)))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{uri} cannot be read as a table: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{uri} cannot be read as a table: each line must be a JSON object")
    return rows


def _check_widths(uri: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        # Where csv puts the fields beyond the header.
        if None in row:
            raise InputError(f"{uri}, row {number} has more fields than the header; complete the header")
    return rows


def _find_in_parquet(root: str, path: str, ignored: dict[str, str], labelled: bool) -> Iterator[_Found]:
    if suffix_of(path) != ".parquet":
        ignored[path] = "not_a_parquet_file"
        return
    uri = storage.join(root, path)
    names = storage.read_parquet_schema(uri).names
    if not ({"image", "label"} if labelled else {"image"}) <= set(names):
        raise InputError(f"{uri} has the columns {', '.join(names)}; needed are image, label and, if wanted, split")
    with storage.open_file(uri) as file:
        rows = pq.read_table(file, columns=[name for name in ("label", "split") if name in names])
        num_rows = pq.ParquetFile(file).metadata.num_rows
    labels = rows["label"].to_pylist() if "label" in names else [None] * num_rows
    splits = rows["split"].to_pylist() if "split" in names else [_split_of_name(path)] * num_rows
    for row, (label, split) in enumerate(zip(labels, splits, strict=True)):
        if labelled and label is None:
            raise InputError(f"{path}, row {row} has no label; complete it")
        yield _Found(f"{path}#{row:08d}", _to_class_name(label), _parse_split(path, row, split), path, row)


def _find_in_tar(root: str, path: str, ignored: dict[str, str], labelled: bool) -> Iterator[_Found]:
    if suffix_of(path) != ".tar":
        ignored[path] = "not_a_tar"
        return
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    with storage.open_file(storage.join(root, path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            key, extension = f"{folder}/{key}", f".{extension.lower()}"
            if not member.isfile():
                continue
            if extension in _IMAGE_SUFFIXES and key in images:
                ignored[f"{path}#{member.name}"] = "second_image_of_its_key"
            elif extension in _IMAGE_SUFFIXES:
                images[key] = member
            elif extension in (".cls", ".json"):
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                label = _parse_label(f"{path}#{member.name}", content, is_json=extension == ".json")
                if label is not None:
                    labels[key] = str(label)
            else:
                ignored[f"{path}#{member.name}"] = "not_an_image_name"
    for key, member in images.items():
        name = f"{path}#{member.name}"
        if labelled and key not in labels:
            ignored[name] = "no_label"
        else:
            yield _Found(name, labels.get(key), _split_of_name(path), path, member.offset_data, member.size)


def _parse_label(name: str, content: bytes, is_json: bool) -> Any:
    try:
        text = content.decode()
        fields = json.loads(text) if is_json else {"label": text.strip()}
    except ValueError as error:
        raise InputError(f"{name} cannot be read as a label: {error}; mend it or remove it") from error
    if not isinstance(fields, dict):
        raise InputError(f"{name} cannot be read as a label: it must be a JSON object; mend it or remove it")
    return fields.get("label")


def _to_class_name(label: Any) -> str | None:
    return None if label in (None, "") else str(label)


def _split_of_name(path: str) -> SplitName | None:
    words = (re.split(r"[-_.]", part, maxsplit=1)[0].lower() for part in PurePosixPath(path).parts)
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)


def _parse_split(name: str, row: int, split: Any) -> SplitName | None:
    if split is None or split == "":
        return None
    known = _SPLIT_NAMES.get(str(split).lower())
    if known is None:
        raise InputError(f"{name}, row {row}: split {split!r} is unknown; use train, val or test")
    return known


def _drop_unnamable(found: list[_Found], ignored: dict[str, str]) -> list[_Found]:
    """Returns the images whose path is text; of others, such as those of an old zip, no Parquet file can speak."""
    for name in list(ignored):
        ignored[_in_text(name)] = ignored.pop(name)
    named = []
    for image in found:
        text = _in_text(image.path)
        if text == image.path:
            named.append(image)
        else:
            ignored[text] = "name_is_not_utf8"
    return named


def _in_text(name: str) -> str:
    """Returns a name with the bytes that are not UTF-8 written as backslash, udc, XX."""
    return name.encode("utf-8", "backslashreplace").decode()


def _check_classes(source: str, found: list[_Found]) -> None:
    class_names = _class_names(found)
    if len(class_names) < 2:
        raise InputError(
            f"{source}: images of {len(class_names)} classes ({', '.join(class_names) or 'none'}); two or more are "
            "needed, as SOURCE/CLASS/image.jpg or SOURCE/train/CLASS/image.jpg"
        )
    for split in ("val", "test"):
        unknown = {image.class_name for image in found if image.split == split} - {
            image.class_name for image in found if image.split in ("train", None)
        }
        if unknown:
            raise InputError(
                f"{source}: {split} has classes that train has not: {', '.join(sorted(map(str, unknown)))}; "
                "add training images of them or remove them"
            )


def _class_names(found: list[_Found]) -> list[str]:
    return sorted({image.class_name for image in found if image.class_name is not None})


def _to_source(source: str, root: str, found: list[_Found], ignored: dict[str, str]) -> Source:
    class_names = _class_names(found)
    label_of = {name: label for label, name in enumerate(class_names)}
    columns = {
        "path": [image.path for image in found],
        "label": [None if image.class_name is None else label_of[image.class_name] for image in found],
        **{name: [getattr(image, name) for image in found] for name in ("split", "container", "offset", "bytes")},
    }
    images = pa.table(columns, schema=IMAGES_SCHEMA).sort_by("path")
    repeated = pc.filter(images["path"].value_counts().field("values"), _more_than_once(images))
    if len(repeated):
        raise InputError(f"{source} names {repeated[0].as_py()!r} more than once; name each image once")
    return Source(root, class_names, images, pa.table({"path": list(ignored), "reason": list(ignored.values())}))


def _more_than_once(images: pa.Table) -> pa.Array:
    return pc.greater(images["path"].value_counts().field("counts"), 1)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_image(path: PurePosixPath) -> bool:
    return suffix_of(path) in _IMAGE_SUFFIXES
