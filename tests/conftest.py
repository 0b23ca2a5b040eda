import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage

# A case that is slow on a busy machine is no failure; the same cases each time, so that a failure is one of the code.
hypothesis.settings.register_profile("suite", max_examples=100, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None, database=None)
hypothesis.settings.load_profile("suite")

REPOSITORY = Path(__file__).parent.parent

# Enough of each family to run its every layer in no time.
TINY_NETWORKS = {
    "cnn_sigmoid": {"first_filters": 4, "dense_units": 8},
    "cnn_softmax": {"first_filters": 4, "dense_units": 8},
    "cnn_deep": {"first_filters": 4, "dense_units": 8},
    "cnn_tapered": {"first_filters": 4, "dense_units": 8},
    "alexnet": {"width": 0.05, "dense_units": 16},
    "vgg16": {"filters": [8, 8, 16, 16, 16], "convolutions": [1, 1, 1, 1, 1], "dense_units": 32},
    "vgg19": {"filters": [8, 8, 16, 16, 16], "convolutions": [1, 1, 1, 1, 2], "dense_units": 32},
    "inception_notes": {"width": 0.25},
    "googlenet": {"width": 0.125},
    "resnet18": {"width": 0.125, "blocks": [1, 1, 1, 2]},
    "resnet34": {"width": 0.125, "blocks": [1, 1, 1, 1]},
    "resnet50": {"width": 0.125, "blocks": [1, 1, 1, 1]},
    "inception_v3": {"width": 0.125},
    "xception": {"width": 0.125, "middle_blocks": 1},
}


class OnDevice:
    """A tensor as if on a GPU: operations of TensorFlow take it there, and NumPy gets it by a copy that is reported."""

    def __init__(self, tensor: Any, report_copy: Callable[[], None]) -> None:
        self._tensor, self._report_copy = tensor, report_copy

    def __len__(self) -> int:
        return len(self._tensor)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return self._tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._report_copy()
        return np.asarray(self._tensor, dtype)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The cache of datasets starts empty and leaves the user's alone; Ray's processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


def read_split(dataset: Path | str, split: str) -> pd.DataFrame:
    """Returns the rows of a split of a prepared dataset, with their images, as plain pyarrow reads them."""
    index = pq.read_table(Path(dataset, "index.parquet"))
    shards = [pa.ipc.open_file(pa.memory_map(str(path))) for path in sorted(Path(dataset, "shards").glob("*.arrow"))]
    images = [image for shard in shards for image in np.concatenate(_arrays_of(shard))]
    assert len(images) == len(index)
    rows = index.to_pandas().assign(image=images)
    return rows[rows["split"] == split].reset_index(drop=True)


def _arrays_of(shard: pa.ipc.RecordBatchFileReader) -> list[np.ndarray]:
    return [shard.get_batch(one)["image"].to_numpy_ndarray() for one in range(shard.num_record_batches)]


def write_stripes(folder: Path, images_per_class: int, size: int = 40, seed: int = 0) -> Path:
    """Write a source of three classes that a small network can learn: stripes of three directions, as PNG files."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    for name, position in (("across", rows), ("down", columns), ("slanted", rows + columns)):
        (folder / name).mkdir(parents=True)
        for index in range(images_per_class):
            phase, period = random.uniform(0, 6.28), random.uniform(6, 12)
            stripes = 128 + 70 * np.sin(phase + 6.28 * position / period) + random.normal(0, 20, (size, size))
            # Patches of their own, or two images of a class would be near duplicates.
            patches = random.normal(0, 40, (8, 8)).repeat(size // 8, axis=0).repeat(size // 8, axis=1)
            Image.fromarray((stripes + patches).clip(0, 255).astype(np.uint8)).save(folder / name / f"{index:03d}.png")
    return folder


@pytest.fixture
def handlers():
    """The signals that stop a job; what this process does at them is restored."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    yield list(before)
    for one, handler in before.items():
        signal.signal(one, handler)


def last_state(run: RunFolder) -> list[bytes]:
    """Return what a run has come to, bit for bit: weights, optimizer, and the answer of every step."""
    last = checkpoints.find_last(run.checkpoints)
    names = (checkpoints.MODEL_NAME, checkpoints.OPTIMIZER_NAME, checkpoints.STEPS_NAME)
    return [checkpoints.read_file(run.checkpoints, last, name) for name in names]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def bucket():
    with object_store() as bucket:
        yield bucket


@contextlib.contextmanager
def object_store() -> Iterator[str]:
    """Yield an empty bucket on a real HTTP object store that every process started meanwhile can reach."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-no-file-may-hold")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_port(port)
            # An instance keeps the endpoint that it was made with.
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            storage._s3.cache_clear()
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("training")
            yield "s3://training"
        finally:
            storage._s3.cache_clear()
            server.terminate()
            server.wait()


def wait_for_port(port: int, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def ray_nodes(
    home: Path, session: str, head: Sequence[str] = (), nodes: Sequence[Sequence[str]] = (), **variables: str
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Start a head in the checkout, and nodes, with token authentication; yield what runs ``ray job`` elsewhere.

    Its attribute ``read`` is a function that returns what the dashboard answers, as JSON.

    Args:
        home: a folder for the token, where ``ray job`` is run too.
        session: a folder for what Ray writes; a short name, since Ray makes sockets there.
        head: options of ``ray start --head``.
        nodes: those of each further ``ray start``.
        variables: of the environment of all.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token", **variables}
    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard_port = free_port(), free_port()
    ports = [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={free_port()}"]
    commands = [["--head", f"--temp-dir={session}", *ports, *head]]
    commands += [[f"--address=127.0.0.1:{port}", *options] for options in nodes]
    # Neither the nodes of one machine nor the clusters of tests that run side by side may share ports of workers.
    any_port = ["--min-worker-port=0", "--max-worker-port=0"]
    started = []

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ray", "job", *arguments],
            cwd=home,
            env={**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}", **extra},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def read(path: str) -> Any:
        token = (home / ".ray" / "auth_token").read_text().strip()
        url = f"http://127.0.0.1:{dashboard_port}{path}"
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        ) as answer:
            return json.load(answer)

    run.read = read
    try:
        for command in commands:
            log_path = home / f"ray-start-{len(started)}.log"
            with log_path.open("w") as log:
                started.append(
                    subprocess.Popen(
                        [
                            "ray",
                            "start",
                            "--block",
                            f"--dashboard-agent-listen-port={free_port()}",
                            *any_port,
                            *command,
                        ],
                        cwd=REPOSITORY,
                        env=environment,
                        stdout=log,
                        stderr=log,
                        # A shell that runs the tests in the background has it ignored, and that is inherited.
                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                    )
                )
            # One after the other: two that start at once on one machine take each other's ports.
            wait_for_text(log_path, "Ray runtime started")
        wait_for_port(dashboard_port)
        yield run
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGINT)
        for process in started:
            process.wait()


def wait_for_text(path: Path, text: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.1)


def run_job(
    *arguments: str, cwd: Path = REPOSITORY, timeout_seconds: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python jobs/NAME.py ...`` as a user would."""
    script, *options = arguments
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "jobs" / script), *options],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
