"""What the driver tells workers and what the first one answers, importable without TensorFlow."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig
from trainer.runtime.events import OnEvent, SizeMeasured
from trainer.runtime.lease import Lease


@dataclass(frozen=True)
class WorkerJob:
    """What every worker is told."""

    config: TrainConfig
    manifest: Manifest
    run: str
    """URI of the run folder."""
    lease: Lease | None
    """Of the driver: its workers write no more when it has lost the run."""
    trackers: tuple[str, ...]
    """Names of `trainer.training.tracking`: where metrics go besides the run folder."""
    profile_steps: int
    """How many steps are traced; 0 for none."""
    largest_per_replica: int | None
    """What a worker's memory holds, where that is known: another number of workers may share the batch otherwise."""
    send_event: OnEvent
    """Tells the driver of progress; never waits."""


@dataclass(frozen=True)
class WorkerResult:
    """What the first worker answers."""

    reason: str
    """Why the run ended early; empty if it did not."""
    attempts: int
    parameters: int
    layers: str
    """The network, as code."""
    weights_crc32: tuple[int, ...]
    """Of the weights that each worker held at the end: all the same."""
    mistakes: npt.NDArray[np.uint8]
    """``[mistakes, height, width, channels]``: the validation images of `find_mistakes`, for the best checkpoint."""


@dataclass(frozen=True)
class TrialJob:
    """What the workers of a trial are told."""

    config: TrainConfig
    """Of the run; its batch is replaced by those of the trial."""
    manifest: Manifest
    sizes: tuple[int, ...]
    """Per-replica batch sizes, ascending."""
    memory_limit_gib: float | None
    """Of one worker; None for its share of the machine."""
    memory_share: float
    """A size that is predicted to need more than this share of the limit is left out."""
    compare_losses: bool
    """Send the losses of a few first steps at the first size."""
    reference: tuple[SizeMeasured, ...]
    """What float32 measured so far: a trial of another precision ends where that is far slower."""
