"""The card of a dataset: its counts, which files were not used and why, and a picture of every class."""

import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from data_prep.manifest import DUPLICATES_NAME, MANIFEST_NAME, REJECTED_NAME, SPLITS, Manifest, rows_per_batch
from trainer.runtime import storage
from trainer.runtime.markdown import MOST_CLASSES, format_count, format_table, shorten_digest

CARD_NAME = "README.md"
CONTACT_SHEET_NAME = "contact_sheet.png"

_READ_IT = (
    "```python",
    "import pyarrow as pa, pyarrow.parquet as pq, glob",
    'index = pq.read_table("index.parquet")  # or pandas.read_parquet',
    'shards = [pa.ipc.open_file(pa.memory_map(path)).read_all() for path in sorted(glob.glob("shards/*.arrow"))]',
    'images = pa.concat_tables(shards)["image"]  # of chunk(0): to_numpy_ndarray()',
    "",
    "# Hugging Face knows no tensors: each image is a list of height x width x channels values.",
    'table = pa.table({"image": pa.chunked_array([one.storage for one in images.chunks]), "label": index["label"]})',
    "import datasets",
    "dataset = datasets.Dataset(table)",
    "```",
)
# The contact sheet stays below 2,000 pixels on each side: with more classes, each has fewer images.
_ROWS, _COLUMNS = 20, 20
_IMAGES_PER_CLASS = (8, 4, 2, 1)
_TILE_PIXELS, _GAP_PIXELS, _NAME_PIXELS, _FONT_PIXELS = 80, 4, 16, 11
# Where not all classes are listed: how many of those with the fewest images, and of those with the most.
_EXTREME_CLASSES = 10
# A quarter of the 256 gray levels.
_LEAST_LEVELS = 64


def write_card(dataset: str, manifest: Manifest, index: pa.Table) -> None:
    """Write ``README.md`` and ``contact_sheet.png`` of a dataset whose shards have been written."""
    sink = io.BytesIO()
    _draw_contact_sheet(dataset, manifest, index).save(sink, format="png")
    storage.write_bytes(storage.join(dataset, CONTACT_SHEET_NAME), sink.getvalue())
    storage.write_bytes(storage.join(dataset, CARD_NAME), _format_card(manifest).encode())


def describe_value_range(manifest: Manifest) -> str:
    """Return a line about images with more than 8 bits per channel, or an empty string if there are none."""
    if manifest.value_range is None:
        return ""
    low, high = manifest.value_range
    return f"values {low:.10g} to {high:.10g} of images with more than 8 bits per channel become gray levels 0 to 255"


def describe_few_levels(manifest: Manifest) -> str:
    """Return a warning if 99% of the pixels lie in less than a quarter of the gray levels, else an empty string."""
    if manifest.gray_levels is None:
        return ""
    low, high = manifest.gray_levels
    levels = high - low + 1
    if levels >= _LEAST_LEVELS:
        return ""
    text = f"warning: 99% of pixels lie in {levels} of 256 gray levels, {low}-{high} ({CONTACT_SHEET_NAME})"
    if manifest.value_range is None:
        return text
    start, end = manifest.value_range
    first, last = (start + level * (end - start) / 256 for level in (low, high + 1))
    return (
        f"{text}; to spread them over all gray levels, use --value-range {first:.5g}:{last:.5g} (darker values become "
        "black, brighter ones white)"
    )


def _format_card(manifest: Manifest) -> str:
    size = manifest.image_size
    *of_classes, of_all = list_classes(manifest)
    shown = min(manifest.num_classes, _ROWS * _COLUMNS)
    lines = [
        f"# {format_count(int(of_all[-1]), 'image')} of {format_count(manifest.num_classes, 'class')}",
        "",
        f"{size}x{size}x{manifest.channels} uint8, from {manifest.source}",
        "",
        *format_table(("class", *SPLITS, "total"), [*of_classes, of_all]),
        "",
        *(
            part
            for line in (describe_value_range(manifest), describe_few_levels(manifest))
            if line
            for part in (line, "")
        ),
        f"Not used: {format_count(sum(manifest.rejected.values()), 'file')} ({REJECTED_NAME})",
        *(f"- {reason}: {count}" for reason, count in manifest.rejected.items()),
        "",
        f"Images with a duplicate: {manifest.duplicate_images} ({DUPLICATES_NAME}); with one in another split: "
        f"{manifest.leaked_images}",
        "",
        f"resize {manifest.resize}, background {manifest.background}, seed {manifest.seed}, fingerprint "
        f"{shorten_digest(manifest.fingerprint)}",
        "",
        "To read it (row i of the index is row i of the shards, one after another):",
        "",
        *_READ_IT,
        "",
        f"![the first images of {format_count(shown, 'class')}]({CONTACT_SHEET_NAME})",
        "",
    ]
    return "\n".join(lines)


def list_classes(manifest: Manifest) -> list[tuple[str, ...]]:
    """Return a row for each class, and one for all classes: name, number of images in each split, total.

    Of many classes, only those with the fewest and with the most images: ``manifest.json`` has all.
    """
    counts = [manifest.splits[split].rows_per_class for split in SPLITS]
    rows = [(name, *row, sum(row)) for name, *row in zip(manifest.class_names, *counts, strict=True)]
    totals = [sum(column) for column in counts]
    if len(rows) > MOST_CLASSES:
        rows.sort(key=lambda row: row[-1])
        between = format_count(len(rows) - 2 * _EXTREME_CLASSES, "class")
        empty = ("",) * (len(SPLITS) + 1)
        rows[_EXTREME_CLASSES:-_EXTREME_CLASSES] = [(f"... {between} between, see {MANIFEST_NAME}", *empty)]
    return [tuple(map(str, row)) for row in (*rows, ("all", *totals, sum(totals)))]


def _draw_contact_sheet(dataset: str, manifest: Manifest, index: pa.Table) -> Image.Image:
    """Draw the name and the first training images of each class, one class per row, in as many columns as needed."""
    fits = (count for count in _IMAGES_PER_CLASS if _COLUMNS // count * _ROWS >= manifest.num_classes)
    per_class = next(fits, _IMAGES_PER_CLASS[-1])
    num_classes = min(manifest.num_classes, _COLUMNS // per_class * _ROWS)
    # A gap separates the columns of classes.
    width = per_class * _TILE_PIXELS + _GAP_PIXELS
    height = _NAME_PIXELS + _TILE_PIXELS
    size = (-(-num_classes // _ROWS) * width - _GAP_PIXELS, min(num_classes, _ROWS) * height)
    sheet = Image.new("L" if manifest.channels == 1 else "RGB", size, "white")
    for label, number, pixels in _first_images(dataset, manifest, index, num_classes, per_class):
        picture = Image.fromarray(pixels[..., 0] if manifest.channels == 1 else pixels)
        tile = picture.resize((_TILE_PIXELS, _TILE_PIXELS), Image.Resampling.LANCZOS)
        left, row = label // _ROWS * width, label % _ROWS
        sheet.paste(tile, (left + number * _TILE_PIXELS, row * height + _NAME_PIXELS))
    for label, name in enumerate(manifest.class_names[:num_classes]):
        _write_name(sheet, name, (label // _ROWS * width, label % _ROWS * height), per_class * _TILE_PIXELS)
    return sheet


def _write_name(sheet: Image.Image, name: str, place: tuple[int, int], width: int) -> None:
    """Write the name of a class above its images, cut at their width."""
    # Matplotlib, which finds the fonts, takes a second to load.
    from trainer.runtime.fonts import find_font_file

    name = " ".join(name.split())
    font = ImageFont.truetype(find_font_file(name), _FONT_PIXELS)
    if font.getlength(name) > width:
        while name and font.getlength(f"{name}…") > width:
            name = name[:-1]
        name += "…"
    ImageDraw.Draw(sheet).text(place, name, fill="black", font=font)


def _first_images(
    dataset: str, manifest: Manifest, index: pa.Table, num_classes: int, per_class: int
) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
    """Yield label, number within the class and pixels of the first training images of each class."""
    train = index.select(["shard", "row", "label", "split"]).filter(pc.field("split") == "train")
    labels = train["label"].to_numpy()
    by_label = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_label], np.arange(num_classes + 1))
    wanted: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for label in range(num_classes):
        for number, place in enumerate(by_label[starts[label] : starts[label + 1]][:per_class]):
            wanted[train["shard"][place].as_py()].append((train["row"][place].as_py(), label, number))
    for shard, images in wanted.items():
        uri = storage.join(dataset, manifest.shards[shard].path)
        with pa.memory_map(uri) if storage.is_local(uri) else storage.open_file(uri) as file:
            reader, rows = pa.ipc.open_file(file), rows_per_batch(math.prod(manifest.image_shape))
            for batch, of_batch in itertools.groupby(sorted(images), key=lambda image: image[0] // rows):
                pixels = reader.get_batch(batch).column("image").to_numpy_ndarray()
                for row, label, number in of_batch:
                    yield label, number, pixels[row % rows]
