"""Preparing and training 1, 3 and 10 times the images: seconds, and the memory of the driver.

Images are made here, each another one. Mark: ten times the images take at most 10.5 times the seconds, and the driver's
memory stays flat.

Run: python -m benchmarks scale [--images 1000] [--image-size 64] [--epochs 4] [--json]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.table import Table

from benchmarks.table import Mark, report
from trainer.record.run_folder import RunFolder

FACTORS = (1, 3, 10)
_SIDE = 96


def write_images(folder: Path, count: int) -> None:
    """Write photos of noise in two classes, of which no two are near duplicates."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12), np.uint8))
        path = folder / "ab"[index % 2] / f"{index:06d}.jpg"
        coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path, quality=90)


def run(*command: str) -> tuple[float, float]:
    """Return seconds and the most memory of the job's own process, in GiB."""
    started, peak = time.monotonic(), 0
    # Not at the top: the other benchmarks do without the extra "bench".
    import psutil

    job = psutil.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while job.poll() is None:
        try:
            peak = max(peak, job.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if job.wait():
        raise RuntimeError(job.stderr.read().decode())
    return time.monotonic() - started, peak / 2**30


def main(
    images: Annotated[int, typer.Option(min=100)] = 1000,
    image_size: Annotated[int, typer.Option(min=32)] = 64,
    epochs: Annotated[int, typer.Option(min=2)] = 4,
    arch: Annotated[str, typer.Option()] = "cnn_tapered",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for factor in FACTORS:
            source, dataset = folder / f"source-{factor}", str(folder / f"dataset-{factor}")
            write_images(source, images * factor)
            prepare_seconds, prepare_gib = run("jobs/prepare.py", str(source), dataset, "--image-size", str(image_size))
            options = ["--arch", arch, "--dataset", dataset, "--storage", str(folder), "--run-name", f"run-{factor}"]
            options += ["--global-batch-size", "35", "--precision", "float32", "--epochs", str(epochs)]
            _, train_gib = run("jobs/train.py", *options)
            history = RunFolder(str(folder / f"run-{factor}")).read_metrics()
            epoch_seconds = min(row["epoch_seconds"] for row in history[1:])
            records.append(
                {"images": images * factor, "prepare_seconds": prepare_seconds, "prepare_gib": prepare_gib}
                | {"epoch_seconds": epoch_seconds, "train_gib": train_gib}
            )
    table = Table("images", "prepare, s", "ratio", "driver, GiB", "an epoch, s", "ratio", "driver, GiB")
    for one in records:
        table.add_row(
            f"{one['images']:,}",
            f"{one['prepare_seconds']:.1f}",
            f"{one['prepare_seconds'] / records[0]['prepare_seconds']:.1f}",
            f"{one['prepare_gib']:.2f}",
            f"{one['epoch_seconds']:.2f}",
            f"{one['epoch_seconds'] / records[0]['epoch_seconds']:.1f}",
            f"{one['train_gib']:.2f}",
        )
    # Flat, but for what one process differs from the next.
    limits = {"prepare_seconds": 10.5, "epoch_seconds": 10.5, "prepare_gib": 1.1, "train_gib": 1.1}
    marks = [
        Mark(f"{name}, 10 times the images", records[-1][name] / records[0][name], limit, at_least=False)
        for name, limit in limits.items()
    ]
    report(table, records, marks, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
