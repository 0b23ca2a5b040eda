"""A real object store behind a proxy that is slow, refuses, resets, loses answers and goes away."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest

from tests.conftest import run_job, write_stripes
from tests.proxy import Fault, Proxy
from trainer.record.run_folder import RunFolder


class FaultyProxy(Proxy):
    """Forwards to a server, late; every third request gets 503 SlowDown, every seventh a reset before it is forwarded.

    Every eleventh gets one afterwards, so that its answer is lost; and after some that were answered all are reset for
    a while. ``counted`` is method and name of those that count, such as "DELETE result.json"; by default all do.
    """

    def __init__(
        self, target: str, latency_seconds: float, away_after: int, away_seconds: float, counted: str = ""
    ) -> None:
        super().__init__(target)
        self.latency_seconds, self.away_after, self.away_seconds = latency_seconds, away_after, away_seconds
        self.counted = counted
        self.away_until = 0.0
        self.requests = self.answered = self.refused = 0
        self.lock = threading.Lock()

    def find_fault(self, request: BaseHTTPRequestHandler) -> Fault:
        time.sleep(self.latency_seconds)
        with self.lock:
            self.requests += 1
            if time.monotonic() < self.away_until:
                self.refused += 1
                return "reset"
            faults: dict[int, Fault] = {3: (503, "SlowDown"), 7: "reset", 11: "lose"}
            fault = next((fault for every, fault in faults.items() if self.requests % every == 0), None)
            name = urlsplit(request.path).path.rpartition("/")[2]
            if fault is None and self.counted in ("", f"{request.command} {name}"):
                self.answered += 1
                if self.answered == self.away_after:
                    self.away_until = time.monotonic() + self.away_seconds
            return fault


@pytest.fixture
def start_proxy(bucket) -> Iterator[Callable[..., FaultyProxy]]:
    """Return a function that starts a proxy before the store of the bucket."""
    target = fsspec.filesystem("s3", skip_instance_cache=True).s3.meta.endpoint_url
    with contextlib.ExitStack() as proxies:
        yield lambda **faults: proxies.enter_context(FaultyProxy(target, **faults).serving())


def test_preparing_from_and_to_a_faulty_store_ends_right(bucket, start_proxy, tmp_path: Path):
    proxy = start_proxy(latency_seconds=0.05, away_after=20, away_seconds=20)
    source = write_stripes(tmp_path / "source", images_per_class=10)
    fsspec.filesystem("s3", skip_instance_cache=True).put(f"{source}/", f"{bucket}/images/", recursive=True)
    images, dataset = f"{bucket}/images", f"{bucket}/dataset"
    through_proxy = run_job("prepare.py", images, dataset, "--image-size", "32", AWS_ENDPOINT_URL=proxy.url)
    assert through_proxy.returncode == 0, through_proxy.stderr
    assert "30 images 32x32x1, 0 files not used" in through_proxy.stdout
    assert proxy.refused > 0
    assert proxy.requests > 60


@pytest.fixture
def training(tmp_path) -> list[str]:
    """Of a job, but for its storage."""
    source, dataset = write_stripes(tmp_path / "source", images_per_class=20), tmp_path / "dataset"
    assert run_job("prepare.py", str(source), str(dataset), "--image-size", "32").returncode == 0
    network = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=32"
    options = f"{network} --global-batch-size 10 --precision float32 --epochs 2 --run-name one"
    return ["train.py", *options.split(), "--dataset", str(dataset), "--storage"]


def test_training_to_a_faulty_store_ends_as_to_a_disk(bucket, start_proxy, training, tmp_path: Path):
    on_disk = run_job(*training, str(tmp_path / "runs"))
    assert on_disk.returncode == 0, on_disk.stderr
    # Away for a minute while the worker starts, in a process that has had no answer yet: just before, the job deletes a
    # result for the second time.
    proxy = start_proxy(latency_seconds=0.5, away_after=2, away_seconds=60, counted="DELETE result.json")
    # 170 requests, of which every second is sent again.
    through_proxy = run_job(*training, f"{bucket}/faulty", timeout_seconds=600, AWS_ENDPOINT_URL=proxy.url)
    assert through_proxy.returncode == 0, through_proxy.stderr
    assert proxy.refused > 0
    assert proxy.requests > 60
    steps = [RunFolder(f"{storage}/one").read_steps() for storage in (tmp_path / "runs", f"{bucket}/faulty")]
    assert steps[0].num_rows == 8
    # Not ==, for which a value that was not measured, NaN, is another one.
    np.testing.assert_equal(steps[1].to_pydict(), steps[0].to_pydict())


def test_a_store_that_stays_away_fails_the_job_which_goes_on_when_it_is_back(bucket, start_proxy, training):
    proxy = start_proxy(latency_seconds=0.0, away_after=100, away_seconds=3600)
    training = [*training, f"{bucket}/away", "--epochs", "30"]
    failed = run_job(*training, AWS_ENDPOINT_URL=proxy.url)
    assert failed.returncode == 1, failed.stderr
    assert "the same command continues" in failed.stderr.splitlines()[-1]
    again = run_job(*training)
    assert again.returncode == 0, again.stderr
    assert "continuing after epoch " in again.stderr


def test_wrong_names_are_reported_soon(bucket, training):
    silent = socket.create_server(("127.0.0.1", 0))
    started = time.monotonic()
    finished = run_job(*training, "s3://training/runs", AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert (finished.returncode, time.monotonic() - started < 60) == (2, True)
    assert ": nothing for 25 s; check AWS_ENDPOINT_URL_S3" in finished.stderr
    silent.close()
