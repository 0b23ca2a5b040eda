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
from data_prep.folders import find_in_folders
from data_prep.listing import FoundImage, Listing, in_text
from data_prep.names import (
    count_suffixes,
    image_suffixes,
    left_behind_as,
    name_some,
    parts_of,
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
    root, visible = _list_files(storage.resolve_uri(source))
    kinds = {path: kind for path in visible if (kind := left_behind_as(path))}
    listing = Listing(left_behind=Counter(kinds.values()))
    for path in kinds:
        del visible[path]
    if not visible:
        passed_over = f" but {_count_names(listing.left_behind)}" if listing.left_behind else ""
        wanted = (
            "a folder or prefix that has one folder of images per class" if labelled else "an image or a folder of them"
        )
        raise InputError(f"{source}: no files found{passed_over}; give {wanted}")
    try:
        source_format = source_format or _detect_format(root, visible)
        match source_format:
            case "folder":
                items = visible.items()
                find_in_folders(
                    source, lambda: (FoundImage(path, None, bytes=size) for path, size in items), listing, labelled
                )
            case "table":
                find_in_table(root, _find_table(source, visible), listing, labelled)
            case "parquet":
                for path in sorted(visible):
                    find_in_parquet(root, path, listing, labelled)
            case "arrow":
                for path in sorted(visible):
                    find_in_arrow(root, path, listing, labelled)
            case "tfrecord":
                find_in_tfrecords(root, sorted(visible), listing, labelled)
            case "webdataset":
                find_in_tars(source, root, sorted(visible), listing, labelled)
    except FileNotFoundError as error:
        raise InputError(f"{error}; give an existing folder, or a file of a format that is read") from error
    except (pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(
            f"{source} is damaged, or not of the format that its name says: {str(error).splitlines()[0]}"
        ) from error
    tables = [path for path in visible if suffix_of(path) in TEXT_SUFFIXES] if source_format == "folder" else []
    found = listing.found.to_table()
    if labelled:
        _check_classes(source, listing, found, tables)
    elif not len(found):
        raise InputError(f"{source}: no images found{_describe_ignored(listing)}; give images or a folder of them")
    return _to_source(source, root, source_format, listing, found, tables if labelled else [])


def _list_files(uri: str) -> tuple[str, dict[str, int]]:
    """Return the folder that paths are relative to, and the size in bytes of the one file or of all files in it."""
    if storage.is_local(uri) and os.path.isfile(uri):
        return storage.parent(uri), {storage.basename(uri): os.path.getsize(uri)}
    sizes = storage.find_files(uri)
    is_container = suffix_of(uri) in _CONTAINER_SUFFIXES or is_tfrecord(uri)
    if not sizes and (is_container or (not storage.is_local(uri) and storage.exists(uri))):
        return storage.parent(uri), {storage.basename(uri): 0}
    if not storage.is_local(uri) and not all(sizes.values()):
        # An empty object can have the name of a folder.
        folders = {path[:place] for path in sizes for place, letter in enumerate(path) if letter == "/"}
        sizes = {path: size for path, size in sizes.items() if size or path not in folders}
    return uri, sizes


def _detect_format(root: str, paths: Iterable[str]) -> SourceFormat:
    suffixes = {suffix_of(path) for path in paths}
    if suffixes & image_suffixes():
        return "folder"
    if any(map(is_tfrecord, paths)):
        return "tfrecord"
    if ".arrow" in suffixes:
        return "arrow"
    if suffixes & TEXT_SUFFIXES:
        return "table"
    if ".tar" in suffixes:
        return "webdataset"
    if ".parquet" in suffixes:
        first = next(path for path in paths if suffix_of(path) == ".parquet")
        return "parquet" if image_column(storage.read_parquet_schema(storage.join(root, first))) else "table"
    return "folder"


def _find_table(source: str, paths: Iterable[str]) -> str:
    tables = [path for path in paths if suffix_of(path) in {*TEXT_SUFFIXES, ".parquet"}]
    if len(tables) != 1:
        raise InputError(f"{source} contains {len(tables)} tables ({name_some(tables) or 'none'}); give one as SOURCE")
    return tables[0]


def _check_classes(source: str, listing: Listing, found: pa.Table, tables: list[str]) -> None:
    class_names = sort_class_names(listing.found.class_names)
    if len(class_names) < 2:
        raise InputError(
            f"{source}: images of {format_count(len(class_names), 'class')} "
            f"({', '.join(class_names) or 'none'}){_describe_ignored(listing)}; at least two are required, as "
            f"SOURCE/CLASS/image.jpg or SOURCE/train/CLASS/image.jpg{_describe_chances(source, listing, found, tables)}"
        )
    empty = {name: paths for name, paths in listing.ignored_of_class.items() if name not in class_names}
    if empty:
        described = [f"{in_text(name)} ({count_suffixes(paths)})" for name, paths in sorted(empty.items())]
        raise InputError(
            f"{source}: no image in {len(empty)} of {len(empty) + len(class_names)} classes: {name_some(described)}; "
            "add images, or move what is not a class out of SOURCE"
        )
    trained = found.filter(pc.field("split").is_null() | (pc.field("split") == "train"))["class"].unique()
    for split in ("val", "test"):
        used = found.filter(pc.field("split") == split)["class"].unique()
        unknown = [listing.found.class_names[number] for number in set(used.to_pylist()) - set(trained.to_pylist())]
        if unknown:
            raise InputError(
                f"{source}: {split} has classes that train does not have: {name_some(sorted(unknown))}; "
                "add training images of these classes or remove them"
            )


def _describe_ignored(listing: Listing) -> str:
    counts = Counter(listing.ignored.values())
    return f", not used {', '.join(f'{reason}: {count}' for reason, count in counts.most_common())}" if counts else ""


def _describe_chances(source: str, listing: Listing, found: pa.Table, tables: list[str]) -> str:
    """Return advice on what the user may have meant with a source that has fewer than two classes."""
    chances = f"; if {name_some(tables)} is a table of paths and labels, give it as SOURCE" if tables else ""
    if not tables and not len(found) and "not_in_a_class_folder" in listing.ignored.values():
        chances += "; if the names of the files say the class, give a table with the columns path and label as SOURCE"
    images = found.filter(pc.field("container").is_null())
    named = zip(images["path"].to_pylist(), images["split"].to_pylist(), strict=True)
    folders = {tuple(parts_of(path)[1 if split else 0 : -1]) for path, split in named}
    above = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))]
    below = sorted({parts[len(above)] for parts in folders if len(parts) > len(above)})
    if above and len(below) > 1:
        place = "/".join(above)
        advice = "move them up" if images["split"][0].is_valid else f"give {storage.join(source, place)}"
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
    used = set(listing.found.class_names)
    declared = [name for name in listing.declared_classes if name in used]
    class_names = [*declared, *sort_class_names(used.difference(declared))]
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = pa.array([label_of[name] for name in listing.found.class_names], pa.int32()).take(found["class"])
    images = found.append_column("label", labels).select(IMAGES_SCHEMA.names).sort_by("path")
    paths = images["path"].combine_chunks()
    repeated = paths[1:].filter(pc.equal(paths[1:], paths[:-1]))
    if len(repeated):
        raise InputError(f"{source} lists {repeated[0].as_py()!r} more than once; list each image once")
    not_tried = [path for path, reason in listing.ignored.items() if reason == "not_an_image_name"]
    listed = SourceListed(
        images=len(images),
        classes=len(class_names),
        not_tried=count_suffixes(not_tried),
        left_behind=_count_names(listing.left_behind),
        unused_tables=name_some(unused_tables),
        empty_classes=name_some([name for name in listing.declared_classes if name not in used]),
    )
    ignored = pa.table({"path": list(listing.ignored), "reason": list(listing.ignored.values())})
    return Source(root, class_names, images, ignored, listed, source_format)


def _count_names(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
