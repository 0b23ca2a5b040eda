"""A cluster as in docs/cluster.md, on one machine: a head without work, two nodes, a bucket, and jobs from outside."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, free_port, wait_for_port, write_stripes
from trainer import storage

NETWORK = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=32 --precision float32"


@pytest.fixture
def submit(bucket, tmp_path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Starts the nodes with token authentication; returns a function that submits a command from elsewhere."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard_port = free_port(), free_port()
    head = {"port": port, "dashboard-port": dashboard_port, "dashboard-agent-listen-port": free_port(), "num-cpus": 0}
    commands = [["--head", "--temp-dir", f"/tmp/ray-head-{port}", *(f"--{name}={one}" for name, one in head.items())]]
    # Two nodes of one machine must not share the ports of their workers.
    node = ["--address", f"127.0.0.1:{port}", "--num-cpus=2", "--min-worker-port=0", "--max-worker-port=0"]
    commands += [[*node, f"--dashboard-agent-listen-port={free_port()}"] for _ in range(2)]
    started = []
    try:
        for command in commands:
            started.append(
                subprocess.Popen(
                    ["ray", "start", "--block", *command],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            )
            wait_for_port(dashboard_port)

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
            words = ["ray", "job", "submit", "--", "python", *command]
            return subprocess.run(
                words, cwd=tmp_path, env={**environment, **address}, capture_output=True, text=True, timeout=400
            )

        yield run
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGINT)
        for process in started:
            process.wait()


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
