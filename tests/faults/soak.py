"""Kill workers of a run at random for half an hour; it has to end like an undisturbed run, bit for bit.

Run: python -m tests.faults.soak [--minutes 30] [--epochs 700]
"""

import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import last_state, write_stripes
from trainer import launch
from trainer.config.request import parse_request
from trainer.record.run_folder import RunFolder
from trainer.runtime.cluster import Resources, connect

OPTIONS = {
    "arch": "alexnet",
    "arch_arguments": {"width": 0.08, "dense_units": 32, "dropout": 0.3},
    "recipe": "modern",
    "num_workers": "2",
    "global_batch_size": "20",
    "precision": "float32",
    "ema_momentum": 0.5,
    "checkpoint_every": 3,
}


def main(
    minutes: Annotated[float, typer.Option(help="How long workers are killed.")] = 30.0,
    epochs: Annotated[int, typer.Option(help="Of both runs: as many as take longer than that.")] = 700,
    seconds: Annotated[float, typer.Option(help="Between two kills, on average.")] = 30.0,
) -> None:
    with tempfile.TemporaryDirectory() as folder, connect() as resources:
        source = write_stripes(Path(folder, "source"), images_per_class=40)
        prepare(str(source), f"{folder}/dataset", PrepareConfig(image_size=67))
        options = {**OPTIONS, "dataset": f"{folder}/dataset", "epochs": epochs}
        started = time.monotonic()
        whole = train(options, folder, "whole", resources)
        print(f"undisturbed: {time.monotonic() - started:.0f} s, {whole.read_result().val}", flush=True)
        killed = threading.Event()
        run = RunFolder(f"{folder}/killed")
        counts: list[int] = []
        killer = threading.Thread(target=kill_workers, args=(run, minutes * 60, seconds, killed, counts), daemon=True)
        killer.start()
        started = time.monotonic()
        train(options, folder, "killed", resources)
        killed.set()
        killer.join()
        took = time.monotonic() - started
        same = [last_state(one) for one in (run, whole)]
        print(f"killed {len(counts)} workers in {took / 60:.1f} minutes: {run.read_result().val}")
        print(f"attempts: {run.read_result().attempts}; the same bit for bit: {same[0] == same[1]}")
        if same[0] != same[1]:
            raise typer.Exit(1)


def train(options: dict, folder: str, name: str, resources: Resources) -> RunFolder:
    with launch.open_run(folder, name, options["arch"], resources) as run:
        launch.launch(launch.plan_run(parse_request(options), run, resources), run, resources, max_failures=10_000)
    return run


def kill_workers(run: RunFolder, duration: float, mean: float, ended: threading.Event, counts: list[int]) -> None:
    """Kill the first worker of the latest attempt at random moments, also while it starts and while it writes."""
    draw = random.Random(0)
    deadline = time.monotonic() + duration
    while time.monotonic() < deadline and not ended.wait(draw.expovariate(1 / mean)):
        attempts = sorted(Path(run.path("attempts")).glob("*.json"))
        if not attempts:
            continue
        try:
            worker = psutil.Process(json.loads(attempts[-1].read_text())["pid"])
            # Another process may have got the number of one that has ended.
            if worker.create_time() > attempts[-1].stat().st_mtime:
                continue
            worker.kill()
        except (psutil.NoSuchProcess, ValueError):
            continue
        counts.append(len(attempts))


if __name__ == "__main__":
    typer.run(main)
