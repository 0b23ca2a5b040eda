"""A cluster as in docs/cluster.md, on one machine: a head without work, two nodes, a bucket, and jobs from outside."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.conftest import ray_nodes, write_stripes
from trainer.runtime import storage

NETWORK = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=32 --precision float32"


@pytest.fixture
def submit(bucket, tmp_path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Return a function that submits a Python script and its options from elsewhere."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as session,
        ray_nodes(tmp_path, session, head=["--num-cpus=0"], nodes=[["--num-cpus=2"]] * 2) as run,
    ):
        yield partial(run, "submit", "--", "python")


# Jobs that are submitted are in test_submit.py, two workers and a bucket in test_train.py and test_jobs.py.
@pytest.mark.slow
def test_images_are_prepared_and_trained_on_by_four_workers_of_two_nodes(submit, bucket, tmp_path):
    source = write_stripes(tmp_path / "source", images_per_class=40)
    for path in source.rglob("*.png"):
        storage.write_bytes(f"{bucket}/source/{path.relative_to(source)}", path.read_bytes())
    prepared = submit("jobs/prepare.py", f"{bucket}/source", f"{bucket}/dataset", "--image-size", "32")
    assert prepared.returncode == 0, prepared.stdout
    well = submit("jobs/doctor.py", "--storage", f"{bucket}/runs")
    assert well.returncode == 0, well.stdout
    assert well.stdout.count("storage can be written") == 3
    options = [*NETWORK.split(), "--global-batch-size", "20", "--epochs", "2", "--num-workers", "4", "--wait", "60"]
    places = ["--dataset", f"{bucket}/dataset", "--storage", f"{bucket}/runs", "--run-name", "one"]
    trained = submit("jobs/train.py", *options, *places)
    assert trained.returncode == 0, trained.stdout
    result = json.loads(storage.read_bytes(f"{bucket}/runs/one/result.json"))
    assert (result["status"], len(result["weights_crc32"])) == ("completed", 4)
    record = json.loads(storage.read_bytes(f"{bucket}/runs/one/config.json"))
    assert record["hardware"].startswith("3 nodes, 4 CPUs")
