"""Images per second of `prepare` against bare decoders on all cores and against Ray Data's read_images.

Photos are resized to the two JPEG sizes and to PNG, and repeated to the number of images. All contestants take turns in
one run. The quality check compares 250x250 gray results with Pillow's LANCZOS of the whole image. Marks: `prepare`
reaches 0.80 of the fastest decoder that passes it, 0.55 for the small JPEG, and twice the rate of read_images. Before
all that, the command is timed from the shell to the prompt, Ray's start included.

Run: python -m benchmarks prepare PHOTOS [--kind jpeg-500x375] [--images 2000] [--rounds 3]
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import cv2
import numpy as np
import ray
import typer
from PIL import Image
from rich.table import Table

from benchmarks.table import Mark, format_ratio, format_spread, ratio_of, report
from data_prep.decode import ImageOptions, decode_image
from data_prep.prepare import PrepareConfig, prepare
from trainer.runtime.cluster import connect

SIZE = 250


class Kind(NamedTuple):
    """One kind of image file."""

    width: int
    height: int
    suffix: str
    mark: float
    """Rate of `prepare` to that of the fastest decoder that passes the quality check."""


KindName = Literal["jpeg-500x375", "jpeg-1000x750", "png-500x375"]
KINDS: dict[KindName, Kind] = {
    "jpeg-500x375": Kind(500, 375, "jpeg", 0.55),
    "jpeg-1000x750": Kind(1000, 750, "jpeg", 0.80),
    "png-500x375": Kind(500, 375, "png", 0.80),
}
MARK_TO_READ_IMAGES = 2.0
READ_IMAGES, PREPARE, COMMAND = "Ray Data read_images", "prepare", "prepare.py, from the shell"
# Mean and 99th percentile of the absolute difference from the reference, over all pixels of all photos.
MOST_MEAN_DIFFERENCE, MOST_P99_DIFFERENCE = 1.5, 12.0


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def pillow_draft(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    image.draft("L", (SIZE, SIZE))
    return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def opencv(content: bytes, flags: int, interpolation: int) -> np.ndarray:
    return cv2.resize(cv2.imdecode(np.frombuffer(content, np.uint8), flags), (SIZE, SIZE), interpolation=interpolation)


def opencv_area(content: bytes) -> np.ndarray:
    return opencv(content, cv2.IMREAD_GRAYSCALE, cv2.INTER_AREA)


def opencv_linear(content: bytes) -> np.ndarray:
    return opencv(content, cv2.IMREAD_GRAYSCALE, cv2.INTER_LINEAR)


def opencv_reduced_area(content: bytes) -> np.ndarray:
    return opencv(content, cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.INTER_AREA)


def simplejpeg_area(content: bytes) -> np.ndarray:
    # Not at the top: the other benchmarks do without the extra "bench".
    import simplejpeg

    gray = simplejpeg.decode_jpeg(content, "GRAY", min_height=SIZE, min_width=SIZE)
    return cv2.resize(gray, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def ours(content: bytes) -> np.ndarray:
    return decode_image(content, ImageOptions(image_size=SIZE))[..., 0]


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow, LANCZOS": pillow,
    "Pillow draft, LANCZOS": pillow_draft,
    "OpenCV, AREA": opencv_area,
    "OpenCV, LINEAR": opencv_linear,
    "OpenCV reduced by 2, AREA": opencv_reduced_area,
    "simplejpeg scaled, AREA": simplejpeg_area,
    "data_prep.decode": ours,
}


HELD: list[bytes] = []


def encode_photos(photos: Path, kind: Kind, most: int = 200) -> list[bytes]:
    encoded = []
    for path in sorted(photos.rglob("*.[jJ][pP]*[gG]"))[:most]:
        sink = io.BytesIO()
        resized = Image.open(path).convert("RGB").resize((kind.width, kind.height))
        resized.save(sink, kind.suffix.upper(), quality=90)
        encoded.append(sink.getvalue())
    return encoded


def write_source(folder: Path, contents: list[bytes], images: int, suffix: str) -> None:
    for index in range(images):
        path = folder / f"class{index % 2}" / f"{index:05d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents[index % len(contents)])


def measure_quality(decode: Callable[[bytes], np.ndarray], contents: list[bytes]) -> tuple[float, float]:
    differences = np.stack([np.abs(decode(one).astype(int) - pillow(one).astype(int)) for one in contents[:50]])
    return float(differences.mean()), float(np.percentile(differences, 99))


def hold(contents: list[bytes]) -> None:
    """Keep what a decoding process is to decode."""
    cv2.setNumThreads(1)
    HELD.extend(contents)


def decode_share(name: str, images: int) -> None:
    for index in range(images):
        DECODERS[name](HELD[index % len(HELD)])


def time_decoder(processes: ProcessPoolExecutor, name: str, images: int, cores: int) -> float:
    """Return images per second over all cores, with one process per core."""
    started = time.perf_counter()
    list(processes.map(decode_share, [name] * cores, [images // cores] * cores))
    return images / (time.perf_counter() - started)


def time_read_images(source: Path, images: int) -> float:
    started = time.perf_counter()
    dataset = ray.data.read_images(str(source), size=(SIZE, SIZE), mode="L")
    rows = sum(len(batch["image"]) for batch in dataset.iter_batches())
    return (rows if rows == images else float("nan")) / (time.perf_counter() - started)


def time_prepare(source: Path, images: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare(str(source), f"{folder}/dataset", PrepareConfig(image_size=SIZE))
        return images / (time.perf_counter() - started)


def time_command(source: Path, images: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "jobs/prepare.py", str(source), f"{folder}/dataset", "--image-size", str(SIZE)]
        subprocess.run(command, check=True, capture_output=True)
        return images / (time.perf_counter() - started)


def measure_rates(
    contents: list[bytes], suffix: str, decoders: list[str], images: int, rounds: int, cores: int
) -> dict[str, list[float]]:
    """Return images per second of each contestant in each round."""
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_source(source, contents, images, suffix)
        # Without the processes of another cluster beside it.
        rates[COMMAND] = [time_command(source, images) for _ in range(rounds)]
        with ProcessPoolExecutor(cores, get_context("spawn"), hold, (contents,)) as processes, connect():
            # Starts all processes.
            time_decoder(processes, decoders[0], len(contents), cores)
            time_prepare(source, images)
            for _ in range(rounds):
                for name in decoders:
                    rates.setdefault(name, []).append(time_decoder(processes, name, images, cores))
                rates.setdefault(READ_IMAGES, []).append(time_read_images(source, images))
                rates.setdefault(PREPARE, []).append(time_prepare(source, images))
    return rates


def measure_kind(name: KindName, photos: Path, images: int, rounds: int, *, as_json: bool) -> None:
    """Print the table of one kind of image."""
    kind, cores = KINDS[name], len(os.sched_getaffinity(0))
    contents = encode_photos(photos, kind)
    decoders = [one for one in DECODERS if kind.suffix == "jpeg" or "simplejpeg" not in one]
    rates = measure_rates(contents, kind.suffix, decoders, images, rounds, cores)
    quality = {one: measure_quality(DECODERS[one], contents) for one in decoders}
    passing = [
        one for one, (mean, p99) in quality.items() if mean <= MOST_MEAN_DIFFERENCE and p99 <= MOST_P99_DIFFERENCE
    ]
    fastest = max(passing, key=lambda one: statistics.median(rates[one]))
    table = Table(title=f"{name} to {SIZE}x{SIZE} gray, {cores} cores, {images} images, median of {rounds}")
    for column in ("", "images/s (min-max)", "mean difference", "99% below", "ratio to the fastest that passes"):
        table.add_column(column)
    for one in (*decoders, READ_IMAGES, PREPARE, COMMAND):
        mean, p99 = (f"{value:.2f}" for value in quality[one]) if one in quality else ("", "")
        table.add_row(one, format_spread(rates[one]), mean, p99, format_ratio(rates[one], rates[fastest]))
    marks = [
        Mark(f"{name}: {PREPARE}, to {other}", ratio_of(rates[PREPARE], rates[other]), limit)
        for other, limit in ((fastest, kind.mark), (READ_IMAGES, MARK_TO_READ_IMAGES))
    ]
    report(table, {"kind": name, "rates": rates}, marks, as_json=as_json)


def main(
    photos: Path,
    kind: Annotated[KindName | None, typer.Option(help="Kind of image file. Default: all, one after another.")] = None,
    images: Annotated[int, typer.Option(help="Images a measurement.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Measurements of each contestant.")] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print one table for each kind of image."""
    # Fails before anything is measured where the extra "bench" is missing.
    import simplejpeg  # noqa: F401

    for name in [kind] if kind else KINDS:
        measure_kind(name, photos, images, rounds, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
