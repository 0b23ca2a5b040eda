"""Find images in the rows of Parquet files, such as those on the Hugging Face Hub."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.listing import FoundImage, Listing
from data_prep.names import name_declared, parse_split, split_of_file, suffix_of, to_class_name, to_class_names
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def find_in_parquet(root: str, path: str, listing: Listing, labelled: bool) -> None:
    """Add the images in the rows of a Parquet file to a listing.

    Args:
        root: path or URI of the source.
        path: path of the file in the source; a file of another kind is ignored.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: labels are missing or cannot be read.
    """
    if suffix_of(path) != ".parquet":
        listing.ignore(path, "not_a_parquet_file")
        return
    uri = storage.join(root, path)
    schema = storage.read_parquet_schema(uri)
    check_columns(uri, schema, labelled)
    labels_in = label_column(schema)
    columns = [name for name in (labels_in, "split") if name in schema.names]
    with storage.open_file(uri) as file:
        rows = pq.read_table(file, columns=columns)
        num_rows = pq.ParquetFile(file).metadata.num_rows
    labels = rows[labels_in].to_pylist() if labels_in else [None] * num_rows
    splits = rows["split"].to_pylist() if "split" in columns else [split_of_file(path)] * num_rows
    places = [Place(row, 0) for row in range(num_rows)]
    add_rows(uri, path, schema, labels, splits, places, listing, labelled)


class Place(NamedTuple):
    """Where a file holds an image."""

    offset: int
    """Number of the first byte, or of the row in a Parquet file."""
    bytes: int
    """Size; 0 in a Parquet file."""


def check_columns(uri: str, schema: pa.Schema, labelled: bool) -> None:
    """Raise InputError where a file has no column of images, or none of labels and every image must have one."""
    if image_column(schema) is None or (labelled and label_column(schema) is None):
        raise InputError(
            f"{uri} has the columns {', '.join(schema.names)}; required are image and label; split is optional"
        )


def add_rows(
    uri: str,
    path: str,
    schema: pa.Schema,
    labels: Sequence[Any],
    splits: Sequence[Any],
    places: Sequence[Place | None],
    listing: Listing,
    labelled: bool,
) -> None:
    """Add the rows of a file to a listing.

    Args:
        uri: URI of the file, for messages.
        path: path of the file in the source.
        schema: its schema, which can declare the names of the classes.
        labels: label of each row, or None.
        splits: split of each row as it is given, or None.
        places: place of each image; None for one that the file does not hold.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        InputError: a label is missing or unknown, or a split is unknown.
    """
    declared = declared_classes(schema)
    class_names = name_declared(uri, declared, labels) if declared else to_class_names(labels)
    listing.declared_classes += [name for name in declared if name not in listing.declared_classes]
    for row, (class_name, split, place) in enumerate(zip(class_names, splits, places, strict=True)):
        name = f"{path}#{row:08d}"
        if place is None:
            listing.ignore(name, "bytes_are_elsewhere", class_name)
        elif labelled and class_name is None and declared:
            listing.ignore(name, "no_label")
        elif labelled and class_name is None:
            raise InputError(f"{path}, row {row} has no label; add it")
        else:
            listing.add(FoundImage(name, class_name, parse_split(path, row, split), path, *place))


def image_column(schema: pa.Schema) -> str | None:
    """Return the name of the image column, or None: ``image``, or the only column declared to contain images."""
    declared = [name for name, feature in _declared_features(schema).items() if feature.get("_type") == "Image"]
    return "image" if "image" in schema.names else declared[0] if len(declared) == 1 else None


def label_column(schema: pa.Schema) -> str | None:
    """Return the name of the label column, or None: ``label``, or the only column declared to contain classes."""
    declared = [name for name, feature in _declared_features(schema).items() if feature.get("_type") == "ClassLabel"]
    return "label" if "label" in schema.names else declared[0] if len(declared) == 1 else None


def declared_classes(schema: pa.Schema) -> list[str]:
    """Return the declared class names in the order of their numbers; empty if the file declares none."""
    column = label_column(schema)
    if column is None or not pa.types.is_integer(schema.field(column).type):
        return []
    names = _declared_features(schema).get(column, {}).get("names") or []
    return [to_class_name(name) or str(number) for number, name in enumerate(names)]


def _declared_features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return what the Hugging Face metadata declare about each column; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: features[name] for name in schema.names if isinstance(features.get(name), dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
