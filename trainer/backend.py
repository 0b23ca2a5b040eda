"""Tells each Ray Train worker of the others, in the form that MultiWorkerMirroredStrategy reads: TF_CONFIG.

Ray's own TensorflowTrainer does the same, but importing it imports TensorFlow in the driver and in the controller
(docs/decisions/0002).
"""

import json
import os
from dataclasses import dataclass

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


class _TensorFlowBackend(Backend):
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]
        addresses = [f"{host}:{port}" for host, port in worker_group.execute(get_address_and_port)]
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
