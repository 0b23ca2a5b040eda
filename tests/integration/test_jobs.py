"""The jobs as a user types them, against a real HTTP object store."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY, free_port, run_job, write_stripes

SMALL = ["--arch", "cnn_softmax", "--arch-argument", "first_filters=8", "--arch-argument", "dense_units=32"]
TRAINING = [*SMALL, "--base-learning-rate", "0.05", "--epochs", "2"]
TRAINING += ["--global-batch-size", "20", "--precision", "float32"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("source"), images_per_class=30)


@pytest.fixture(scope="module")
def dataset(run_on_cluster, bucket, source) -> str:
    prepared = run_on_cluster("prepare.py", str(source), f"{bucket}/stripes", "--image-size", "32", "--verbose")
    assert prepared.returncode == 0, prepared.stderr
    assert "decode: statistics of Ray Data\n" in prepared.stderr
    assert "Remote cpu time" in prepared.stderr
    assert "90 images 32x32x1, 0 files not used" in prepared.stdout
    return f"{bucket}/stripes"


@pytest.fixture(scope="module")
def train(bucket, dataset):
    def run(*options: str):
        return run_job("train.py", *TRAINING, "--dataset", dataset, "--storage", f"{bucket}/runs", *options)

    return run


@pytest.fixture(scope="module")
def finished(train):
    finished = train("--run-name", "first", "--evaluate-test")
    assert finished.returncode == 0, finished.stderr
    return finished


def object_names(prefix: str) -> list[str]:
    return fsspec.filesystem("s3", skip_instance_cache=True).find(prefix)


def test_a_job_log_has_one_line_of_arithmetic_and_one_an_epoch(finished):
    times, lines = zip(*(line.split(" ", 1) for line in finished.stderr.splitlines()), strict=True)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", time) for time in times)
    assert lines[0] == (
        "global batch 20 = 1 replica x 20; 66 images: 3 steps per epoch, 6 dropped (different images each epoch); "
        "2 epochs = 6 steps"
    )
    assert [line.partition(" - ")[0] for line in lines[1:]] == ["epoch 1/2", "epoch 2/2"]


def test_no_output_has_control_characters(finished):
    assert not re.search(r"[^\n -~]", finished.stdout + finished.stderr)


def test_the_result_is_k_of_n_with_its_interval(finished):
    pattern = r"val +loss: [\d.]+ - accuracy: [\d.]+ \(\d+ of 12, 95% interval [\d.]+-[\d.]+\)"
    assert re.search(pattern, finished.stdout)
    assert re.search(r"test +loss: .* of 12, ", finished.stdout)


def test_the_run_folder_is_in_the_bucket(bucket, finished):
    names = {name.removeprefix("training/runs/first/").split("/")[0] for name in object_names(f"{bucket}/runs/first")}
    assert {"config.json", "metrics.parquet", "checkpoints", "result.json", "note.md", "model.keras", "plots"} <= names
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    with filesystem.open(f"{bucket}/runs/first/metrics.parquet") as file:
        assert pq.read_table(file)["step"].to_pylist() == [3, 6]


def test_no_secret_is_written(bucket, finished, monkeypatch):
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    texts = [filesystem.cat(name) for name in object_names(bucket) if not name.endswith((".parquet", ".safetensors"))]
    assert texts
    for text in [*texts, finished.stdout.encode(), finished.stderr.encode()]:
        assert b"a-secret-that-no-file-may-hold" not in text


def test_the_same_command_of_a_finished_run_shows_its_result(train, finished):
    again = train("--run-name", "first", "--evaluate-test")
    assert (again.returncode, again.stdout) == (0, finished.stdout)
    assert again.stderr == ""


def test_a_used_name_with_another_config_is_refused(train, finished):
    other = train("--run-name", "first", "--seed", "1")
    assert other.returncode == 2
    assert "seed: 0 -> 1; evaluate_test: True -> False" in other.stderr


def test_a_dataset_that_is_not_committed_is_refused(bucket):
    missing = run_job("train.py", "--arch", "alexnet", "--dataset", f"{bucket}/nothing")
    assert missing.returncode == 2
    assert "holds no prepared dataset" in missing.stderr


def test_a_missing_bucket_is_refused_before_anything_starts(dataset):
    nowhere = run_job("train.py", *TRAINING, "--dataset", dataset, "--storage", "s3://no-such-bucket/runs")
    assert nowhere.returncode == 2
    assert "'no-such-bucket'" in nowhere.stderr
    assert "AWS_ENDPOINT_URL" in nowhere.stderr


def test_a_wrong_endpoint_is_refused_with_its_name(dataset):
    unreachable = run_job("train.py", *TRAINING, "--dataset", dataset, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert unreachable.returncode == 2
    assert "http://127.0.0.1:9" in unreachable.stderr


def read_fingerprint(dataset: str) -> str:
    return json.loads(fsspec.open(f"{dataset}/manifest.json").open().read())["fingerprint"]


def test_a_source_in_the_bucket_gives_the_same_dataset(run_on_cluster, bucket, source, dataset):
    fsspec.filesystem("s3", skip_instance_cache=True).put(f"{source}/", f"{bucket}/images/", recursive=True)
    remote = run_on_cluster("prepare.py", f"{bucket}/images", f"{bucket}/again", "--image-size", "32")
    # A busy machine takes long enough for a line that says how far it is.
    unasked = [
        line for line in remote.stderr.splitlines() if not re.fullmatch(r"[\d:]{8} [a-z -]+: \d+ of \d+.*", line)
    ]
    assert (remote.returncode, unasked) == (0, [])
    assert read_fingerprint(f"{bucket}/again") == read_fingerprint(dataset)


@pytest.mark.slow
def test_a_killed_preparation_is_finished_by_the_same_command(tmp_path):
    source = write_stripes(tmp_path / "source", images_per_class=200)
    command = [sys.executable, str(REPOSITORY / "jobs" / "prepare.py"), str(source)]
    options = ["--image-size", "200"]
    killed = subprocess.Popen([*command, str(tmp_path / "killed"), *options], stderr=subprocess.DEVNULL)
    while killed.poll() is None and not list((tmp_path / "killed").glob("_staging/*/*.rows.parquet")):
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = run_job("prepare.py", str(source), str(tmp_path / "killed"), *options)
    assert again.returncode == 0, again.stderr
    whole = run_job("prepare.py", str(source), str(tmp_path / "whole"), *options)
    assert whole.returncode == 0, whole.stderr
    assert read_fingerprint(str(tmp_path / "killed")) == read_fingerprint(str(tmp_path / "whole"))


def test_the_doctor_says_what_is_wrong(run_on_cluster):
    finished = run_on_cluster("doctor.py", "--storage", "s3://no-such-bucket/runs")
    assert finished.returncode == 2
    *well, ill = finished.stdout.splitlines()
    assert [line[:5] for line in well] == ["ok   "] * 4
    assert ill.startswith("wrong  node ")
    assert "bucket 'no-such-bucket'" in ill


def test_a_cluster_that_does_not_answer_is_named():
    address = f"127.0.0.1:{free_port()}"
    finished = run_job("doctor.py", RAY_ADDRESS=address)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: RAY_ADDRESS {address}: Connection refused; start Ray there")
