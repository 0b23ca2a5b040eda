"""Two workers of which one stands still for longer than TensorFlow's own patience."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import write_stripes
from trainer import launch
from trainer.config.request import parse_request
from trainer.record.run_folder import RunFolder
from trainer.runtime.cluster import Resources, connect
from trainer.runtime.events import EpochFinished, WorkerHeardAgain, WorkerSilent

OPTIONS = {
    "arch": "cnn_softmax",
    "arch_arguments": {"first_filters": 8, "later_filters": [8], "dense_units": 32},
    "recipe": "modern",
    "num_workers": "2",
    "global_batch_size": "12",
    "precision": "float32",
    "epochs": 20,
}


@pytest.fixture(scope="module")
def resources() -> Iterator[Resources]:
    with connect() as resources:
        yield resources


def find_other_worker(first: int) -> int:
    (other,) = (
        one.pid
        for one in psutil.Process().children(recursive=True)
        if one.pid != first and "RayTrainWorker" in " ".join(one.cmdline())
    )
    return other


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_stands_still_for_twenty_seconds_costs_no_attempt(resources, tmp_path, rank):
    source = write_stripes(tmp_path / "source", images_per_class=40)
    prepare(str(source), str(tmp_path / "dataset"), PrepareConfig(image_size=32))
    run, events = RunFolder(str(tmp_path / "runs" / "stopped")), []

    def watch(event):
        events.append(event)
        if isinstance(event, EpochFinished) and event.row["epoch"] == 2:
            first = json.loads(Path(run.path("attempts", "0001.json")).read_text())["pid"]
            stopped = first if rank == 0 else find_other_worker(first)
            os.kill(stopped, signal.SIGSTOP)
            threading.Timer(20, os.kill, (stopped, signal.SIGCONT)).start()

    with launch.open_run(str(tmp_path / "runs"), "stopped", "cnn_softmax", resources) as opened:
        request = parse_request({**OPTIONS, "dataset": str(tmp_path / "dataset")})
        plan = launch.plan_run(request, opened, resources)
        result = launch.launch(plan, opened, resources, on_event=watch)
    assert (result.attempts, result.incidents) == (1, ())
    (silent,) = (event for event in events if isinstance(event, WorkerSilent))
    (again,) = (event for event in events if isinstance(event, WorkerHeardAgain))
    assert silent.worker == again.worker
    assert silent.worker.startswith(f"worker {rank} (process ")
    assert again.seconds > 19
