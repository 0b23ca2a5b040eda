"""`ray job submit` as a user types it, against a head with token authentication."""

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, ray_nodes, write_stripes

NETWORK = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument later_filters=[8]"
# Many epochs: it is at work when it is stopped.
TRAINING = f"{NETWORK} --arch-argument dense_units=32 --epochs 400 --global-batch-size 500 --precision float32".split()
SECRET = "a-secret-that-no-file-may-hold"


@pytest.fixture(scope="module")
def ray_job(tmp_path_factory):
    """A head with a secret in its environment; returns a function that runs ``ray job`` from elsewhere."""
    temporary = tmp_path_factory.mktemp("temporary")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as session:
        home = tmp_path_factory.mktemp("home")
        variables = {"AWS_SECRET_ACCESS_KEY": SECRET, "TMPDIR": str(temporary)}
        # By default Ray serves the metrics of a process after ten seconds.
        with ray_nodes(home, session, **variables, RAY_metrics_report_interval_ms="2000") as run:
            yield run
        # What TensorFlow and Ray Train leave has gone with its worker or its driver.
        assert not [one for one in temporary.iterdir() if one.name.startswith(("__autograph", "ray-"))]
        # All that Ray wrote: logs, runtime environments, the jobs' own output.
        for path in Path(session).rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def submit(ray_job):
    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return ray_job("submit", *arguments, **extra)

    return run


def scrape(ray_job, gauge: str) -> float:
    """Return the value of a gauge of the run, once one of the places that the head names to Prometheus has it."""
    deadline = time.monotonic() + 60
    while True:
        for place in ray_job.read("/api/prometheus/sd")[0]["targets"]:
            # The head names the autoscaler's port, too, at which nothing answers where there is none.
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{place}/metrics", timeout=10) as answer:
                if found := re.search(rf'^{gauge}{{.*\brun="one".*}} (\S+)$', answer.read().decode(), re.MULTILINE):
                    return float(found[1])
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_command_as_typed_trains_in_the_checkout_of_the_head_until_it_is_stopped(ray_job, submit, tmp_path):
    run = tmp_path / "runs" / "one"
    command = ["python", "jobs/train.py", *TRAINING, "--storage", str(run.parent), "--run-name", run.name]
    started = submit("--no-wait", "--submission-id", "typed", "--", *command)
    assert started.returncode == 0, started.stdout + started.stderr
    deadline = time.monotonic() + 300
    while not list(run.glob("checkpoints/*/checkpoint.json")):
        assert time.monotonic() < deadline, ray_job("logs", "typed").stdout
        time.sleep(0.2)
    assert "3500 images: 7 steps per epoch" in ray_job("logs", "typed").stdout
    # The embedded dataset, for the next run too.
    (manifest,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("mnist-5000-28/manifest.json")
    assert json.loads(manifest.read_text())["splits"]["val"]["rows_per_class"] == [75] * 10
    shown = ray_job.read("/api/train/v2/runs/v1")["train_runs"][0]
    assert (shown["name"], shown["status"], len(shown["attempts"])) == ("one", "RUNNING", 1)
    options = shown["run_settings"]["train_loop_config"]
    assert (options["run"], options["arch"], options["global_batch_size"]) == (str(run), "cnn_softmax", 500)
    assert 0 < scrape(ray_job, "ray_training_notes_val_loss") < 10
    assert ray_job("stop", "typed").returncode == 0
    ending = json.loads((run / "result.json").read_text())
    assert (ending["status"], ending["reason"]) == ("interrupted", "SIGTERM")
    assert list(run.glob("checkpoints/*/checkpoint.json"))
    assert SECRET not in ray_job("list").stdout
    again = submit("--no-wait", "--submission-id", "typed", "--", *command)
    assert again.returncode == 1
    assert "submission_id typed already exists" in again.stdout + again.stderr


def test_a_runtime_environment_ships_the_code_of_a_folder_and_its_variables(submit, tmp_path):
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(
        ["git", "ls-files", "jobs", "trainer", "data_prep"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    for name in tracked.stdout.split():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((REPOSITORY / name).read_bytes())
    for name in ("trainer/runtime/errors.py", "data_prep/prepare.py"):
        (checkout / name).write_text((checkout / name).read_text() + f"\nprint('shipped {name}')\n")
    with (checkout / "data_prep" / "decode.py").open("a") as module:
        module.write("\nimport os\nprint('region', os.environ['AWS_DEFAULT_REGION'])\n")
    environment = tmp_path / "runtime-env.yaml"
    example = (REPOSITORY / "docs" / "cluster" / "runtime-env.yaml").read_text()
    environment.write_text(example.replace("working_dir: .", f"working_dir: {checkout}").replace("us-east-1", "xx-1"))
    source = write_stripes(tmp_path / "source", images_per_class=8)
    job = submit(
        "--runtime-env", str(environment), "--", "python", "jobs/prepare.py", str(source), str(tmp_path / "dataset")
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "shipped trainer/runtime/errors.py" in job.stdout
    assert "shipped data_prep/prepare.py" in job.stdout
    assert "region xx-1" in job.stdout
    assert "succeeded" in job.stdout
    assert (tmp_path / "dataset" / "manifest.json").exists()


def test_a_run_that_fails_makes_the_job_fail(submit):
    job = submit("--", "python", "jobs/train.py", "--arch", "lenet")
    assert job.returncode == 1
    assert "'lenet' is unknown; choose from cnn_sigmoid" in job.stdout
    assert "exit code 2" in job.stdout + job.stderr


def test_without_a_token_nothing_is_accepted(submit, tmp_path):
    job = submit("--", "python", "jobs/train.py", *TRAINING, RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    assert job.returncode != 0
    assert "uthentication" in job.stdout + job.stderr
