"""Connects to Ray: the cluster that RAY_ADDRESS names (as in a submitted job), or one of our own on this machine."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
import ray.data

from trainer.errors import InputError, JobError

# Set in every process of the job before it can import TensorFlow.
WORKER_ENVIRONMENT = {
    # tf.keras is tf_keras: Keras 3 cannot train under MultiWorkerMirroredStrategy.
    "TF_USE_LEGACY_KERAS": "1",
    # Errors only.
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# What Ray would tell the user is told by the job; these hold for the driver and what it starts.
_RAY_ENVIRONMENT = {
    # How soon the controller notices that the workers have ended or died.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A warning about a default of a later version.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A batch job on somebody's cluster reports nothing to anybody else.
    "RAY_USAGE_STATS_ENABLED": "0",
}


_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Resources:
    """What the connected cluster has in all."""

    num_nodes: int
    num_cpus: float
    num_gpus: int
    devices: str
    """What a worker computes on: the kinds of GPU, or the cores of the smallest node."""
    node_memory_gib: float
    """For workers, of the node that has least; Ray leaves out the object store and what ran before it."""

    @property
    def hardware(self) -> str:
        """The nodes in words."""
        nodes = f"{self.num_nodes} node{'s' * (self.num_nodes > 1)}"
        gpus = f", {self.num_gpus} GPUs" if self.num_gpus else ""
        return f"{nodes}, {self.num_cpus:g} CPUs{gpus}, {self.devices}, {self.node_memory_gib:.0f} GiB a node"


@contextlib.contextmanager
def connect(*, may_wait: bool = False) -> Iterator[Resources]:
    """Connects to Ray for the time of the context and yields what the cluster has.

    Without RAY_ADDRESS a cluster of one node is started and ended with the context; it never attaches to a cluster that
    happens to run on this machine. Ray's own log lines stay in its session folder: what a user needs to see comes from
    the job itself. The session folder of such a cluster goes with it, unless the job failed.

    Args:
        may_wait: whether the job knows what to do with a cluster of which no node works yet.

    Raises:
        InputError: no cluster answers at RAY_ADDRESS, or it refuses the token, or no node of it works.
        JobError: that of the context; says where Ray's logs are.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    environment, session = WORKER_ENVIRONMENT, ""
    if "RAY_ADDRESS" not in os.environ:
        # Not in TMPDIR, which may be long: Ray makes sockets there, and the name of a socket is short.
        session = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
        options = {"address": "local", "include_dashboard": False, "_temp_dir": session}
        # TensorFlow leaves files of traced functions in a worker that is killed.
        environment = {**WORKER_ENVIRONMENT, "TMPDIR": session}
    else:
        _check_answer(os.environ["RAY_ADDRESS"])
    useless = session
    try:
        with _deferred_signals():
            try:
                ray.init(
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": environment},
                    **options,
                )
            except (ConnectionError, ray.exceptions.AuthenticationError) as error:
                raise InputError(_explain_refusal(str(error).splitlines()[0])) from error
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources = read_resources()
        if not resources.num_cpus and not may_wait:
            raise InputError("no node of the cluster has CPUs for work; start one (`ray start --address HEAD:6379`)")
        yield resources
    except JobError as error:
        useless = ""
        raise (JobError(f"{error}; Ray's logs are in {session}") if session else error) from error
    finally:
        ray.shutdown()
        if useless:
            shutil.rmtree(useless, ignore_errors=True)


def _check_answer(address: str) -> None:
    """Raises InputError where nothing answers: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # "auto", or another form that Ray knows
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise InputError(_explain_refusal(error.strerror or str(error))) from error


def _explain_refusal(reason: str) -> str:
    return (
        f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS', '')}: {reason}; start Ray there, or unset RAY_ADDRESS to work on "
        "this machine alone; with token authentication set RAY_AUTH_MODE=token and give ~/.ray/auth_token"
    )


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM until the end of the context.

    What a handler raises in the middle of Ray's start gets lost there, with a lock that is never given back. Ray also
    puts its own handler of SIGTERM in place, which exits with 15.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def keep(signal_number: int, frame: FrameType | None) -> None:
        arrived.append(signal_number)

    before = {one: signal.signal(one, keep) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if arrived:
        signal.raise_signal(arrived[0])


def read_resources() -> Resources:
    """Returns what the connected cluster has now."""
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Ray names each kind of GPU by a resource of its own.
    kinds = sorted(name.removeprefix("accelerator_type:") for name in total if name.startswith("accelerator_type:"))
    # A head without work has no CPUs: no worker will run there.
    working = [node for node in nodes if node.get("CPU")] or nodes
    return Resources(
        num_nodes=len(nodes),
        num_cpus=total.get("CPU", 0.0),
        num_gpus=int(total.get("GPU", 0)),
        devices=" ".join(kinds) or f"{min(node.get('CPU', 0) for node in working):g} cores",
        node_memory_gib=min(node.get("memory", 0.0) for node in working) / 2**30,
    )
