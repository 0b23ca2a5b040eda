"""The metrics of an epoch, a row of ``metrics.parquet`` and of a checkpoint's history, and the order of these rows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Metrics = dict[str, Any]
"""The metrics of one epoch by name: numbers, and the names of what was done."""

# In nats. That of guessing among 1,000 classes is 6.9; only a network that diverges for a while exceeds this.
_LARGEST_LOSS = 50.0


@dataclass(frozen=True)
class EpochRow:
    """The metrics of one finished epoch; the names and the order of the fields are those of ``metrics.parquet``.

    Loss, accuracy, gradient norm and clipped fraction are means over all steps of the epoch. Seconds and images per
    second cover what the last attempt did of it.
    """

    epoch: int
    """From 1."""
    step: int
    """Optimizer steps since the run began."""
    loss: float
    """Mean cross-entropy of the training batches, in nats."""
    accuracy: float
    learning_rate: float
    """At the end of the epoch."""
    grad_norm: float
    """Mean L2 norm of the unclipped gradient."""
    clipped_fraction: float
    """Share of the steps whose gradient was clipped."""
    noise_scale: float
    """Gradient noise scale in images (`trainer.record.noise_scale`); NaN where it was not measured, infinite where the
    gradients are no longer than their noise."""
    images_per_second: float
    data_wait_seconds: float
    """Seconds that the training steps waited for batches; the maximum over the workers."""
    attempt: int
    """The attempt that finished the epoch, from 1."""
    num_workers: int
    global_batch_size: int
    val_loss: float
    """Mean cross-entropy of the validation split, in nats."""
    val_accuracy: float
    peak_memory_gib: float
    """Most memory that a worker has used so far; the maximum over the workers."""
    checkpoint_seconds: float
    """Seconds that training stood still for checkpoints since the row before."""
    epoch_seconds: float
    """Duration of training and evaluation together."""
    stage: str
    """Part of the run that the epoch belongs to; see `trainer.training.stages`."""
    augmentation: str
    """What was varied in the training images."""
    started_from: int
    """The epoch whose weights this one started from: the one before, except where candidates are compared."""

    def to_metrics(self) -> Metrics:
        """Return the values by metric name."""
        return asdict(self)


def main_path(history: Sequence[Metrics]) -> list[Metrics]:
    """Return the epochs that led to the weights of the last one, without those of candidates that lost."""
    path: list[Metrics] = []
    number = len(history)
    while number:
        path.append(history[number - 1])
        number = int(path[-1].get("started_from", number - 1))
    return path[::-1]


def find_curve(history: Sequence[Metrics], best_epoch: int | None = None) -> list[Metrics]:
    """Return the epochs that a curve shows: all but those of candidates that lost, unless one of these is the best.

    They start from the same weights: in one line, the curve would jump where no training did.
    """
    shown = {row["epoch"] for row in main_path(history)} | {best_epoch}
    return [row for row in history if row.get("stage") != "trial" or row["epoch"] in shown]


def complete_row(metrics: Metrics) -> Metrics:
    """Return a row of metrics of an earlier version with NaN for the noise scale, which it did not measure."""
    return {"noise_scale": float("nan"), **metrics}


def has_spike(losses: Iterable[float]) -> bool:
    """Return whether one of some losses is so high that the others would look alike beside it."""
    return any(_LARGEST_LOSS < loss < math.inf for loss in losses)
