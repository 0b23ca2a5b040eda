"""What a run tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageProgressed:
    """Some of a stage is finished: of preparing a dataset, or of an epoch."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class RunStarted:
    """The workers are about to start; the numbers say how the images are cut into steps."""

    global_batch_size: int
    num_replicas: int
    per_replica_batch_size: int
    steps_per_epoch: int
    rows: int
    """Images of the train split."""
    epochs: int
    finished_epochs: int
    """More than 0 where a run is continued."""

    def __str__(self) -> str:
        left_out = self.rows - self.steps_per_epoch * self.global_batch_size
        text = (
            f"global batch {self.global_batch_size} = {self.num_replicas} replicas x {self.per_replica_batch_size}; "
            f"{self.rows} images = {self.steps_per_epoch} steps an epoch"
            + (f" + {left_out} left out (others each epoch)" if left_out else "")
            + f"; {self.epochs} epochs = {self.epochs * self.steps_per_epoch} steps"
        )
        return text + (f"; continuing after epoch {self.finished_epochs}" if self.finished_epochs else "")


@dataclass(frozen=True)
class WeightsTransferred:
    """The network does not start from random weights alone."""

    transferred: str
    """Which layers were loaded and which were not."""

    def __str__(self) -> str:
        return self.transferred


@dataclass(frozen=True)
class EpochFinished:
    """An epoch is trained and evaluated."""

    row: dict[str, float]
    """As in ``metrics.parquet``."""
    epochs: int

    def __str__(self) -> str:
        row = self.row
        return (
            f"epoch {row['epoch']:.0f}/{self.epochs} - loss: {row['loss']:.4f} - accuracy: {row['accuracy']:.4f} - "
            f"val_loss: {row['val_loss']:.4f} - val_accuracy: {row['val_accuracy']:.4f} - "
            f"learning_rate: {row['learning_rate']:.2e} - {row['images_per_second']:.0f} images/s - "
            f"{row['epoch_seconds']:.1f} s"
        )


Event = StageProgressed | RunStarted | WeightsTransferred | EpochFinished
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Watches nothing."""
