"""Say what a source holds and what a preparation would do with it, from its listing and a few of its images."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import count_values
from data_prep.contents import read_contents
from data_prep.formats import RejectedImageError, open_image
from data_prep.manifest import SPLITS
from data_prep.names import name_some
from data_prep.prepare import PrepareConfig
from data_prep.sources import Source
from trainer.runtime.markdown import format_count

# Spread over all images: enough to see a mixture, few enough for a source in a bucket.
_LOOKED_AT = 100
_SAMPLES = 3
# Modes of Pillow whose pixels are colored, and those with more than 8 bits.
_COLOR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def preview_source(found: Source, config: PrepareConfig) -> list[str]:
    """Return a description of a source line by line, without connecting to Ray.

    Args:
        found: the source, from `data_prep.sources.find_images`.
        config: the options of the preparation.

    Raises:
        InputError: its storage cannot be read.
    """
    count = len(found.images)
    places = sorted({index * count // _LOOKED_AT for index in range(_LOOKED_AT)})
    looked_at = found.images.take(places)
    sizes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for content in read_contents(found.uri, looked_at):
        try:
            image = open_image(content or b"")
        except RejectedImageError as error:
            rejected["unreadable" if content is None else error.reason] += 1
            continue
        sizes[f"{image.width}x{image.height}"] += 1
        kinds["color" if image.mode in _COLOR_MODES else "wide gray" if image.mode in _WIDE_MODES else "gray"] += 1
    size, megabytes = config.image_size, count * config.image_size**2 * config.channels / 1e6
    of_looked_at = f" (of {len(places)} looked at)"
    return [
        f"source    {found.uri}: {found.source_format}, {format_count(count, 'image')} of "
        f"{format_count(len(found.class_names), 'class')}",
        f"classes   {_count_classes(found)}",
        f"splits    {_describe_splits(found.images, config)}",
        f"sizes     {_count_most(sizes)}{of_looked_at}, each becomes {size}x{size} ({config.resize})",
        f"channels  {_count_most(kinds)}{of_looked_at}, each becomes {'gray' if config.channels == 1 else 'color'}",
        *(f"sample    {path}: {name}" for path, name in _choose_samples(found)),
        f"left out  {_count_most(count_values(found.ignored['reason'])) or 'nothing, judging by names'}",
        f"          {_count_most(rejected) or 'nothing'}{of_looked_at}",
        f"dataset   about {megabytes:,.0f} MB of pixels",
    ]


def _count_classes(found: Source) -> str:
    counts = count_values(found.images["label"])
    return name_some([f"{name} {counts[label]}" for label, name in enumerate(found.class_names)])


def _describe_splits(images: pa.Table, config: PrepareConfig) -> str:
    counts = count_values(images["split"])
    given = [f"{split} {counts[split]}" for split in SPLITS if counts[split]]
    if not given:
        return f"none in the source: {config.val_fraction:g} of each class become val, {config.test_fraction:g} test"
    if counts["val"]:
        return f"those of the source: {', '.join(given)}"
    return f"those of the source: {', '.join(given)}; {config.val_fraction:g} of each class become val"


def _count_most(counts: Counter[str]) -> str:
    return name_some([f"{count} {name}" for name, count in counts.most_common()])


def _choose_samples(found: Source) -> list[tuple[str, str]]:
    """Return the paths of a few images of different classes, and their classes."""
    samples = []
    for label in sorted(found.images["label"].unique().to_pylist())[:_SAMPLES]:
        first = found.images.filter(pc.field("label") == label)["path"][0].as_py()
        samples.append((first, found.class_names[label]))
    return samples
