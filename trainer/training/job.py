"""What the driver sends to workers and what the first worker returns; importable without TensorFlow."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig
from trainer.runtime.events import OnEvent
from trainer.runtime.lease import Lease


@dataclass(frozen=True)
class WorkerJob:
    """What every worker receives."""

    config: TrainConfig
    manifest: Manifest
    run: str
    """URI of the run folder."""
    lease: Lease | None
    """The driver's lease: its workers stop writing when the driver has lost the run."""
    trackers: tuple[str, ...]
    """Names from `trainer.training.tracking`: where metrics go in addition to the run folder."""
    profile_steps: int
    """The number of steps to trace; 0 for none."""
    largest_per_replica: int | None
    """Largest per-replica batch that fits in a worker's memory, or None; limits how another number of workers splits
    the batch."""
    send_event: OnEvent
    """Sends progress to the driver; never blocks."""


@dataclass(frozen=True)
class WorkerResult:
    """What the first worker returns."""

    reason: str
    """Why the run ended early; empty if it did not."""
    attempts: int
    parameters: int
    layers: str
    """The network's layers, as code."""
    weights_crc32: tuple[int, ...]
    """Checksum of the final weights of each worker: all equal."""
    mistakes: npt.NDArray[np.uint8]
    """``[mistakes, height, width, channels]``: the validation images of `find_mistakes`, for the best checkpoint."""
