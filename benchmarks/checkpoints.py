"""What checkpoints cost a run: one per epoch to an object store that answers after 50 ms, against none.

Both train the same images in this machine's one worker, taking turns; the run without checkpoints is the same code with
its saving taken out, here. The store is a real HTTP server (moto) behind a proxy that delays what it is sent. Mark: at
most 1.03 times the seconds of an epoch.

Run: python -m benchmarks checkpoints DATASET [--arch cnn_tapered] [--epochs 6] [--rounds 3] [--json]
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import fsspec
import typer
from rich.table import Table

from benchmarks.table import Mark, format_ratio, format_spread, ratio_of, report

LATENCY_SECONDS = 0.05
WITHOUT, LOCAL, STORE = "no checkpoints", "to the disk", "to an object store, 50 ms"


async def delay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Passes bytes on, each ``seconds`` after it came, however many are on their way."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

    async def send() -> None:
        while True:
            due, content = await queue.get()
            await asyncio.sleep(due - loop.time())
            if not content:
                writer.close()
                return
            writer.write(content)
            await writer.drain()

    sender = asyncio.create_task(send())
    while content := await reader.read(2**16):
        queue.put_nowait((loop.time() + seconds, content))
    queue.put_nowait((loop.time() + seconds, b""))
    await sender


@contextmanager
def slow_store() -> Iterator[str]:
    """Yield the address of a store with an empty bucket ``runs`` that answers late."""
    with tempfile.TemporaryFile() as log:
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        while b"Running on http" not in (output := os.pread(log.fileno(), 4096, 0)):
            time.sleep(0.1)
        port = int(output.partition(b"127.0.0.1:")[2].split()[0])
    addresses: list[str] = []
    started = threading.Event()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(delay(reader, upstream_writer, LATENCY_SECONDS), delay(upstream_reader, writer, 0.0))

    async def serve() -> None:
        proxy = await asyncio.start_server(connect, "127.0.0.1", 0)
        addresses.append("http://127.0.0.1:{1}".format(*proxy.sockets[0].getsockname()))
        started.set()
        await proxy.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    started.wait()
    try:
        os.environ |= {"AWS_ENDPOINT_URL": addresses[0], "AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two"}
        fsspec.filesystem("s3").mkdir("runs")
        yield addresses[0]
    finally:
        server.terminate()
        server.wait()


def train(name: str, options: dict[str, Any], storage: str) -> list[dict[str, float]]:
    """Return the metrics of each epoch but the first."""
    from trainer import launch
    from trainer.config.request import parse_request
    from trainer.runtime.cluster import connect
    from trainer.runtime.events import OnEvent, ignore_event
    from trainer.training.job import WorkerJob
    from trainer.workers.local_worker import run_process

    with (
        connect(one_process=True) as resources,
        launch.open_run(storage, f"run-{time.time_ns()}", options["arch"], resources) as run,
    ):
        plan = launch.plan_run(parse_request(options), run, resources)
        job = WorkerJob(plan.config, plan.manifest, run.uri, run.lease, (), 0, None, ignore_event)
        rows: list[dict[str, float]] = []

        def work(send_event: OnEvent) -> Any:
            from trainer.training import loop

            if name == WITHOUT:
                save = loop._Training._save
                last = plan.config.epochs
                loop._Training._save = lambda self, *rest: save(self, *rest) if len(self._history) == last else None
            return loop.train_worker(replace(job, send_event=send_event))

        def keep(event: Any) -> None:
            if hasattr(event, "row"):
                rows.append(event.row)

        run_process(work, resources.folder, keep)
    return rows[1:]


def main(
    dataset: Annotated[str, typer.Argument(help="Prepared.")],
    arch: Annotated[str, typer.Option()] = "cnn_tapered",
    batch: Annotated[int, typer.Option()] = 32,
    epochs: Annotated[int, typer.Option(min=3)] = 6,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    seconds: dict[str, list[float]] = {WITHOUT: [], LOCAL: [], STORE: []}
    saving: dict[str, list[float]] = {name: [] for name in seconds}
    options = {"arch": arch, "arch_arguments": {}, "dataset": str(Path(dataset).resolve()), "recipe": "modern"}
    options |= {"num_workers": "1", "global_batch_size": str(batch), "precision": "float32", "epochs": epochs}
    with slow_store(), tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in seconds:
                rows = train(name, options, "s3://runs" if name == STORE else folder)
                seconds[name].append(statistics.median(row["epoch_seconds"] for row in rows))
                saving[name].append(statistics.median(row["checkpoint_seconds"] for row in rows))
    table = Table(f"{arch}, batch {batch}", "s an epoch", "ratio", "of it in the loop, s")
    for name, values in seconds.items():
        table.add_row(
            name, format_spread(values, 2), format_ratio(values, seconds[WITHOUT]), format_spread(saving[name], 3)
        )
    mark = Mark(
        "an epoch with checkpoints to the store", ratio_of(seconds[STORE], seconds[WITHOUT]), 1.03, at_least=False
    )
    report(table, {"epoch_seconds": seconds, "in_loop_seconds": saving}, [mark], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
