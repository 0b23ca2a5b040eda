"""A real object store behind a proxy that refuses, resets and goes away."""

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from tests.conftest import free_port, run_job, write_stripes
from trainer.run_folder import RunFolder

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to a server; every third request gets 503 SlowDown, every seventh a reset, and once all are refused."""

    def __init__(self, target: str, away_after: int, away_seconds: float) -> None:
        super().__init__(("127.0.0.1", free_port()), _Forward)
        self.target = urlsplit(target).netloc
        self.away_after, self.away_seconds = away_after, away_seconds
        self.away_until = 0.0
        self.requests = self.refused = 0
        self.lock = threading.Lock()

    def next_fault(self) -> str:
        with self.lock:
            self.requests += 1
            if self.requests == self.away_after:
                self.away_until = time.monotonic() + self.away_seconds
            if time.monotonic() < self.away_until:
                self.refused += 1
                return "reset"
            return "slow down" if self.requests % 3 == 0 else "reset" if self.requests % 7 == 0 else ""


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault()
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "slow down":
            self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        target = http.client.HTTPConnection(self.server.target)
        target.request(self.command, self.path, body, dict(self.headers))
        answer = target.getresponse()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
        self.answer(answer.status, headers, answer.read(), length=answer.getheader("Content-Length"))
        target.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        # A HEAD answer has the length of what GET would send.
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "date", "server"}


@pytest.fixture
def proxy(bucket, monkeypatch) -> Iterator[FaultyProxy]:
    target = fsspec.filesystem("s3", skip_instance_cache=True).s3.meta.endpoint_url
    server = FaultyProxy(target, away_after=40, away_seconds=8)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_preparing_from_and_to_a_faulty_store_ends_right(bucket, proxy, tmp_path: Path):
    source = write_stripes(tmp_path / "source", images_per_class=10)
    fsspec.filesystem("s3", skip_instance_cache=True).put(f"{source}/", f"{bucket}/images/", recursive=True)
    through_proxy = run_job(
        "prepare.py",
        f"{bucket}/images",
        f"{bucket}/dataset",
        "--image-size",
        "32",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.server_address[1]}",
    )
    assert through_proxy.returncode == 0, through_proxy.stderr
    assert "30 images 32x32x1, 0 files not used" in through_proxy.stdout
    assert proxy.refused > 0
    assert proxy.requests > 60


def test_training_to_a_faulty_store_ends_as_to_a_disk(bucket, proxy, tmp_path: Path):
    source, dataset = write_stripes(tmp_path / "source", images_per_class=20), tmp_path / "dataset"
    assert run_job("prepare.py", str(source), str(dataset), "--image-size", "32").returncode == 0
    network = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=32"
    training = f"{network} --global-batch-size 10 --precision float32 --epochs 2 --run-name one"
    command = ["train.py", *training.split(), "--dataset", str(dataset), "--storage"]
    on_disk = run_job(*command, str(tmp_path / "runs"))
    assert on_disk.returncode == 0, on_disk.stderr
    through_proxy = run_job(
        *command, f"{bucket}/faulty", AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.server_address[1]}"
    )
    assert through_proxy.returncode == 0, through_proxy.stderr
    assert proxy.refused > 0
    assert proxy.requests > 60
    steps = [RunFolder(f"{storage}/one").read_steps() for storage in (tmp_path / "runs", f"{bucket}/faulty")]
    assert steps[0].num_rows == 8
    assert steps[0] == steps[1]
