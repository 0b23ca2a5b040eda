"""The augmentation that won in a run, kept in the storage for later runs with the same dataset and architecture."""

from collections.abc import Sequence
from datetime import datetime

from trainer.config.config import AUGMENT_STRENGTHS, TrainConfig
from trainer.record.epoch_row import Metrics, main_path
from trainer.runtime import storage
from trainer.runtime.errors import RecordError
from trainer.runtime.markdown import format_count, format_loss
from trainer.runtime.record_format import Record


class AugmentationChoice(Record):
    """The augmentation that won, and by how much."""

    augmentation: str
    figures: str
    """The validation loss of each candidate."""
    run: str
    """The name of the run that tried them."""
    chosen: datetime


def write_choice(storage_uri: str, config: TrainConfig, choice: AugmentationChoice) -> None:
    """Keep a choice for later runs in a storage; it replaces an earlier one."""
    storage.write_bytes(_uri(storage_uri, config), choice.to_json())


def read_choice(storage_uri: str, config: TrainConfig) -> AugmentationChoice | None:
    """Return what an earlier run with this dataset, this architecture and these candidates chose; None if none did."""
    uri = _uri(storage_uri, config)
    try:
        return AugmentationChoice.parse(storage.read_bytes(uri), uri)
    except (FileNotFoundError, RecordError):
        return None  # the run tries again


def _uri(storage_uri: str, config: TrainConfig) -> str:
    key = config.model_dump(include={"arch", "dataset_fingerprint", "input_scaling", *AUGMENT_STRENGTHS})
    return storage.keyed_uri(storage_uri, "augmentations", key)


def describe_trials(history: Sequence[Metrics]) -> str:
    """Return what was tried in a run and the last validation loss of each, longest tried and best first.

    Losses after different numbers of epochs do not compare. It is empty if nothing was tried.
    """
    last = {row["augmentation"]: row for row in history if row.get("stage") == "trial"}
    by_epochs: dict[int, list[Metrics]] = {}
    for row in sorted(last.values(), key=lambda row: float(row["val_loss"])):
        epochs = sum(before.get("stage") == "trial" for before in main_path(history[: row["epoch"]]))
        by_epochs.setdefault(epochs, []).append(row)
    return "; ".join(
        ", ".join(f"{row['augmentation']} {format_loss(row['val_loss'], 3)}" for row in by_epochs[epochs])
        + f" after {format_count(epochs, 'epoch')}"
        for epochs in sorted(by_epochs, reverse=True)
    )
