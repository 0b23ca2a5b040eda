"""Find images in TFRecord files, such as those of TensorFlow Datasets: one tf.train.Example for each image."""

import functools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from data_prep.columns import Rows
from data_prep.listing import FOUND_SCHEMA, Listing
from data_prep.names import name_declared, split_alluded_to, split_of_file, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError

# Such as digits-train.tfrecord-00000-of-00001, or train-00000-of-01024.
_NAME = re.compile(r"(?P<stem>[^/]*?)(?:\.tfrecords?(?:-\d+-of-\d+)?|-\d{5}-of-\d{5})$")
# In this order: those of the TensorFlow Model Garden, whose text needs no list of names, and of TensorFlow Datasets.
_IMAGE_KEYS = ("image/encoded", "image")
_LABEL_KEYS = ("image/class/text", "label", "image/class/label")
# Beside the files of TensorFlow Datasets: a class a line.
_NAMES_FILE = "label.labels.txt"
# A length of 8 bytes and its checksum; after the data, their checksum.
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
# tensorflow/core/example/example.proto, without lists of floating-point numbers. A map is a list of its entries.
_EXAMPLE = """
name: "training_notes/example.proto" package: "training_notes" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".training_notes.BytesList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".training_notes.Int64List" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".training_notes.Feature" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".training_notes.Entry" }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".training_notes.Features" }
}
"""


def is_tfrecord(path: str) -> bool:
    """Return whether a file is a TFRecord file by its name."""
    return _NAME.search(path) is not None


def find_in_tfrecords(root: str, paths: Iterable[str], listing: Listing, labelled: bool) -> None:
    """Add the images in TFRecord files to a listing.

    Args:
        root: path or URI of the source.
        paths: paths of its files; files of other kinds are ignored.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        FileNotFoundError: a file does not exist.
        InputError: a file is damaged, or has no images or labels.
    """
    paths = list(paths)
    for path in paths:
        if not is_tfrecord(path):
            listing.ignore_one(path, "not_a_tfrecord_file")
            continue
        names_file = posixpath.join(posixpath.dirname(path), _NAMES_FILE)
        declared = _read_names(storage.join(root, names_file)) if names_file in paths else []
        listing.declare(declared)
        _find_in_one(root, path, declared, listing, labelled)


def _read_names(uri: str) -> list[str]:
    lines = storage.read_bytes(uri).decode().splitlines()
    return [to_class_name(line.strip()) or str(number) for number, line in enumerate(lines)]


def _find_in_one(root: str, path: str, declared: list[str], listing: Listing, labelled: bool) -> None:
    uri = storage.join(root, path)
    match = _NAME.search(path)
    split = split_of_file(path) or (split_alluded_to(match["stem"]) if match else None)
    images = Rows(FOUND_SCHEMA)
    for row, (offset, record) in enumerate(_read_records(uri)):
        features = _parse_example(uri, row, record)
        image = next((one for key in _IMAGE_KEYS if isinstance(one := features.get(key), bytes)), None)
        label = next((features[key] for key in _LABEL_KEYS if key in features), None)
        if image is None or (labelled and label is None):
            raise InputError(
                f"{uri}, record {row} has the features {', '.join(features)}; required are an image "
                f"({' or '.join(_IMAGE_KEYS)}) and a label ({' or '.join(_LABEL_KEYS)})"
            )
        if isinstance(label, int) and declared:
            (class_name,) = name_declared(uri, declared, [label])
        else:
            class_name = to_class_name(label.decode() if isinstance(label, bytes) else label)
        images.append(f"{path}#{row:08d}", class_name, split, path, offset + record.index(image), len(image))
    found = images.to_table()
    if labelled:
        listing.ignore(found["path"].filter(found["class_name"].is_null()), "no_label")
        found = found.filter(found["class_name"].is_valid())
    listing.add(found)


def _read_records(uri: str) -> Iterator[tuple[int, bytes]]:
    """Yield the place of each record in a file, and its bytes."""
    with storage.open_file(uri) as file:
        offset = _HEADER_BYTES
        while header := file.read(_HEADER_BYTES):
            length = int.from_bytes(header[:8], "little")
            # A wrong length must not become the size of a buffer.
            record = file.read(length) if length < 2**31 else b""
            if len(record) < length or len(file.read(_FOOTER_BYTES)) < _FOOTER_BYTES:
                raise InputError(
                    f"{uri} is damaged, cut off or compressed at byte {offset - _HEADER_BYTES}; get the file again, or "
                    "unpack it"
                )
            yield offset, record
            offset += length + _FOOTER_BYTES + _HEADER_BYTES


def _parse_example(uri: str, row: int, record: bytes) -> Mapping[str, bytes | int]:
    """Return the first value of each feature of a tf.train.Example that has bytes or whole numbers."""
    try:
        example = _example_class().FromString(record)
    except DecodeError as error:
        raise InputError(f"{uri}, record {row} is not a tf.train.Example: {error}") from error
    values = {
        entry.key: entry.value.bytes_list.value or entry.value.int64_list.value for entry in example.features.feature
    }
    return {key: some[0] for key, some in values.items() if some}


@functools.cache
def _example_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("training_notes.Example"))
