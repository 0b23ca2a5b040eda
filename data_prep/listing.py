"""The listing of a source, whatever its format: the images in it, and the files that are not images."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pyarrow as pa

from data_prep.manifest import SplitName

# Rows that are Python objects until they become a batch of columns.
_ROWS_PER_BATCH = 2**14
_FOUND_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("class", pa.int32()),  # an index into the class names in the order of their first image, or null
        ("split", pa.string()),
        ("container", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
    ]
)


@dataclass(slots=True)
class FoundImage:
    """One image of a source, before all classes are known and labels can be numbered."""

    path: str
    class_name: str | None
    split: SplitName | None = None
    container: str | None = None
    offset: int = 0
    bytes: int = 0

    @property
    def name_in_container(self) -> str:
        """Name of the member of a tar; the path of an image outside of one."""
        return self.path if self.container is None else self.path.removeprefix(f"{self.container}#")


class FoundImages:
    """Images as columns: as Python objects, millions of them would take gigabytes."""

    def __init__(self) -> None:
        self._classes: dict[str, int] = {}
        self._rows: list[tuple[object, ...]] = []
        self._batches: list[pa.RecordBatch] = []

    @property
    def class_names(self) -> list[str]:
        """The class names in the order of their first image."""
        return list(self._classes)

    def append(self, image: FoundImage) -> None:
        """Add an image."""
        name = image.class_name
        number = None if name is None else self._classes.setdefault(name, len(self._classes))
        self._rows.append((image.path, number, image.split, image.container, image.offset, image.bytes))
        if len(self._rows) == _ROWS_PER_BATCH:
            self._pack()

    def to_table(self) -> pa.Table:
        """Return path, class (int32, an index into class_names, or null), split, container, offset and bytes."""
        if self._rows:
            self._pack()
        return pa.Table.from_batches(self._batches, _FOUND_SCHEMA)

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, one.type) for column, one in zip(columns, _FOUND_SCHEMA, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=_FOUND_SCHEMA))
        self._rows.clear()


@dataclass
class Listing:
    """The images and the other files found in a source so far."""

    found: FoundImages = field(default_factory=FoundImages)
    ignored: dict[str, str] = field(default_factory=dict)
    """Files that are not images: the reason by path."""
    ignored_of_class: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Paths of the ignored files that are in the folder of a class, by class."""
    declared_classes: list[str] = field(default_factory=list)
    """Class names in the order in which the source declares them; empty if it declares none."""
    left_behind: Counter[str] = field(default_factory=Counter)
    """Number of files that an operating system or another program left in the source, by kind."""

    def add(self, image: FoundImage) -> None:
        """Add an image, unless its path is not UTF-8, as in some old zip files: Parquet cannot store such a path."""
        if in_text(image.path) == image.path:
            self.found.append(image)
        else:
            self.ignore(image.path, "name_is_not_utf8", image.class_name)

    def ignore(self, path: str, reason: str, class_name: str | None = None) -> None:
        """Add a file that is not an image, judging by its place or name."""
        path = in_text(path)
        self.ignored[path] = reason
        if class_name is not None:
            self.ignored_of_class[class_name].append(path)


def in_text(name: str) -> str:
    """Return a name in which each byte that is not UTF-8 is written as a backslash, udc and two hex digits."""
    return name.encode("utf-8", "backslashreplace").decode()
