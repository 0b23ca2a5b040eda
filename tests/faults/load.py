"""Fifty short runs one after another on one cluster, then four at once: nothing may grow from run to run.

Run: python -m tests.faults.load [--runs 50]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import ray
import typer

from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import REPOSITORY, write_stripes
from trainer import launch
from trainer.config.request import parse_request
from trainer.runtime.cluster import connect

OPTIONS = {
    "arch": "cnn_softmax",
    "arch_arguments": {"first_filters": 8, "later_filters": [8], "dense_units": 32},
    "recipe": "modern",
    # On the cluster: one worker would be a process beside it.
    "num_workers": "2",
    "global_batch_size": "20",
    "precision": "float32",
    "epochs": 2,
}


def main(runs: Annotated[int, typer.Option()] = 50) -> None:
    print(
        "runs  driver MiB  cluster MiB  processes  open files  objects MiB  temporary files  logs  seconds", flush=True
    )
    with tempfile.TemporaryDirectory() as folder, connect() as resources:
        source = write_stripes(Path(folder, "source"), images_per_class=40)
        prepare(str(source), f"{folder}/dataset", PrepareConfig(image_size=32))
        options = {**OPTIONS, "dataset": f"{folder}/dataset"}
        for number in range(1, runs + 1):
            started = time.monotonic()
            with launch.open_run(f"{folder}/runs", f"run-{number}", options["arch"], resources) as run:
                launch.launch(launch.plan_run(parse_request(options), run, resources), run, resources)
            if number % max(1, runs // 10) == 0 or number == 1:
                time.sleep(3)
                print(
                    f"{number:4}  {measure(folder, resources.folder)}  {time.monotonic() - started - 3:7.1f}",
                    flush=True,
                )
        four_at_once(folder)
        time.sleep(3)
        print(f"four at once: {measure(folder, resources.folder)}")


def four_at_once(folder: str) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "jobs/train.py", "--arch", "cnn_softmax", "--arch-argument", "first_filters=8"]
    command += ["--arch-argument", "dense_units=32", "--dataset", f"{folder}/dataset", "--storage", f"{folder}/runs"]
    command += ["--global-batch-size", "20", "--precision", "float32", "--epochs", "2", "--wait", "300", "--run-name"]
    jobs = [
        subprocess.Popen([*command, f"four-{number}"], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
        for number in range(4)
    ]
    codes = [job.wait() for job in jobs]
    print(f"exit codes of four at once: {codes}", flush=True)


def measure(folder: str, job_folder: str) -> str:
    """Return what is used now, in the order of the heading; the runs' own folder is meant to grow and left out."""
    driver = psutil.Process()
    processes = [driver, *driver.children(recursive=True)]
    resident, files = 0, 0
    for process in processes:
        try:
            resident += process.memory_info().rss
            files += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    objects = ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]
    files_of = {
        place: len(names)
        for root in (tempfile.gettempdir(), job_folder)
        for place, _, names in os.walk(root)
        if not place.startswith(folder)
    }
    # Ray keeps one or two of each process that has ever been, until the cluster ends.
    logs = sum(count for place, count in files_of.items() if "/logs" in place)
    columns = (
        f"{driver.memory_info().rss / 2**20:10.0f}  {resident / 2**20:11.0f}  {len(processes):9}  {files:10}  "
        f"{objects / 2**20:11.1f}  {sum(files_of.values()) - logs:15}  {logs:4}"
    )
    return columns


if __name__ == "__main__":
    # Only what these runs leave behind is counted.
    own = tempfile.mkdtemp()
    os.environ["TMPDIR"] = tempfile.tempdir = own
    try:
        typer.run(main)
    finally:
        shutil.rmtree(own, ignore_errors=True)
