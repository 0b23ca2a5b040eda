"""Decode the images of a source in slices, one after another or as tasks of Ray Data."""

import contextlib
import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from data_prep.contents import read_blocks
from data_prep.decode import ImageOptions, Pixels, decode_image
from data_prep.formats import RejectedImageError
from data_prep.isolation import IMAGES_PER_CALL, Decode, Outcome, decode_guarded
from data_prep.sources import Source
from trainer.runtime import storage
from trainer.runtime.errors import InputError

# A slice fits into a worker's memory many times over.
_MAX_SLICE_IMAGES = 256
_MAX_SLICE_BYTES = 32 * 2**20


def slice_images(found: Source, options: ImageOptions) -> list[range]:
    """Return the range of rows of each slice: what a task decodes at once to predict it."""
    image_bytes = options.image_size**2 * options.channels
    rows = max(1, min(_MAX_SLICE_IMAGES, _MAX_SLICE_BYTES // image_bytes))
    return [range(start, min(start + rows, len(found.images))) for start in range(0, len(found.images), rows)]


def decode_listed(
    source: str, listed: pa.Table, options: ImageOptions, decode: Decode = decode_image
) -> Iterator[tuple[bytes | None, Outcome]]:
    """Yield the bytes of each image (None if unreadable), and what it decodes to or why it cannot be used.

    Args:
        source: URI of the folder that paths and containers are relative to.
        listed: table with the columns of `data_prep.sources.IMAGES_SCHEMA`, at least one row.
        options: how to decode.
        decode: function that decodes one image.
    """
    slice_name = hashlib.sha256(repr((source, listed["path"][0], len(listed), options)).encode()).hexdigest()
    marker = Path(tempfile.gettempdir(), f"training-notes-decoding-{slice_name}")
    for_decoder, for_user = itertools.tee(read_blocks(source, listed, IMAGES_PER_CALL))
    calls = ([content for content in block if content is not None] for block in for_decoder)
    with contextlib.closing(decode_guarded(calls, options, marker, decode)) as decoded:
        for outcomes, block in zip(decoded, for_user, strict=True):
            in_turn = iter(outcomes)
            for content in block:
                yield content, "unreadable" if content is None else next(in_turn)


def decode_file(location: str, options: ImageOptions) -> Pixels:
    """Return one image file, local or s3://, decoded as for a dataset: uint8 ``[image_size, image_size, channels]``.

    Raises:
        InputError: the file does not exist, or cannot be used.
    """
    try:
        return decode_image(storage.read_bytes(storage.resolve_uri(location)), options)
    except (FileNotFoundError, RejectedImageError) as error:
        raise InputError(f"{location} cannot be used: {error}; give image files") from error


def read_images(found: Source, options: ImageOptions) -> tuple[Any, int]:
    """Return a lazy `ray.data.Dataset` that decodes the images of a source, with or without labels, and their number.

    The columns are path (string), label (string, the class name, or empty if there is none), sha256 (bytes, hash of
    the file, as in a dataset), image (uint8 ``[image_size, image_size, channels]``, zeros if it could not be
    decoded) and error (string, the reason, or empty).

    Args:
        found: the source, from `data_prep.sources.find_images`.
        options: how to decode.
    """
    # One copy of the list per node, in Ray's shared memory.
    images = ray.put(found.images)
    items = [{"start": rows.start, "rows": len(rows)} for rows in slice_images(found, options)]
    decoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _decode_slice,
        batch_size=1,
        fn_kwargs={"images": images, "source": found.uri, "class_names": found.class_names, "options": options},
    )
    return decoded, len(found.images)


def _decode_slice(
    items: dict[str, Any], images: Any, source: str, class_names: list[str], options: ImageOptions
) -> dict[str, Any]:
    listed = ray.get(images).slice(items["start"][0], items["rows"][0])
    contents, outcomes = zip(*decode_listed(source, listed, options), strict=True)
    nothing = np.zeros((options.image_size, options.image_size, options.channels), np.uint8)
    labels = listed["label"].to_pylist()
    return {
        "path": np.array(listed["path"].to_pylist(), np.object_),
        "label": np.array(["" if label is None else class_names[label] for label in labels], np.object_),
        "sha256": np.array([hashlib.sha256(content or b"").digest() for content in contents], np.object_),
        "image": np.stack([outcome if isinstance(outcome, np.ndarray) else nothing for outcome in outcomes]),
        "error": np.array([outcome if isinstance(outcome, str) else "" for outcome in outcomes], np.object_),
    }
