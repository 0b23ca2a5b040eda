"""Images per second that reach a training step, shuffled again each epoch: this project against tf.data and Ray Data.

All feed the same uint8 images, made here, in batches to a consumer that does nothing; the first epoch is left out. Each
contestant is a process of its own; they take turns. Mark: this project reaches tf.data's cache() of uint8.

Run: python -m benchmarks feeding [--rows 8000] [--image-size 250] [--batch 64] [--rounds 3] [--json]
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.table import Mark, format_ratio, format_spread, ratio_of, report
from data_prep.manifest import Shard
from data_prep.shards import write_shard

EPOCHS = 3


def project(folder: str, labels: np.ndarray, batch: int) -> Callable[[int], Iterator[Any]]:
    """As `trainer.training.loop` does: rows of mapped shards, gathered in a thread ahead of their use."""
    from trainer.training.batches import make_batch, move_batch
    from trainer.training.dataset import BatchFeed, ImageSplit, epoch_order, worker_rows
    from trainer.training.shards import MappedShards

    written = json.loads(Path(folder, "shards.json").read_text())
    shards = [Shard.model_validate(one) for one in written["shards"]]
    split = ImageSplit(labels, *number_rows(shards), MappedShards(folder, shards, tuple(written["shape"])))

    def begin(epoch: int) -> Iterator[Any]:
        order, steps = epoch_order(split, 0, epoch), range(len(labels) // batch)
        feed = BatchFeed(move_batch)
        return feed.batches(lambda step: make_batch(split, worker_rows(order, step, batch, 0, 1)), steps)

    return begin


def number_rows(shards: list[Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard of each row of all of them, and its number there, both int32."""
    of_shard = np.repeat(np.arange(len(shards), dtype=np.int32), [one.rows for one in shards])
    return of_shard, np.concatenate([np.arange(one.rows, dtype=np.int32) for one in shards])


def write_one_shard(folder: str, number: int, images: np.ndarray) -> Shard:
    """Write images as a shard of a dataset."""
    path = f"shards/{number:05d}-00000000.arrow"
    with write_shard(f"{folder}/{path}", images.shape[1:]) as shard:
        for image in images:
            shard.add(image)
    return shard.describe(path)


def write_shards(folder: str, images: np.ndarray) -> None:
    """Write the same images as the shards of a dataset, of 128 MiB or a 64th."""
    rows = max(256, min(len(images) // 64, 128 * 2**20 // images[0].nbytes))
    starts = range(0, len(images), rows)
    shards = [write_one_shard(folder, start // rows, images[start : start + rows]) for start in starts]
    described = [shard.model_dump() for shard in shards]
    Path(folder, "shards.json").write_text(json.dumps({"shape": images.shape[1:], "shards": described}))


def tf_data_cache(images: np.ndarray, labels: np.ndarray, batch: int) -> Callable[[int], Iterator[Any]]:
    import tensorflow as tf

    signature = (tf.TensorSpec(images.shape[1:], tf.uint8), tf.TensorSpec((), tf.int32))
    dataset = tf.data.Dataset.from_generator(lambda: zip(images, labels, strict=True), output_signature=signature)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(images))).cache()
    dataset = dataset.shuffle(len(images)).batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return lambda epoch: iter(dataset)


def ray_data(images: np.ndarray, labels: np.ndarray, batch: int, form: str) -> Callable[[int], Iterator[Any]]:
    import ray.data

    step = 500
    blocks = [
        {"image": np.ascontiguousarray(images[start : start + step]), "label": labels[start : start + step]}
        for start in range(0, len(images), step)
    ]
    dataset = ray.data.from_blocks([ray.data.block.BlockAccessor.batch_to_block(one) for one in blocks]).materialize()
    options = {"batch_size": batch, "drop_last": True, "local_shuffle_buffer_size": 2000}
    if form == "to_tf":
        tensors = dataset.to_tf("image", "label", **options)
        return lambda epoch: iter(tensors)
    return lambda epoch: iter(dataset.iter_batches(batch_format="numpy", **options))


CONTESTANTS = ("tf.data cache()", "this project", "Ray Data iter_batches, shuffled", "Ray Data to_tf, shuffled")


def measure(name: str, folder: str, batch: int) -> list[float]:
    """Return images per second of each epoch after the first."""
    images, labels = (np.load(Path(folder, f"{part}.npy"), mmap_mode="r") for part in ("images", "labels"))
    if name == CONTESTANTS[0]:
        begin = tf_data_cache(images, labels, batch)
    elif name == CONTESTANTS[1]:
        begin = project(folder, labels, batch)
    else:
        begin = ray_data(images, labels, batch, name.split()[2].rstrip(","))
    rates = []
    for epoch in range(EPOCHS):
        started = time.perf_counter()
        count = sum(1 for _ in begin(epoch))
        rates.append(count * batch / (time.perf_counter() - started))
    return rates[1:]


def measure_here(name: str, folder: str, batch: str) -> None:
    import contextlib

    from trainer.runtime.cluster import connect

    with connect() if name.startswith("Ray") else contextlib.nullcontext():
        print(json.dumps(measure(name, folder, int(batch))))


def main(
    rows: Annotated[int, typer.Option(min=64)] = 8000,
    image_size: Annotated[int, typer.Option(min=8)] = 250,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        shape = (rows, image_size, image_size, 1)
        images = np.lib.format.open_memmap(Path(folder, "images.npy"), mode="w+", dtype=np.uint8, shape=shape)
        for row in range(rows):
            images[row] = random.integers(0, 256, shape[1:], np.uint8)
        write_shards(folder, images)
        np.save(Path(folder, "labels.npy"), random.integers(0, 10, rows).astype(np.int32))
        for _ in range(rounds):
            for name in CONTESTANTS:
                command = [sys.executable, "-m", "benchmarks.feeding", "--one", name, folder, str(batch)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rates[name] += json.loads(output.splitlines()[-1])
    table = Table(f"{rows} images of {image_size}x{image_size}", "images/s", "ratio")
    for name, values in rates.items():
        table.add_row(name, format_spread(values), format_ratio(values, rates[CONTESTANTS[0]]))
    project = ratio_of(rates[CONTESTANTS[1]], rates[CONTESTANTS[0]])
    report(table, rates, [Mark(f"{CONTESTANTS[1]}, to {CONTESTANTS[0]}", project, 1.0)], as_json=as_json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure_here(*sys.argv[2:])
    else:
        typer.run(main)
