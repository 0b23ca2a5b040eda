"""Find the images of a source before any of them is read: where each one is, its class, and its split if it has one.

    folder       SOURCE/CLASS/**/image.jpg or SOURCE/{train,val,test}/CLASS/**/image.jpg
    table        CSV, JSON lines or Parquet with the columns path (or file_name), label and optionally split; paths are
                 relative to the table's folder and must be inside it
    parquet      one file or a folder of files with the columns image (bytes, or a struct with a field bytes), label and
                 optionally split; the names of columns and classes can also be declared in the file, as on the Hugging
                 Face Hub
    arrow        one Arrow file or a folder of them with the same columns, such as a Hugging Face dataset saved to disk
    tfrecord     one TFRecord file or a folder of them, such as those of TensorFlow Datasets; each record is a
                 tf.train.Example with the features image/encoded or image, and image/class/text, label or
                 image/class/label
    webdataset   one tar or a folder of tars, with KEY.jpg and KEY.cls (or KEY.json with a field label) side by side;
                 tars without any label are read like the folder that they were made of

For all but the first two, the split comes from a column split or from the file's name (train-00000.parquet, val/0.tar,
mnist-train.tfrecord-00000-of-00001).

Every file counts as an image unless its name plainly says otherwise: its bytes say what it is.
"""

import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.arrow import find_in_arrow
from data_prep.columns import Rows, count_values, iterate_rows, map_column, map_endings
from data_prep.folders import find_in_folders, number_folders
from data_prep.listing import FILES_SCHEMA, Listing, in_text
from data_prep.names import (
    MOST_NAMED,
    count_suffixes,
    image_suffixes,
    left_behind_as,
    name_some,
    sort_class_names,
    suffix_of,
)
from data_prep.parquet import find_in_parquet, image_column
from data_prep.tables import TEXT_SUFFIXES, find_in_table
from data_prep.tars import find_in_tars
from data_prep.tfrecord import find_in_tfrecords, is_tfrecord
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.events import SourceListed
from trainer.runtime.markdown import format_count

SourceFormat = Literal["folder", "table", "parquet", "arrow", "tfrecord", "webdataset"]

IMAGES_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # identifies the image within the source
        ("label", pa.int32()),  # null if the source does not give it
        ("split", pa.string()),  # null if the source does not give it
        ("container", pa.string()),  # null, or path of the file with the image and others, relative to the source
        ("offset", pa.int64()),  # in a Parquet file: number of the row; in others: offset of the first byte
        ("bytes", pa.int64()),  # size; in a Parquet file 0
    ]
)

_CONTAINER_SUFFIXES = {*TEXT_SUFFIXES, ".parquet", ".arrow", ".tar"}


@dataclass(frozen=True)
class Source:
    """The images of a source, none of them read yet."""

    uri: str
    """URI of the folder that paths and containers are relative to."""
    class_names: list[str]
    """A label is an index into this list. The order is that which the source declares, else sorted as numbers if all
    are whole numbers, else sorted as text."""
    images: pa.Table
    """Table with the columns of IMAGES_SCHEMA, sorted by path."""
    ignored: pa.Table
    """Table with the columns path and reason: files that are not images, judging by their place or name."""
    listed: SourceListed
    """Event that describes what was found."""
    source_format: SourceFormat
    """The format that was given or detected."""


def find_images(source: str, source_format: SourceFormat | None = None, *, labelled: bool = True) -> Source:
    """List the images of a source.

    Args:
        source: local path or s3:// URI of a folder or a file.
        source_format: see the docstring of this module; None detects it.
        labelled: whether every image must have a class, and there must be at least two classes. Otherwise images
            without a class have no label, and a single image file is also a source.

    Raises:
        InputError: the source is empty or of an unsupported format; it has fewer than two classes, or a class without
            images; or a split has a class that train does not have.
    """
    listing = Listing()
    root, files = _list_files(storage.resolve_uri(source), listing)
    if not len(files):
        passed_over = f" but {_count_names(listing.left_behind)}" if listing.left_behind else ""
        wanted = (
            "a folder or prefix that has one folder of images per class" if labelled else "an image or a folder of them"
        )
        raise InputError(f"{source}: no files found{passed_over}; give {wanted}")
    try:
        suffixes = map_endings(suffix_of, files["path"], pa.string())
        source_format = source_format or _detect_format(root, files, set(suffixes.unique().to_pylist()))
        if source_format == "folder":
            find_in_folders(source, files, listing, labelled)
        else:
            _find_in_containers(source, root, source_format, files, listing, labelled)
    except FileNotFoundError as error:
        raise InputError(f"{error}; give an existing folder, or a file of a format that is read") from error
    except (pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(
            f"{source} is damaged, or not of the format that its name says: {str(error).splitlines()[0]}"
        ) from error
    is_table = pc.is_in(suffixes, pa.array([*TEXT_SUFFIXES]))
    tables = sorted(files["path"].filter(is_table).to_pylist()) if source_format == "folder" else []
    found = listing.found
    if labelled:
        _check_classes(source, listing, found, tables)
    elif not len(found):
        raise InputError(f"{source}: no images found{_describe_ignored(listing)}; give images or a folder of them")
    return _to_source(source, root, source_format, listing, found, tables if labelled else [])


def _find_in_containers(
    source: str, root: str, source_format: SourceFormat, files: pa.Table, listing: Listing, labelled: bool
) -> None:
    """Add the images that a few files hold or list to a listing."""
    listing.ignore(files["path"].filter(pc.invert(files["is_text"])), "name_is_not_utf8")
    paths = sorted(files["path"].filter(files["is_text"]).to_pylist())
    match source_format:
        case "table":
            find_in_table(root, _find_table(source, paths), listing, labelled)
        case "parquet":
            for path in paths:
                find_in_parquet(root, path, listing, labelled)
        case "arrow":
            for path in paths:
                find_in_arrow(root, path, listing, labelled)
        case "tfrecord":
            find_in_tfrecords(root, paths, listing, labelled)
        case "webdataset":
            find_in_tars(source, root, paths, listing, labelled)


def _list_files(uri: str, listing: Listing) -> tuple[str, pa.Table]:
    """Return the folder that paths are relative to, and the one file or all files in it: FILES_SCHEMA.

    Files that were left behind are counted in the listing.
    """
    if storage.is_local(uri) and os.path.isfile(uri):
        return storage.parent(uri), _to_files([(storage.basename(uri), os.path.getsize(uri))], listing)
    files = _to_files(storage.walk_files(uri), listing)
    if len(files) or listing.left_behind:
        return uri, files if storage.is_local(uri) else _drop_folder_markers(files)
    is_container = suffix_of(uri) in _CONTAINER_SUFFIXES or is_tfrecord(uri)
    if is_container or (not storage.is_local(uri) and storage.exists(uri)):
        return storage.parent(uri), _to_files([(storage.basename(uri), 0)], listing)
    return uri, files


def _to_files(found: Iterable[tuple[str, int]], listing: Listing) -> pa.Table:
    files = Rows(FILES_SCHEMA)
    for path, size in found:
        if kind := left_behind_as(path):
            listing.left_behind[kind] += 1
            continue
        text = in_text(path)
        files.append(text, text == path, size)
    return files.to_table()


def _drop_folder_markers(files: pa.Table) -> pa.Table:
    """Drop empty objects that have the name of a folder."""
    is_empty = pc.equal(files["bytes"], 0)
    if not pc.any(is_empty).as_py():
        return files
    above, _ = number_folders(files["path"])
    folders = {"/".join(names[: depth + 1]) for names in above for depth in range(len(names))}
    return files.filter(pc.invert(pc.and_(is_empty, pc.is_in(files["path"], pa.array(sorted(folders), pa.string())))))


def _detect_format(root: str, files: pa.Table, suffixes: set[str]) -> SourceFormat:
    if suffixes & image_suffixes():
        return "folder"
    if pc.any(map_column(is_tfrecord, files["path"], pa.bool_())).as_py():
        return "tfrecord"
    if ".arrow" in suffixes:
        return "arrow"
    if suffixes & TEXT_SUFFIXES:
        return "table"
    if ".tar" in suffixes:
        return "webdataset"
    if ".parquet" in suffixes:
        first = min(path for path in files["path"].to_pylist() if suffix_of(path) == ".parquet")
        return "parquet" if image_column(storage.read_parquet_schema(storage.join(root, first))) else "table"
    return "folder"


def _find_table(source: str, paths: list[str]) -> str:
    tables = [path for path in paths if suffix_of(path) in {*TEXT_SUFFIXES, ".parquet"}]
    if len(tables) != 1:
        raise InputError(f"{source} contains {len(tables)} tables ({name_some(tables) or 'none'}); give one as SOURCE")
    return tables[0]


def _check_classes(source: str, listing: Listing, found: pa.Table, tables: list[str]) -> None:
    class_names = sort_class_names(_names_in(found))
    if len(class_names) < 2:
        raise InputError(
            f"{source}: images of {format_count(len(class_names), 'class')} "
            f"({', '.join(class_names) or 'none'}){_describe_ignored(listing)}; at least two are required, as "
            f"SOURCE/CLASS/image.jpg or SOURCE/train/CLASS/image.jpg{_describe_chances(source, listing, found, tables)}"
        )
    lost = listing.ignored.filter(pc.field("class_name").is_valid())
    lost = lost.filter(pc.invert(pc.is_in(lost["class_name"], pa.array(class_names, pa.string()))))
    empty = sorted(_names_in(lost))
    if empty:
        described = [
            f"{name} ({count_suffixes(lost['path'].filter(pc.equal(lost['class_name'], name)).to_pylist())})"
            for name in empty[:MOST_NAMED]
        ]
        raise InputError(
            f"{source}: no image in {len(empty)} of {len(empty) + len(class_names)} classes: "
            f"{name_some([*described, *empty[MOST_NAMED:]])}; add images, or move what is not a class out of SOURCE"
        )
    given = found.select(["class_name", "split"])
    trained = _names_in(given.filter(pc.field("split").is_null() | (pc.field("split") == "train")))
    for split in ("val", "test"):
        if unknown := _names_in(given.filter(pc.field("split") == split)) - trained:
            raise InputError(
                f"{source}: {split} has classes that train does not have: {name_some(sorted(unknown))}; "
                "add training images of these classes or remove them"
            )


def _names_in(table: pa.Table) -> set[str]:
    """Return the names of the classes in a listing."""
    return set(table["class_name"].unique().drop_null().to_pylist())


def _describe_ignored(listing: Listing) -> str:
    counts = count_values(listing.ignored["reason"].drop_null())
    return f", not used {', '.join(f'{reason}: {count}' for reason, count in counts.most_common())}" if counts else ""


def _describe_chances(source: str, listing: Listing, found: pa.Table, tables: list[str]) -> str:
    """Return advice on what the user may have meant with a source that has fewer than two classes."""
    chances = f"; if {name_some(tables)} is a table of paths and labels, give it as SOURCE" if tables else ""
    if not tables and not len(found) and pc.index(listing.ignored["reason"], "not_in_a_class_folder").as_py() >= 0:
        chances += "; if the names of the files say the class, give a table with the columns path and label as SOURCE"
    images = found.filter(pc.field("container").is_null())
    has_splits = images["split"].null_count < len(images)
    folders = {names[has_splits:] for names in number_folders(images["path"])[0]}
    above = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))]
    below = sorted({parts[len(above)] for parts in folders if len(parts) > len(above)})
    if above and len(below) > 1:
        place = "/".join(above)
        advice = "move them up" if has_splits else f"give {storage.join(source, place)}"
        chances += f"; if the classes are {name_some(below)}, below {place}, {advice}"
    return chances


def _to_source(
    source: str,
    root: str,
    source_format: SourceFormat,
    listing: Listing,
    found: pa.Table,
    unused_tables: list[str],
) -> Source:
    used = _names_in(found)
    declared = [name for name in listing.declared_classes if name in used]
    class_names = [*declared, *sort_class_names(used.difference(declared))]
    labels = pc.index_in(found["class_name"], pa.array(class_names, pa.string()))
    images = found.append_column("label", labels).select(IMAGES_SCHEMA.names).sort_by("path")
    paths = images["path"]
    repeated = paths[1:].filter(pc.equal(paths[1:], paths[:-1]))
    if len(repeated):
        raise InputError(f"{source} lists {repeated[0].as_py()!r} more than once; list each image once")
    ignored = listing.ignored.select(["path", "reason"]).filter(pc.field("reason").is_valid()).sort_by("path")
    not_tried = ignored["path"].filter(pc.equal(ignored["reason"], "not_an_image_name"))
    listed = SourceListed(
        images=len(images),
        classes=len(class_names),
        not_tried=count_suffixes(one["path"] for one in iterate_rows(pa.table([not_tried], ["path"]))),
        left_behind=_count_names(listing.left_behind),
        unused_tables=name_some(unused_tables),
        empty_classes=name_some([name for name in listing.declared_classes if name not in used]),
    )
    return Source(root, class_names, images, ignored, listed, source_format)


def _count_names(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))
