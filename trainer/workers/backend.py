"""Setup of Ray Train workers for MultiWorkerMirroredStrategy: their addresses, and how long they wait for each other.

Ray's own TensorflowTrainer sets the addresses too, but importing it imports TensorFlow in the driver and in the
controller (docs/decisions/0002).
"""

import json
import os
from dataclasses import dataclass

import ray
from ray.train.backend import Backend, BackendConfig

from trainer.runtime.compat import choose_address, set_heartbeat_timeout

_HEARTBEAT_MILLISECONDS = 15 * 60 * 1000


class _TensorFlowBackend(Backend):
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]
        addresses = [f"{host}:{port}" for host, port in worker_group.execute(choose_address)]
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


@dataclass
class TensorFlowConfig(BackendConfig):
    """Configuration that makes Ray Train set TF_CONFIG in each worker before the training function runs."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend class."""
        return _TensorFlowBackend


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})


def tolerate_silence() -> None:
    """Make TensorFlow wait longer than Ray Train for a worker that does not respond.

    By default TensorFlow's coordination service fails the attempt after 10 s without a heartbeat of a worker. Ray
    detects a dead process within seconds, a dead node within a minute, and a worker that does not respond after ten
    minutes (RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S), so heartbeats need not detect anything.

    Must be called before the strategy is created; has no effect for a single worker, or afterwards.
    """
    workers = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {}).get("worker", [])
    if len(workers) > 1:
        set_heartbeat_timeout(len(workers), _HEARTBEAT_MILLISECONDS)
