"""Tells each Ray Train worker of the others, as MultiWorkerMirroredStrategy reads it, and how long to wait for them.

Ray's own TensorflowTrainer does the same, but importing it imports TensorFlow in the driver and in the controller
(docs/decisions/0002).
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
    """Makes Ray Train set TF_CONFIG in each worker before the training function runs."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend that does it."""
        return _TensorFlowBackend


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})


def tolerate_silence() -> None:
    """Make TensorFlow wait for a worker that stands still, for as long as Ray Train does and longer.

    TensorFlow's coordination service gives up a worker after 10 s without a heartbeat, and with it the attempt. Ray
    notices a process that died within seconds, a node within a minute, and a worker that does not answer after ten
    minutes (RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S), so nothing is left for the heartbeats to find.

    Must be called before the strategy is made; does nothing for one worker alone, or when it is made already.
    """
    workers = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {}).get("worker", [])
    if len(workers) > 1:
        set_heartbeat_timeout(len(workers), _HEARTBEAT_MILLISECONDS)
