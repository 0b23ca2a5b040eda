"""Connection of a job to Ray: the cluster that RAY_ADDRESS names, a cluster of its own, or none."""

import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from trainer.runtime import compat
from trainer.runtime.address import find_cluster
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.folders import hold_folder, keep_folder
from trainer.runtime.gpu import read_total_gib, visible_devices
from trainer.runtime.markdown import format_count
from trainer.runtime.signals import defer_signals_of_ray

# Set in every process of the job before it can import TensorFlow.
WORKER_ENVIRONMENT = {
    # Makes tf.keras tf_keras: Keras 3 cannot train under MultiWorkerMirroredStrategy.
    "TF_USE_LEGACY_KERAS": "1",
    # CUDA then numbers GPUs as Ray and NVML do.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # TensorFlow then uses the BatchNorm of cuDNN that takes channels-last tensors as they are.
    "TF_USE_CUDNN_BATCHNORM_SPATIAL_PERSISTENT": "1",
    # Log errors only.
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # On CPUs without AVX-512, TensorFlow leaves oneDNN off and takes 1.7 to 4.6 times as long (docs/performance.md).
    "TF_ENABLE_ONEDNN_OPTS": "1",
}

# Settings of the driver and of what it starts: the job itself reports what Ray would log.
_RAY_ENVIRONMENT = {
    # Interval at which the controller notices that workers have ended or died.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Disables a warning about the default of a later version.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A batch job on somebody's cluster must not report usage to a third party.
    "RAY_USAGE_STATS_ENABLED": "0",
}

# An actor on the head, which outlives the job, then lists its runs in the Train tab of the dashboard.
_STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"

_POLL_SECONDS = 0.5
# Maximum length of the name of a socket, and the longest part of it that Ray adds.
_SOCKET_CHARACTERS = 107
_LONGEST_SOCKET = "/session_2000-01-01_00-00-00_000000_{pid}/sockets/plasma_store"


@dataclass(frozen=True)
class Resources:
    """Total resources of the connected cluster, or of this machine."""

    num_nodes: int
    num_cpus: float
    num_gpus: int
    free_gpus: int
    """GPUs that no job held at the time of reading."""
    devices: str
    """Devices that workers compute on: the kinds of GPU, or the cores of the smallest node."""
    node_memory_gib: float
    """Memory for workers on the node that has the least, without the object store and what was in use before Ray."""
    folder: str = ""
    """Folder for logs and temporary files of a job on this machine; empty on a cluster that RAY_ADDRESS names."""

    @property
    def is_one_machine(self) -> bool:
        """Whether a single worker can be a plain process of this machine, with its GPU if it has one."""
        return bool(self.folder) and self.num_gpus <= 1

    @property
    def hardware(self) -> str:
        """Description of the nodes."""
        nodes, cpus = format_count(self.num_nodes, "node"), format_count(self.num_cpus, "CPU")
        gpus = f", {format_count(self.num_gpus, 'GPU')}" if self.num_gpus else ""
        return f"{nodes}, {cpus}{gpus}, {self.devices}, {self.node_memory_gib:.0f} GiB per node"


@contextlib.contextmanager
def connect(*, wait_seconds: float | None = 0, one_process: bool = False) -> Iterator[Resources]:
    """Connect to Ray during the context and yield the resources of the cluster.

    Without RAY_ADDRESS, a cluster of one node is started, and stopped at the end of the context; the job never attaches
    to a cluster that happens to run on this machine. Ray's log lines stay in its session folder: the job itself reports
    what a user needs to see.

    Args:
        wait_seconds: how long to wait for the first node of a cluster that scales automatically. None does not wait and
            accepts a cluster without nodes.
        one_process: whether the job starts only one process at a time, with `trainer.workers.groups`. Without
            RAY_ADDRESS, and with at most one GPU, no cluster is started then.

    Raises:
        InputError: the cluster at RAY_ADDRESS cannot be used (`trainer.runtime.address`) or has no working node, or
            there is no folder for temporary files.
        JobError: Ray does not start here, or the context raised a JobError; the message says where the logs are.
    """
    # Before Ray logs anything: the job itself reports what matters.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address := find_cluster():
        with (
            _tracked_state() as tracking,
            _connected_ray({**WORKER_ENVIRONMENT, **tracking}, wait_seconds, address=address),
        ):
            yield read_resources()
        return
    with _job_folder() as folder:
        machine = read_machine(folder)
        if one_process and machine.is_one_machine:
            yield machine
            return
        _check_socket_names(folder)
        # TensorFlow leaves files of traced functions behind when a worker is killed.
        environment = {**WORKER_ENVIRONMENT, "TMPDIR": folder}
        # No cloud provider takes nodes of this cluster away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        options = {"address": "local", "num_cpus": int(machine.num_cpus), "num_gpus": machine.num_gpus}
        options |= {"include_dashboard": False}
        with _own_token(folder), _connected_ray(environment, wait_seconds, _temp_dir=folder, **options):
            yield read_resources(folder)


@contextlib.contextmanager
def _tracked_state() -> Iterator[dict[str, str]]:
    """Turn on the tracking of Ray Train's state, unless the user has decided, and yield what other processes need.

    The trials of a study start their workers from other processes. Ray refuses a variable that the runtime environment
    of the job has already.
    """
    if _STATE_TRACKING in os.environ:
        yield {}
        return
    os.environ[_STATE_TRACKING] = "1"
    try:
        yield {_STATE_TRACKING: "1"}
    finally:
        del os.environ[_STATE_TRACKING]


@contextlib.contextmanager
def _job_folder() -> Iterator[str]:
    """Yield a folder for logs and temporary files, and delete it at the end of the context unless the job failed."""
    parent = _temporary_folder()
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(hold_folder("ray-", parent))
        except OSError as error:
            raise InputError(
                f"{parent}: {error.strerror}; set RAY_TMPDIR to a folder that can be written, with a short name"
            ) from error
        try:
            yield folder
        except JobError as error:
            keep_folder(folder)
            raise JobError(f"{str(error).removesuffix('.')}; logs are in {folder}") from error


def _temporary_folder() -> str:
    # Not in TMPDIR, which may be long: Ray creates sockets there, and the length of their names is limited.
    if folder := os.environ.get("RAY_TMPDIR"):
        return os.path.abspath(folder)
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()


def _check_socket_names(folder: str) -> None:
    too_long = len((folder + _LONGEST_SOCKET.format(pid=os.getpid())).encode()) - _SOCKET_CHARACTERS
    if too_long > 0:
        parent = os.path.dirname(folder)
        raise InputError(
            f"{parent} is {too_long} characters too long for the names of the sockets that Ray creates there; set "
            f"RAY_TMPDIR to a folder with at most {len(parent.encode()) - too_long} characters, such as /tmp"
        )


@contextlib.contextmanager
def _own_token(folder: str) -> Iterator[None]:
    """Give a cluster that is started in the context its own token: Ray would write one to the home folder."""
    path = Path(folder, "auth_token")
    path.write_text(secrets.token_hex(32))
    # Ray itself sets the mode.
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")}
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    compat.forget_token()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        compat.reload_configuration()
        compat.forget_token()


@contextlib.contextmanager
def _connected_ray(environment: dict[str, str], wait_seconds: float | None, **options: Any) -> Iterator[None]:
    # Not at the top: a job without a cluster saves the half second.
    from ray.data import DataContext

    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        # Ray loses an exception that a signal handler raises during its start, and never releases a lock.
        with defer_signals_of_ray(), compat.keep_signal_actions():
            try:
                ray.init(
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": environment},
                    **options,
                )
            # Ray has no specific class for most of the errors here.
            except Exception as error:
                raise _explain_start(error, options["address"]) from error
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        DataContext.get_current().enable_progress_bars = False
        if wait_seconds is not None:
            _wait_for_node(wait_seconds)
        yield
    finally:
        with defer_signals_of_ray():
            ray.shutdown()


def _explain_start(error: Exception, address: str) -> InputError | JobError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if address == "local":
        return JobError(f"Ray did not start on this machine: {reason}")
    return InputError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {reason}")


def _wait_for_node(seconds: float) -> None:
    started = time.monotonic()
    try:
        while not ray.cluster_resources().get("CPU"):
            if time.monotonic() - started > seconds:
                raise InputError(
                    "no node of the cluster has CPUs for work; start one (`ray start --address HEAD:6379`), or give "
                    "--wait SECONDS if the cluster scales automatically"
                )
            request_nodes([{"CPU": 1}])
            time.sleep(_POLL_SECONDS)
    finally:
        if seconds:
            request_nodes([])


def request_nodes(bundles: list[dict[str, float]]) -> None:
    """Ask the autoscaler, if there is one, for nodes with these resources; an empty list withdraws the request."""
    if ray.is_initialized():
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)


def read_machine(folder: str = "") -> Resources:
    """Return the resources that Ray would find on this machine, without starting Ray."""
    # Ray would find no core in a container with less than one.
    spec = compat.measure_machine(max(1, compat.count_cores()))
    # Ray would count an entry of CUDA_VISIBLE_DEVICES that is no GPU, such as -1.
    visible = visible_devices()
    num_gpus = int(spec.num_gpus) if visible is None else min(int(spec.num_gpus), len(visible))
    return Resources(
        num_nodes=1,
        num_cpus=float(spec.num_cpus),
        num_gpus=num_gpus,
        free_gpus=num_gpus,
        devices=_name_devices(spec.resources if num_gpus else {}, spec.num_cpus, are_here=True),
        node_memory_gib=spec.memory / 2**30,
        folder=folder,
    )


def read_resources(folder: str = "") -> Resources:
    """Return the current resources of the connected cluster; ``folder`` is the one of a cluster on this machine."""
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # A head that runs no tasks has no CPUs: no worker will run there.
    working = [node for node in nodes if node.get("CPU")] or nodes
    return Resources(
        num_nodes=len(nodes),
        num_cpus=total.get("CPU", 0.0),
        num_gpus=int(total.get("GPU", 0)),
        free_gpus=int(ray.available_resources().get("GPU", 0)),
        devices=_name_devices(total, min(node.get("CPU", 0) for node in working), are_here=bool(folder)),
        node_memory_gib=min(node.get("memory", 0.0) for node in working) / 2**30,
        folder=folder,
    )


def _name_devices(resources: Mapping[str, float], num_cpus: float, *, are_here: bool) -> str:
    # Ray has a resource for each kind of GPU, and a kind can have cards of 16 and of 32 GiB.
    kinds = sorted(name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
    memory = read_total_gib() if kinds and are_here else None
    return " ".join(kinds) + (f" with {memory:.0f} GiB" if memory else "") or format_count(num_cpus, "core")
