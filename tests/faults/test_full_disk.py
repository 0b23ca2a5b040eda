"""A disk that fills up with checkpoints: what was written stays, and the run goes on when there is room."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import run_job, write_stripes
from trainer.record import checkpoint as checkpoints
from trainer.runtime.cluster import connect

NETWORK = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=64 --precision float32"
# All checkpoints are kept: the disk is full after some thirty of them.
OPTIONS = [*NETWORK.split(), "--global-batch-size", "20", "--epochs", "50", "--keep-best", "50", "--run-name", "one"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_a_full_disk_costs_nothing_that_was_written(small_disk, tmp_path):
    with connect():
        prepare(str(write_stripes(tmp_path / "source", 20)), str(tmp_path / "dataset"), PrepareConfig(image_size=32))
    command = ["train.py", *OPTIONS, "--dataset", str(tmp_path / "dataset"), "--storage", str(small_disk)]
    full = run_job(*command)
    assert full.returncode == 1
    assert "No space left on device; make room, and the same command continues" in full.stderr.splitlines()[-1]
    folder = str(small_disk / "one" / "checkpoints")
    kept = checkpoints.find_checkpoints(folder)
    assert len(kept) > 10
    for one in kept:
        checkpoints.read_file(folder, one, checkpoints.MODEL_NAME)
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    again = run_job(*command)
    assert again.returncode == 0, again.stderr
    assert f"continuing after epoch {kept[-1].epoch}" in again.stderr
