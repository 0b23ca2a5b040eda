"""The checkpoint format: resumable, complete or invisible, and loaded without running code from a file.

    RUN/checkpoints/step-00000327/model.safetensors      weights by variable name
                                  optimizer.safetensors  optimizer state by variable name
                                  steps.parquet          loss, gradient norm, ... of each optimizer step so far
                                  predictions.parquet    validation: label, predicted, confidence, ... of each row;
                                                         at the end of an epoch only
                                  checkpoint.json        written last: epoch, step, metrics so far, SHA-256 of the files

A folder without ``checkpoint.json`` is not a checkpoint. Nothing else is consulted: the last checkpoint and the best
ones are found by listing.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from trainer import storage
from trainer.errors import InputError
from trainer.record_format import Record

Arrays = dict[str, npt.NDArray[Any]]

_COMMIT_NAME = "checkpoint.json"
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STEPS_NAME = "steps.parquet"
PREDICTIONS_NAME = "predictions.parquet"


class Position(Record):
    """How far a run has come."""

    ADDED: ClassVar[Mapping[str, Any]] = {
        # There were checkpoints at the end of an epoch only.
        "epoch_rows": 0,
        # Not known: the schedule goes on where as many epochs of the batch of now would have led.
        "global_batch_size": 0,
    }

    epoch: int
    """Epochs that were finished."""
    epoch_rows: int
    """Rows of the next epoch's order that were trained on; 0 at the end of an epoch."""
    step: int
    """Optimizer steps that were taken."""
    global_batch_size: int
    """Of the last step."""
    history: list[dict[str, float]]
    """One row of metrics a finished epoch: so no epoch is counted twice after a restart."""


class Checkpoint(Position):
    """What ``checkpoint.json`` holds."""

    sha256: dict[str, str]
    """Of each other file of the checkpoint."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return checkpoint_name(self.step)

    @property
    def is_evaluated(self) -> bool:
        """Whether its weights are those of the last row of metrics: at the end of an epoch."""
        return self.epoch_rows == 0

    @property
    def rank(self) -> tuple[float, float, int]:
        """Larger is better: validation accuracy, then lower validation loss, then earlier."""
        return rank_epoch(self.history[-1])


def rank_epoch(row: dict[str, float]) -> tuple[float, float, int]:
    """Returns the sort key of one epoch's metrics; larger is better."""
    return (row["val_accuracy"], -row["val_loss"], -int(row["epoch"]))


def checkpoint_name(step: int) -> str:
    """Returns the folder name of the checkpoint after a number of optimizer steps."""
    return f"step-{step:08d}"


def save_checkpoint(folder: str, position: Position, files: dict[str, bytes]) -> Checkpoint:
    """Writes one checkpoint below ``folder``; it appears when all its files are there."""
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    checkpoint = Checkpoint(**position.model_dump(), sha256=sha256)
    uri = storage.join(folder, checkpoint.name)
    for name, content in files.items():
        storage.write_bytes(storage.join(uri, name), content)
    storage.write_bytes(storage.join(uri, _COMMIT_NAME), checkpoint.to_json())
    return checkpoint


def find_checkpoints(folder: str) -> list[Checkpoint]:
    """Returns the complete checkpoints below ``folder``, by step.

    Raises:
        RecordError: a commit cannot be read.
    """
    checkpoints = []
    for name in storage.find_folders(folder):
        uri = storage.join(folder, name, _COMMIT_NAME)
        try:
            checkpoints.append(Checkpoint.parse(storage.read_bytes(uri), uri))
        except FileNotFoundError:
            continue
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def find_last(folder: str) -> Checkpoint | None:
    """Returns the checkpoint with the most steps, or None where there are none."""
    found = find_checkpoints(folder)
    return found[-1] if found else None


def find_best(folder: str) -> Checkpoint | None:
    """Returns the best checkpoint by validation, or None where there are none."""
    evaluated = [checkpoint for checkpoint in find_checkpoints(folder) if checkpoint.is_evaluated]
    return max(evaluated, key=lambda checkpoint: checkpoint.rank, default=None)


def find_named(folder: str, name: str) -> Checkpoint:
    """Returns the checkpoint of a name.

    Raises:
        InputError: there is none, or it is not complete.
    """
    for checkpoint in find_checkpoints(folder):
        if checkpoint.name == name:
            return checkpoint
    raise InputError(f"{folder} has no complete checkpoint {name}, the run's best; train it again")


def read_file(folder: str, checkpoint: Checkpoint, name: str) -> bytes:
    """Returns one file of a checkpoint.

    Raises:
        InputError: it is not the file that was written, or the checkpoint has none of that name.
    """
    uri = storage.join(folder, checkpoint.name, name)
    if name not in checkpoint.sha256:
        raise InputError(
            f"{folder}: checkpoint {checkpoint.name} has no {name}: an earlier version of this program wrote it; train "
            "under another --run-name"
        )
    content = storage.read_bytes(uri)
    digest = hashlib.sha256(content).hexdigest()
    if digest != checkpoint.sha256[name]:
        raise InputError(
            f"{uri} has sha256 {digest}, its checkpoint.json says {checkpoint.sha256[name]}; it is damaged: delete the "
            f"folder {checkpoint.name} to go on from the checkpoint before it"
        )
    return content


def delete_old_checkpoints(folder: str, keep_best: int) -> None:
    """Deletes all but the last checkpoint and the best ones, and what a killed writer has left of older ones."""
    checkpoints = find_checkpoints(folder)
    evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.is_evaluated]
    best = sorted(evaluated, key=lambda checkpoint: checkpoint.rank, reverse=True)[:keep_best]
    kept = {checkpoint.name for checkpoint in [*best, *checkpoints[-1:]]}
    for name in storage.find_folders(folder):
        if name not in kept and name < max(kept, default=""):
            uri = storage.join(folder, name)
            # The commit goes first, so that a half-deleted folder is not a checkpoint.
            storage.delete_file(storage.join(uri, _COMMIT_NAME))
            storage.delete_folder(uri)


def to_safetensors(arrays: Arrays) -> bytes:
    """Returns named arrays as one safetensors file."""
    content: bytes = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return content


def from_safetensors(content: bytes) -> Arrays:
    """Returns the named arrays of a safetensors file."""
    arrays: Arrays = safetensors.numpy.load(content)
    return arrays


def read_variables(variables: Any) -> Arrays:
    """Returns the value of each variable by name.

    Under MultiWorkerMirroredStrategy this is collective: reading a BatchNorm average communicates, so every worker must
    call it, in the same order.
    """
    arrays = {variable.name: np.asarray(variable.numpy()) for variable in variables}
    if len(arrays) != len(variables):
        raise ValueError("two variables have the same name; give the layers names that differ")
    return arrays


def assign_variables(variables: Any, arrays: Arrays) -> None:
    """Sets each variable to the array of its name.

    Raises:
        ValueError: names or shapes differ; says the first that does.
    """
    if {variable.name for variable in variables} != arrays.keys():
        difference = sorted({variable.name for variable in variables} ^ arrays.keys())
        raise ValueError(f"the checkpoint has other variables than the model: {difference[0]!r} is in one of them only")
    for variable in variables:
        array = arrays[variable.name]
        if tuple(variable.shape) != array.shape:
            raise ValueError(
                f"{variable.name} has shape {array.shape} in the checkpoint, {variable.shape} in the model"
            )
        variable.assign(array)
