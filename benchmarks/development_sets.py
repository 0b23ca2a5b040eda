"""The image sets that defaults are judged on, prepared: gray, at sizes that two cores train on in minutes.

IMAGES holds clothing/ (train, validation, test), sign-digits/ (no split) and mstar/ (train, val). Fashion-MNIST is read
from the files that Debian's package dataset-fashion-mnist installs; the digits are the embedded ones. Each set is one
command, `jobs/prepare.py IMAGES/NAME DATASETS/NAME-SIZE --image-size SIZE`, with the default seed and fractions.
notes-250 has the size and the number of the notes: 600 of sign-digits, 66 of them for val. A set that is there stays.

Run: python -m benchmarks development_sets IMAGES DATASETS [--only mstar-64]
"""

import gzip
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.table import Table

from benchmarks.table import report
from data_prep.embedded import write_embedded_images
from data_prep.manifest import read_manifest
from trainer.training.dataset import load_manifest

SETS = {
    "digits-28": ("digits", 28),
    "digits-67": ("digits", 67),
    "mstar-64": ("mstar", 64),
    "mstar-68": ("mstar", 68),
    "sign-digits-64": ("sign-digits", 64),
    "sign-digits-96": ("sign-digits", 96),
    "clothing-64": ("clothing", 64),
    "clothing-96": ("clothing", 96),
    "fashion-5000-28": ("fashion-5000", 28),
    "fashion-28": ("fashion", 28),
    "notes-250": ("notes", 250),
}
NOTES_IMAGES, NOTES_VAL = 600, 66


def write_fashion(fashion: Path, folder: Path, count: int | None) -> None:
    """Write the first images of Fashion-MNIST's train as PNG files in class folders.

    Without a count, all are written, and the published test images as val.
    """
    parts = {"": "train"} if count else {"train": "train", "val": "t10k"}
    for split, name in parts.items():
        pixels = np.frombuffer(gzip.decompress((fashion / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
        labels = gzip.decompress((fashion / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        for index, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28)[:count], labels, strict=False)):
            path = folder / split / str(label) / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def link_notes(signs: Path, folder: Path) -> None:
    """Link as many of the hand signs as the notes had images, drawn by class with seed 0."""
    random = np.random.default_rng(0)
    for label in range(10):
        images = random.permutation(sorted((signs / str(label)).iterdir()))[: NOTES_IMAGES // 10]
        of_val = (label + 1) * NOTES_VAL // 10 - label * NOTES_VAL // 10
        for index, image in enumerate(images):
            path = folder / ("val" if index < of_val else "train") / str(label) / image.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(image.resolve())


def write_source(name: str, images: Path, fashion: Path, folder: Path) -> Path:
    """Return the folder with the images of a source, which is written to ``folder`` where IMAGES has none."""
    match name:
        case "digits":
            write_embedded_images(str(folder))
        case "fashion" | "fashion-5000":
            write_fashion(fashion, folder, 5000 if name == "fashion-5000" else None)
        case "notes":
            link_notes(images / "sign-digits", folder)
        case _:
            return images / name
    return folder


def main(
    images: Annotated[Path, typer.Argument(metavar="IMAGES")],
    datasets: Annotated[Path, typer.Argument(metavar="DATASETS")],
    only: Annotated[list[str], typer.Option(help="Default: all.")] = [],  # noqa: B006
    fashion: Annotated[Path, typer.Option()] = Path("/usr/share/datasets/fashion-mnist"),
) -> None:
    table = Table("set", "train", "val", "test", "size", "classes")
    for name in only or SETS:
        source, size = SETS[name]
        dataset = str(datasets / name)
        if read_manifest(dataset) is None:
            with tempfile.TemporaryDirectory() as folder:
                found = str(write_source(source, images, fashion, Path(folder)))
                command = [sys.executable, "jobs/prepare.py", found, dataset, "--image-size", str(size)]
                subprocess.run(command, check=True)
        manifest = load_manifest(dataset)
        rows = (str(manifest.splits[split].rows) for split in ("train", "val", "test"))
        table.add_row(name, *rows, str(manifest.image_size), str(manifest.num_classes))
    report(table)


if __name__ == "__main__":
    typer.run(main)
