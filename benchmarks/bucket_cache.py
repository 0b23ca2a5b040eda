"""Training from a bucket with a cache that is smaller than the dataset: how long a step waits for its images.

A server on this machine answers ranged reads as an object store does, after a latency and at a bandwidth that all
reads share. A consumer takes the batches of a few epochs at the rate of a training, in windows of half the cache, from
an empty cache. Waits are a share of the time: of the first window, and of all that follows.

Marks: at most 2% of the time after the first window; the cache ends within its limit.

Run: python -m benchmarks bucket_cache [--gib 4] [--cache-gib 1] [--megabytes 100] [--latency 0.05] [--rate 400]
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from benchmarks.feeding import number_rows, write_one_shard
from benchmarks.table import Mark, report
from data_prep.manifest import Shard
from trainer.training.batches import make_batch, move_batch
from trainer.training.dataset import BatchFeed, ImageSplit, epoch_order, worker_rows
from trainer.training.shard_cache import ShardCache
from trainer.training.shards import CachedShards

_SEND_BYTES = 256 * 2**10
_SHARD_BYTES = 64 * 10**6


class Store(ThreadingHTTPServer):
    """Ranged reads of the files of a folder, as s3://bucket/NAME, at a latency and a bandwidth."""

    daemon_threads = True

    def __init__(self, folder: str, latency: float, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), _Read)
        self.folder, self.latency, self.sent = Path(folder), latency, 0
        self._bytes_per_second, self._free_at, self._lock = bytes_per_second, 0.0, threading.Lock()

    def wait_for_room(self, count: int) -> None:
        """Wait until the store may send some bytes more."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._bytes_per_second
            self.sent += count
            wait = self._free_at - now
        time.sleep(wait)


class _Read(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        content = (self.server.folder / self.path.split("?")[0].removeprefix("/bucket/")).open("rb")
        size = os.fstat(content.fileno()).st_size
        first, last = (int(one or size) for one in self.headers["Range"].removeprefix("bytes=").split("-"))
        last = min(last, size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        content.seek(first)
        for start in range(first, last + 1, _SEND_BYTES):
            count = min(_SEND_BYTES, last + 1 - start)
            self.server.wait_for_room(count)
            self.wfile.write(content.read(count))

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(store: Store) -> Iterator[None]:
    """Serve, as the store that the AWS variables name."""
    threading.Thread(target=store.serve_forever, daemon=True).start()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.server_address[1]}"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    yield
    store.shutdown()


def write_dataset(folder: str, total: int, image_size: int) -> list[Shard]:
    """Write shards of random gray images of that many bytes altogether."""
    random = np.random.default_rng(0)
    shape = (_SHARD_BYTES // image_size**2, image_size, image_size, 1)
    numbers = range(max(2, round(total / _SHARD_BYTES)))
    return [write_one_shard(folder, number, random.integers(0, 256, shape, np.uint8)) for number in numbers]


def main(
    gib: Annotated[float, typer.Option(min=0.1, help="Size of the dataset.")] = 4.0,
    cache_gib: Annotated[float, typer.Option(min=0.05, help="Limit of the cache.")] = 1.0,
    megabytes: Annotated[float, typer.Option(min=1, help="Bandwidth of the store, per second.")] = 100.0,
    latency: Annotated[float, typer.Option(min=0, help="Seconds before each answer of the store.")] = 0.05,
    rate: Annotated[float, typer.Option(min=1, help="Images per second of the training.")] = 400.0,
    image_size: Annotated[int, typer.Option(min=8)] = 250,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        shards = write_dataset(folder, int(gib * 2**30), image_size)
        store = Store(folder, latency, megabytes * 10**6)
        with serving(store):
            waits = consume(shards, cache_gib, rate, batch, image_size, epochs)
            held = sum(path.stat().st_size for path in Path(cache).rglob("*.arrow"))
    total = sum(shard.bytes for shard in shards)
    first = max(1, round(len(waits) / epochs * cache_gib * 2**30 / 2 / total))
    seconds = batch / rate
    share = {
        name: sum(part) / (sum(part) + seconds * len(part))
        for name, part in (("first", waits[:first]), ("rest", waits[first:]))
    }
    title = f"{total / 2**30:.1f} GiB, a cache of {cache_gib:g} GiB, {megabytes:g} MB/s after {latency * 1000:g} ms"
    table = Table(title, "", show_header=False)
    table.add_row("seconds to the first batch", f"{waits[0]:.2f}")
    table.add_row("waits, first window", f"{share['first']:.1%}")
    table.add_row("waits, after it", f"{share['rest']:.1%}")
    table.add_row("downloaded, times the dataset", f"{store.sent / total:.2f} in {epochs} epochs")
    table.add_row("cache at the end", f"{held / 2**30:.2f} GiB")
    marks = [
        Mark("waits after the first window", share["rest"], 0.02, at_least=False),
        Mark("cache, to its limit", held / (cache_gib * 2**30), 1.0, at_least=False),
    ]
    report(table, {"waits": waits, "sent": store.sent, "held": held}, marks, as_json=as_json)


def consume(
    shards: list[Shard], cache_gib: float, rate: float, batch: int, image_size: int, epochs: int
) -> list[float]:
    """Return the seconds that each step waited."""
    of_shard, rows = number_rows(shards)
    pixels = CachedShards("s3://bucket", shards, (image_size, image_size, 1), ShardCache(cache_gib))
    pixels.check_window(int(cache_gib / 2 * 2**30))
    split = ImageSplit(np.zeros_like(rows), of_shard, rows, pixels)
    waits = []
    for epoch in range(epochs):
        order, following = (epoch_order(split, 0, one, cache_gib / 2) for one in (epoch, epoch + 1))
        feed, used = BatchFeed(move_batch), len(rows) // batch * batch
        split.expect(order[:used], following[: used if epoch + 1 < epochs else 0])
        batches = feed.batches(
            lambda step, order=order: make_batch(split, worker_rows(order, step, batch, 0, 1)),
            range(len(order) // batch),
        )
        before = 0.0
        for _ in batches:
            waits.append(feed.wait_seconds - before)
            before = feed.wait_seconds
            time.sleep(batch / rate)
    return waits


if __name__ == "__main__":
    typer.run(main)
