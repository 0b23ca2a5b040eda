"""Images per second of `prepare` against bare decoders on all cores and against Ray Data's read_images.

Photos are resized to the two JPEG sizes and to PNG, and repeated to the number of images. All contestants take turns in
one run. The quality check compares 250x250 gray results with Pillow's LANCZOS of the whole image; mark: `prepare`
reaches 0.80 of the fastest decoder that passes it.

Run: python -m benchmarks prepare PHOTOS [--images 2000] [--rounds 3]
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

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


def encode_photos(photos: Path, width: int, height: int, suffix: str, most: int = 200) -> list[bytes]:
    encoded = []
    for path in sorted(photos.rglob("*.[jJ][pP]*[gG]"))[:most]:
        sink = io.BytesIO()
        Image.open(path).convert("RGB").resize((width, height)).save(sink, suffix.upper(), quality=90)
        encoded.append(sink.getvalue())
    return encoded


def measure_quality(decode: Callable[[bytes], np.ndarray], contents: list[bytes]) -> tuple[float, float]:
    differences = np.stack([np.abs(decode(one).astype(int) - pillow(one).astype(int)) for one in contents[:50]])
    return float(differences.mean()), float(np.percentile(differences, 99))


def decode_share(name: str, contents: list[bytes], images: int) -> None:
    cv2.setNumThreads(1)
    for index in range(images):
        DECODERS[name](contents[index % len(contents)])


def time_decoder(name: str, contents: list[bytes], images: int, cores: int) -> float:
    """Return images per second over all cores, with one process per core, without the start of the processes."""
    with get_context("spawn").Pool(cores) as pool:
        pool.starmap(decode_share, [(name, contents, 1)] * cores)
        started = time.perf_counter()
        pool.starmap(decode_share, [(name, contents, images // cores)] * cores, chunksize=1)
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


def main(
    photos: Path,
    images: Annotated[int, typer.Option(help="Images a measurement.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Measurements of each contestant.")] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print one table for each kind of image."""
    cores = len(os.sched_getaffinity(0))
    for label, width, height, suffix in (
        ("JPEG 500x375", 500, 375, "jpeg"),
        ("JPEG 1000x750", 1000, 750, "jpeg"),
        ("PNG 500x375", 500, 375, "png"),
    ):
        contents = encode_photos(photos, width, height, suffix)
        decoders = [name for name in DECODERS if suffix == "jpeg" or "simplejpeg" not in name]
        with tempfile.TemporaryDirectory() as folder, connect():
            source = Path(folder)
            for index in range(images):
                path = source / f"class{index % 2}" / f"{index:05d}.{suffix}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(contents[index % len(contents)])
            rates: dict[str, list[float]] = {}
            time_prepare(source, images)  # starts Ray's worker processes
            for _ in range(rounds):
                for name in decoders:
                    rates.setdefault(name, []).append(time_decoder(name, contents, images, cores))
                rates.setdefault("Ray Data read_images", []).append(time_read_images(source, images))
                rates.setdefault("prepare", []).append(time_prepare(source, images))
        quality = {name: measure_quality(DECODERS[name], contents) for name in decoders}
        passing = [
            name for name, (mean, p99) in quality.items() if mean <= MOST_MEAN_DIFFERENCE and p99 <= MOST_P99_DIFFERENCE
        ]
        fastest = max(passing, key=lambda name: statistics.median(rates[name]))
        table = Table(title=f"{label} to {SIZE}x{SIZE} gray, {cores} cores, {images} images, median of {rounds}")
        for column in ("", "images/s (min-max)", "mean difference", "99% below", "ratio to the fastest that passes"):
            table.add_column(column)
        for name, values in rates.items():
            mean, p99 = (f"{value:.2f}" for value in quality[name]) if name in quality else ("", "")
            ratio = format_ratio(values, rates[fastest])
            table.add_row(name, format_spread(values), mean, p99, ratio)
        mark = Mark(f"prepare, to {fastest}", ratio_of(rates["prepare"], rates[fastest]), 0.80)
        report(table, rates, [mark], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
