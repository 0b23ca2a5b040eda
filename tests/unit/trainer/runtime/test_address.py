"""The values of RAY_ADDRESS, and each answer that is not of a cluster; a real one is in integration/test_submit."""

import http.server
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from tests.conftest import free_port
from trainer.runtime.address import find_cluster
from trainer.runtime.errors import InputError


@pytest.fixture
def refusal(monkeypatch):
    """Return a function that says why a job cannot work at an address."""

    def refuse(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InputError) as refused:
            find_cluster(timeout_seconds=0.3)
        message = str(refused.value)
        assert message.startswith("RAY_ADDRESS ")
        assert (
            "unset RAY_ADDRESS to work on this machine alone" in message or "version" in message or "token" in message
        )
        return message

    return refuse


@pytest.fixture
def serve_head():
    """Return a function that starts a gRPC server, with the answers of a head or none, and return its address."""
    servers = []

    def serve(head: gcs_service_pb2_grpc.NodeInfoGcsServiceServicer | None = None) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        if head is not None:
            gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(head, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(None).wait()


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """The head of a cluster that has no node here."""

    def __init__(self, version: str) -> None:
        self.version = version

    def CheckAlive(self, request, context):  # noqa: N802
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)

    def GetAllNodeInfo(self, request, context):  # noqa: N802
        return gcs_service_pb2.GetAllNodeInfoReply()


class StrictHead(Head):
    def CheckAlive(self, request, context):  # noqa: N802
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing authentication token")


@pytest.mark.parametrize("address", [None, "", " ", "local"])
def test_nothing_and_local_are_no_cluster(monkeypatch, address):
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_cluster() is None


@pytest.mark.parametrize(
    "address",
    ["head", "6379", "head:http", "head:0", "head:65536", "::1:6379", "[::1]", "tcp://head:1", "a@b:1", ":6379"],
)
def test_what_is_no_address_is_refused_with_its_form(refusal, address):
    message = refusal(address)
    assert repr(address) in message
    assert "HOST:PORT (Ray's default port is 6379), an IPv6 address in brackets, or auto" in message


@pytest.mark.parametrize("address", ["http://head:8265", "https://head/cluster/"])
def test_a_job_server_is_sent_jobs(refusal, address):
    assert f"(RAY_API_SERVER_ADDRESS={address} ray job submit" in refusal(address)


def test_a_client_server_is_no_way_to_work_in_a_cluster(refusal):
    assert "(RAY_API_SERVER_ADDRESS=http://head:8265 ray job submit" in refusal("ray://head:10001")


def test_auto_is_what_was_started_here_for_anybody_and_no_other_job_s_cluster(refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "no cluster was started on this machine; start one (ray start --head)" in refusal("auto")
    (tmp_path / "ray").mkdir()
    gone = f"127.0.0.1:{free_port()}"
    (tmp_path / "ray" / "ray_current_cluster").write_text(gone)
    assert f"RAY_ADDRESS auto ({gone}): Connection refused; start Ray there" in refusal("auto")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_where_nothing_listens_ray_is_to_be_started(refusal, host):
    address = f"{host}:{free_port()}"
    assert refusal(address).startswith(f"RAY_ADDRESS {address}: Connection refused; start Ray there")


def test_a_dashboard_is_no_head(refusal):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        message = refusal(f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert (
        "not the head of a cluster, but a server such as Ray's dashboard; give the address of the head, HOST:PORT"
        in message
    )


def test_what_never_answers_is_not_waited_for(refusal):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        message = refusal(f"127.0.0.1:{silent.getsockname()[1]}")
    assert "no answer within 0.3 s; start Ray there" in message
    assert time.monotonic() - started < 5


def test_another_server_of_the_same_protocol_is_no_head(refusal, serve_head):
    assert "what answers there is not the head of a cluster" in refusal(serve_head())


def test_another_version_is_named_with_this_one(refusal, serve_head):
    assert f"it has Ray 1.13.0, this program {ray.__version__}" in refusal(serve_head(Head("1.13.0")))


def test_a_missing_token_is_asked_for(refusal, serve_head):
    assert "it refuses the token; set RAY_AUTH_MODE=token" in refusal(serve_head(StrictHead("")))


def test_a_cluster_without_a_node_on_this_machine_is_sent_jobs(refusal, serve_head):
    message = refusal(serve_head(Head(ray.__version__)))
    assert "no node of that cluster runs on this machine" in message
    assert "ray job submit" in message
