"""The card of a dataset: its counts, what was left out and why, and a picture of every class."""

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from data_prep.manifest import DUPLICATES_NAME, REJECTED_NAME, SPLITS, Manifest
from trainer import storage
from trainer.markdown import format_table

CARD_NAME = "README.md"
CONTACT_SHEET_NAME = "contact_sheet.png"

_IMAGES_PER_CLASS = 8
_MOST_CLASSES = 50
_TILE_PIXELS = 96


def write_card(dataset: str, manifest: Manifest) -> None:
    """Writes ``README.md`` and ``contact_sheet.png`` of a dataset whose Parquet files are there."""
    sink = io.BytesIO()
    _draw_contact_sheet(dataset, manifest).save(sink, format="png")
    storage.write_bytes(storage.join(dataset, CONTACT_SHEET_NAME), sink.getvalue())
    storage.write_bytes(storage.join(dataset, CARD_NAME), _format_card(manifest).encode())


def _format_card(manifest: Manifest) -> str:
    size = manifest.image_size
    counts = [manifest.splits[split].rows_per_class for split in SPLITS]
    totals = [sum(column) for column in counts]
    of_classes = [(name, *row, sum(row)) for name, *row in zip(manifest.class_names, *counts, strict=True)]
    lines = [
        f"# {sum(totals)} images of {manifest.num_classes} classes",
        "",
        f"{size}x{size}x{manifest.channels} uint8, from {manifest.source}",
        "",
        *format_table(("class", *SPLITS, "total"), [*of_classes, ("all", *totals, sum(totals))]),
        "",
        f"Not used: {sum(manifest.rejected.values())} files ({REJECTED_NAME})",
        *(f"- {reason}: {count}" for reason, count in manifest.rejected.items()),
        "",
        f"With a duplicate: {manifest.duplicate_images} images ({DUPLICATES_NAME}); with one in another split: "
        f"{manifest.leaked_images}",
        "",
        f"resize {manifest.resize}, background {manifest.background}, seed {manifest.seed}, fingerprint "
        f"{manifest.fingerprint}",
        "",
        f"![the first images of every class]({CONTACT_SHEET_NAME})",
        "",
    ]
    return "\n".join(lines)


def _draw_contact_sheet(dataset: str, manifest: Manifest) -> Image.Image:
    """Returns one row of tiles a class: the first training images of each."""
    num_classes = min(manifest.num_classes, _MOST_CLASSES)
    mode = "L" if manifest.channels == 1 else "RGB"
    sheet = Image.new(mode, (_IMAGES_PER_CLASS * _TILE_PIXELS, num_classes * _TILE_PIXELS), "white")
    for label, column, pixels in _first_images(dataset, manifest, num_classes):
        picture = Image.fromarray(pixels[..., 0] if manifest.channels == 1 else pixels)
        tile = picture.resize((_TILE_PIXELS, _TILE_PIXELS), Image.Resampling.LANCZOS)
        sheet.paste(tile, (column * _TILE_PIXELS, label * _TILE_PIXELS))
    return sheet


def _first_images(
    dataset: str, manifest: Manifest, num_classes: int
) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
    """Yields label, number within the class and pixels of the first training images of each class.

    Labels are read first, and pixels of those row groups only that have an image to show.
    """
    found = [0] * num_classes
    for file in manifest.splits["train"].files:
        with storage.open_file(storage.join(dataset, file.path)) as content:
            parquet = pq.ParquetFile(content)
            for group in range(parquet.num_row_groups):
                if min(found) == _IMAGES_PER_CLASS:
                    return
                labels = parquet.read_row_group(group, columns=["label"])["label"].to_numpy()
                wanted = [label for label in range(num_classes) if found[label] < _IMAGES_PER_CLASS and label in labels]
                if not wanted:
                    continue
                images = parquet.read_row_group(group, columns=["image"])["image"].combine_chunks().to_numpy_ndarray()
                for label in wanted:
                    for row in np.flatnonzero(labels == label)[: _IMAGES_PER_CLASS - found[label]]:
                        yield label, found[label], images[row]
                        found[label] += 1
