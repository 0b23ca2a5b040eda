"""The batch finder against exhaustive search: the largest batch that fits, and the processes that it took to find it.

Exhaustive search starts fresh processes for one size after the other, from 20% below the finder's answer in steps of 2%
(at least one image), until two in a row do not fit. Both have the same memory limit and the same safety margin.
Mark: the same answer within 5%, and at most 8 groups of processes.

Run: python -m benchmarks batch_size DATASET --memory-limit 4 [--arch cnn_tapered] [--precision float32]
"""

import functools
import math
import sys
import tempfile
import time
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.table import report
from trainer import launch
from trainer.batch.finder import choose_batch, measure_size
from trainer.config.request import parse_request
from trainer.runtime.cluster import connect

ARCHITECTURES = ["cnn_tapered", "alexnet", "inception_notes"]


def main(
    dataset: Annotated[str, typer.Argument(help="Prepared at 250 pixels.")],
    memory_limit: Annotated[float, typer.Option(help="Of the worker, in GiB.")],
    arch: Annotated[list[str], typer.Option()] = ARCHITECTURES,
    precision: Annotated[str, typer.Option()] = "float32",
) -> None:
    table = Table("architecture", "limit GiB", "found", "trials", "seconds", "exhaustive", "trials", "seconds", "ratio")
    with connect() as resources:
        for name in arch:
            options = {"arch": name, "dataset": dataset, "memory_limit_gib": memory_limit, "precision": precision}
            request = parse_request({**options, "global_batch_size": "max", "min_steps_per_epoch": 1})
            manifest = launch.load_checked_manifest(request, resources)
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as storage:
                choice = choose_batch(request, manifest, 1, storage, resources, on_event=functools.partial(say, name))
            seconds = time.perf_counter() - started
            found = choice.table.fitting[-1].size
            started, sizes, largest, misses = time.perf_counter(), 0, 0, 0
            size = max(1, math.floor(0.8 * found))
            while misses < 2:
                row = measure_size(request, manifest, 1, size, precision, resources)
                fits = row is not None and row.peak_memory_gib <= choice.table.target_gib
                say(name, f"{size}: {row} {'fits' if fits else 'does not fit'}")
                largest, misses, sizes = (size, 0, sizes + 1) if fits else (largest, misses + 1, sizes + 1)
                size += max(1, round(0.02 * found))
            exhaustive_seconds = time.perf_counter() - started
            table.add_row(
                *(name, f"{memory_limit:g}", str(found), str(choice.table.trials), f"{seconds:.0f}"),
                *(str(largest), str(sizes), f"{exhaustive_seconds:.0f}", f"{found / largest:.3f}"),
            )
    report(table)


def say(name: str, what: object) -> None:
    print(f"{name}: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
