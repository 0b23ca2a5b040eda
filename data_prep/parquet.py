"""Find images in the rows of Parquet files, such as those on the Hugging Face Hub."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.labels import find_first, name_classes, name_splits_given
from data_prep.listing import Listing, fill_columns
from data_prep.names import split_of_file, suffix_of, to_class_name
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
        listing.ignore_one(path, "not_a_parquet_file")
        return
    uri = storage.join(root, path)
    schema = storage.read_parquet_schema(uri)
    check_columns(uri, schema, labelled)
    labels_in = label_column(schema)
    with storage.open_file(uri) as file:
        given = pq.read_table(file, columns=[name for name in (labels_in, "split") if name in schema.names])
        num_rows = pq.ParquetFile(file).metadata.num_rows
    no_label, split = pa.nulls(num_rows, pa.string()), pa.repeat(pa.scalar(split_of_file(path), pa.string()), num_rows)
    columns = {
        "label": given[labels_in] if labels_in else no_label,
        "split": given["split"] if "split" in schema.names else split,
        "offset": np.arange(num_rows),
        "bytes": np.zeros(num_rows, np.int64),
    }
    add_rows(uri, path, schema, pa.table(columns), listing, labelled)


def check_columns(uri: str, schema: pa.Schema, labelled: bool) -> None:
    """Raise InputError where a file has no column of images, or none of labels and every image must have one."""
    if image_column(schema) is None or (labelled and label_column(schema) is None):
        raise InputError(
            f"{uri} has the columns {', '.join(schema.names)}; required are image and label; split is optional"
        )


def add_rows(uri: str, path: str, schema: pa.Schema, rows: pa.Table, listing: Listing, labelled: bool) -> None:
    """Add the rows of a file to a listing.

    Args:
        uri: URI of the file, for messages.
        path: path of the file in the source.
        schema: its schema, which can declare the names of the classes.
        rows: label, split as it is given, and where the image is: offset, which is null for one that the file does not
            hold, and bytes; see `data_prep.sources.IMAGES_SCHEMA`.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        InputError: a label is missing or unknown, or a split is unknown.
    """
    declared = declared_classes(schema)
    listing.declare(declared)
    class_names = name_classes(uri, rows["label"], declared)
    splits = name_splits_given(path, rows["split"])
    names = pa.chunked_array([pa.array((f"{path}#{row:08d}" for row in range(len(rows))), pa.string())])
    images = fill_columns(
        path=names, class_name=class_names, split=splits, container=path, offset=rows["offset"], bytes=rows["bytes"]
    )
    is_here = rows["offset"].is_valid()
    has_none = pc.and_(is_here, class_names.is_null())
    if labelled and not declared and (row := find_first(has_none)) is not None:
        raise InputError(f"{path}, row {row} has no label; add it")
    elsewhere = images.filter(pc.invert(is_here))
    listing.ignore(elsewhere["path"], "bytes_are_elsewhere", elsewhere["class_name"])
    if labelled:
        listing.ignore(images["path"].filter(has_none), "no_label")
        is_here = pc.and_(is_here, pc.invert(has_none))
    listing.add(images.filter(is_here))


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
