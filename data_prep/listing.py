"""The listing of a source, whatever its format: the images in it, and the files that are not images."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import filter_rows

FOUND_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # identifies the image within the source
        ("class_name", pa.string()),  # null if it has none
        ("split", pa.string()),  # null if the source does not give it
        ("container", pa.string()),  # see `data_prep.sources.IMAGES_SCHEMA`
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
FILES_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # as `in_text` writes it
        ("is_text", pa.bool_()),  # whether it is UTF-8: no table can store another, as of some old zip files
        ("bytes", pa.int64()),
    ]
)
IGNORED_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("reason", pa.string()),  # null for a label without an image, which belongs to its class only
        ("class_name", pa.string()),  # null if it is not in the folder of a class
    ]
)


@dataclass
class Listing:
    """The images and the other files found in a source so far, as columns."""

    declared_classes: list[str] = field(default_factory=list)
    """Class names in the order in which the source declares them; empty if it declares none."""
    left_behind: Counter[str] = field(default_factory=Counter)
    """Number of files that an operating system or another program left in the source, by kind."""
    _found: list[pa.Table] = field(default_factory=list)
    _ignored: list[pa.Table] = field(default_factory=list)

    @property
    def found(self) -> pa.Table:
        """All images: FOUND_SCHEMA."""
        return pa.concat_tables([FOUND_SCHEMA.empty_table(), *self._found])

    @property
    def ignored(self) -> pa.Table:
        """All files that are not images: path, reason and, of those in the folder of a class, class_name."""
        return pa.concat_tables([IGNORED_SCHEMA.empty_table(), *self._ignored])

    def declare(self, class_names: list[str]) -> None:
        """Add declared classes."""
        self.declared_classes += [name for name in class_names if name not in self.declared_classes]

    def add(self, images: pa.Table) -> None:
        """Add images: path, class_name, what else is known of FOUND_SCHEMA, and is_text if some paths may not be."""
        if "is_text" in images.column_names:
            unknown = images.filter(pc.invert(images["is_text"]))
            self.ignore(unknown["path"], "name_is_not_utf8", unknown["class_name"])
            images = filter_rows(images, images["is_text"])
        self._found.append(fill_columns(**{name: images[name] for name in images.column_names}))

    def ignore(self, paths: pa.ChunkedArray, reason: str, class_names: pa.ChunkedArray | None = None) -> None:
        """Add files that are not images, judging by their place or name."""
        names = pa.nulls(len(paths), pa.string()) if class_names is None else class_names
        self.add_ignored(pa.table([paths, pa.repeat(reason, len(paths)), names], IGNORED_SCHEMA.names))

    def ignore_one(self, path: str, reason: str) -> None:
        """Add one of a few files that are not images."""
        self.ignore(pa.chunked_array([[path]]), reason)

    def add_ignored(self, files: pa.Table) -> None:
        """Add files that are not images: IGNORED_SCHEMA."""
        self._ignored.append(files.cast(IGNORED_SCHEMA))


def fill_columns(**columns: Any) -> pa.Table:
    """Return images: FOUND_SCHEMA with some of its columns, or one value for all rows, and the others empty.

    Args:
        **columns: path, which must be a column, and others by their names; those of other names are left out.
    """
    rows = len(columns["path"])
    arrays = []
    for one in FOUND_SCHEMA:
        value = columns.get(one.name, 0 if one.type == pa.int64() else None)
        is_column = isinstance(value, pa.Array | pa.ChunkedArray)
        arrays.append(value if is_column else pa.repeat(pa.scalar(value, one.type), rows))
    return pa.table(arrays, FOUND_SCHEMA.names).cast(FOUND_SCHEMA)


def in_text(name: str) -> str:
    """Return a name in which each byte that is not UTF-8 is written as a backslash, udc and two hex digits."""
    return name.encode("utf-8", "backslashreplace").decode()
