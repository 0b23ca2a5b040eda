"""SIGINT and SIGTERM, also twice in a row: nothing is left running, and the same command continues."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, run_job, write_stripes
from tests.unit.conftest import write_dataset  # noqa: F401

# Many epochs: a signal finds it at work. The batch keeps an epoch short.
TRAINING = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=32 --epochs 400"
OPTIONS = [*TRAINING.split(), "--global-batch-size", "20", "--precision", "float32", "--run-name", "one"]


@pytest.fixture
def folders(monkeypatch) -> Iterator[list[Path]]:
    """Where the jobs of a test leave what is temporary; empty. Ray makes sockets there, so the names are short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as ray_folder, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield [Path(ray_folder), Path(folder)]


@pytest.fixture
def dataset(write_dataset) -> str:  # noqa: F811
    """A prepared dataset; no cluster has prepared it, which takes longer to start than what is tested."""
    return write_dataset(rows=(84, 18, 0), image_size=32, rows_per_shard=102).uri


@pytest.fixture
def start(dataset, folders, tmp_path):
    """Start the run in a process group of its own; return when it has trained an epoch."""

    def start(num_workers: str) -> subprocess.Popen[str]:
        command = [sys.executable, "jobs/train.py", *OPTIONS, "--dataset", dataset, "--storage", str(tmp_path)]
        command += ["--num-workers", num_workers]
        job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
        lines = []
        for line in job.stderr:
            lines.append(line)
            # Not the line that says in which epoch an attempt continues.
            if re.search(r" epoch \d+/", line):
                return job
        raise AssertionError("".join(lines))

    return start


def wait_for_checkpoint(run: Path) -> None:
    """It is written while the next epoch is trained."""
    while not list((run / "checkpoints").glob("*/checkpoint.json")):
        time.sleep(0.05)


def assert_ends(job: subprocess.Popen[str], signal_name: str, code: int, folders: list[Path]) -> None:
    """Everything that the job started ends with it, and it has said why."""
    lines = job.stderr.readlines()
    assert (job.wait(timeout=60), lines[-1:]) == (code, [f"stopped by {signal_name}; the same command continues\n"])
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def assert_refused_beside(job: subprocess.Popen[str], dataset: str, storage: Path) -> None:
    """Two runs of one name are not mixed."""
    other = run_job("train.py", *OPTIONS, "--dataset", dataset, "--storage", str(storage))
    assert other.returncode == 2, other.stderr
    assert f"run one is in use by process {job.pid}" in other.stderr


# A terminal sends Ctrl-C to the whole group, a scheduler sends SIGTERM to the job.
STOPS = [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 143)]


# One worker is a process of the job, two are a cluster's; that a cluster ends with its job is below.
@pytest.mark.parametrize("num_workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_stopped_run_says_so_leaves_nothing_and_is_continued(start, dataset, folders, tmp_path, num_workers):
    run = tmp_path / "one"
    for attempt, (send, number, code) in enumerate(STOPS):
        job = start(num_workers)
        wait_for_checkpoint(run)
        assert not (run / "result.json").exists()
        assert len(list((run / "attempts").iterdir())) == attempt + 1
        if attempt == 0:
            assert_refused_beside(job, dataset, tmp_path)
        started = psutil.Process(job.pid).children(recursive=True)
        assert len(started) > int(num_workers)
        for _ in range(2):
            send(job.pid, number)
            time.sleep(0.3)
        assert_ends(job, number.name, code, folders)
        assert not psutil.wait_procs(started, timeout=10)[1]
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["reason"]) == ("interrupted", number.name)
        assert not (run / "lease.json").exists()
        assert list((run / "checkpoints").glob("*/checkpoint.json"))


# Ray would take SIGTERM for itself while it starts and while it ends: a signal would end the process there.
CONNECTED = """
import time
from trainer.runtime.cluster import connect
from trainer.runtime.console import exit_codes

with exit_codes(), connect():
    time.sleep(60)
"""


def test_no_signal_is_ray_s_own(folders):
    job = subprocess.Popen([sys.executable, "-c", CONNECTED], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    while not list(folders[0].glob("*/session_*")):
        time.sleep(0.01)
    # From another process: a thread of its own would wait while Ray's code lets no thread of Python run.
    while job.poll() is None:
        job.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert_ends(job, "SIGTERM", 143, folders)


def test_a_signal_while_ray_is_starting_leaves_nothing(folders, tmp_path):
    source = write_stripes(tmp_path / "source", images_per_class=20)
    command = [sys.executable, "jobs/prepare.py", str(source), str(tmp_path / "dataset")]
    job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    # Ray has its folder and a process or two.
    while not list(folders[0].glob("*/session_*")):
        time.sleep(0.02)
    started = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGINT)
    assert_ends(job, "SIGINT", 130, folders)
    assert not psutil.wait_procs(started, timeout=10)[1]
