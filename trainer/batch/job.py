"""What the driver sends to the workers of a trial and what the first of them returns; importable without TensorFlow."""

from dataclasses import dataclass

from data_prep.manifest import Manifest
from trainer.batch.search import Known, Search
from trainer.config.config import TrainConfig


@dataclass(frozen=True)
class TrialJob:
    """What the workers of a trial receive."""

    config: TrainConfig
    """The config of the run; its batch and its precision are replaced by those of the trial."""
    manifest: Manifest
    search: Search
    """The search that the trial is part of."""
    known: Known
    """The measurements of earlier trials."""
    memory_limit_gib: float | None
    """Memory of one worker in GiB; None for its share of the machine."""


@dataclass(frozen=True)
class TrialResult:
    """What the first worker of a trial returns."""

    known: Known
    is_complete: bool
    """Whether nothing is left to measure; otherwise the rest needs fresh processes."""
