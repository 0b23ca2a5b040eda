"""The checkpoint format: resumable, complete or invisible, and loaded without running code from a file.

    RUN/checkpoints/step-00000327-attempt-0002/
        model.safetensors      weights by variable name
        optimizer.safetensors  optimizer state by variable name
        steps.parquet          loss, gradient norm, ... of each optimizer step so far
        predictions.parquet    validation: label, predicted, confidence, ... of each row; at the end of an epoch only
        checkpoint.json        written last: epoch, step, metrics so far, SHA-256 of the files

A folder without ``checkpoint.json`` is not a checkpoint. Nothing else is consulted: the last checkpoint and the best
ones are found by listing. A damaged one is set aside (`find_whole`): what ``checkpoint.json`` held is in
``damaged.json`` then, with what is wrong, and the folder stays to be looked at.

A killed driver may leave workers that write on beside those of the next one, and an object store has neither a lock nor
a conditional delete. Nothing that such a stale writer does, at whatever time, reaches what a later attempt has or will
read:

* Its files have names of their own, for its attempt is in them.
* What it commits does not count. Each checkpoint says from which checkpoint of each earlier attempt it goes on
  (`Position.lineage`); as soon as the latest attempt has one, those of earlier attempts that came after are left out.
* It deletes nothing that is needed. An attempt announces itself before it looks for the last checkpoint. A writer
  deletes what it listed after a commit and before it saw that no later attempt was announced: such an attempt has seen
  that commit, and takes none of the older checkpoints that the writer does not keep.

What is left: until the later attempt has committed its first checkpoint, what the stale one commits is taken for the
last of the run. It is whole and it is of this run, so an attempt that goes on from it is right, too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from trainer.runtime import storage
from trainer.runtime.errors import DamagedError, InputError, NewerFormatError, RecordError
from trainer.runtime.markdown import shorten_digest
from trainer.runtime.record_format import Record

Arrays = dict[str, npt.NDArray[Any]]

_COMMIT_NAME = "checkpoint.json"
_DAMAGED_NAME = "damaged.json"
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
        # Attempts were not told apart.
        "attempt": 0,
        "lineage": (),
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
    attempt: int = 0
    """Which start of the workers wrote it, from 1; 0 where that is not known."""
    lineage: tuple[tuple[int, int], ...] = ()
    """Attempt and step of the checkpoint that each earlier attempt had come to when the next one went on from it."""


class Checkpoint(Position):
    """What ``checkpoint.json`` holds."""

    # 2: its attempt is in the name of its folder.
    FORMAT: ClassVar[int] = 2

    sha256: dict[str, str]
    """Of each other file of the checkpoint."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return checkpoint_name(self.step, self.attempt)

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


def checkpoint_name(step: int, attempt: int = 0) -> str:
    """Return the folder name of the checkpoint of an attempt after a number of optimizer steps."""
    return f"step-{step:08d}" + (f"-attempt-{attempt:04d}" if attempt else "")


def _parse_name(name: str) -> tuple[int, int] | None:
    """Return step and attempt of a folder name, or None where it is not a checkpoint's."""
    match = re.fullmatch(r"step-(\d{8,})(?:-attempt-(\d{4,}))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def save_checkpoint(
    folder: str, position: Position, files: dict[str, bytes], check_owner: Callable[[], None] = lambda: None
) -> Checkpoint:
    """Write one checkpoint below ``folder``; it appears when all its files are there.

    Args:
        folder: of the checkpoints.
        position: of the run.
        files: content by name.
        check_owner: raises where a later attempt writes the run; asked directly before the commit.
    """
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    checkpoint = Checkpoint(**position.model_dump(), sha256=sha256)
    uri = storage.join(folder, checkpoint.name)
    for name, content in files.items():
        storage.write_bytes(storage.join(uri, name), content)
    check_owner()
    storage.write_bytes(storage.join(uri, _COMMIT_NAME), checkpoint.to_json())
    return checkpoint


def find_checkpoints(folder: str) -> list[Checkpoint]:
    """Return the complete checkpoints that the latest attempt has written or goes on from, by step.

    One whose commit cannot be read is left out.

    Raises:
        NewerFormatError: one is of a newer version of this program.
    """
    checkpoints = []
    for name in filter(_parse_name, storage.find_folders(folder)):
        try:
            checkpoints.append(_read_commit(folder, name))
        except NewerFormatError:
            raise
        except (FileNotFoundError, RecordError):
            continue
    return sorted(_keep_lineage(checkpoints), key=lambda checkpoint: checkpoint.step)


def _read_commit(folder: str, name: str) -> Checkpoint:
    uri = storage.join(folder, name, _COMMIT_NAME)
    checkpoint = Checkpoint.parse(storage.read_bytes(uri), uri)
    if checkpoint.name != name:
        raise RecordError(f"{uri} is that of {checkpoint.name}")
    return checkpoint


def _keep_lineage(found: list[Checkpoint]) -> list[Checkpoint]:
    """Leave out what earlier attempts wrote after the latest one had gone on from before it."""
    latest = max(found, key=lambda one: one.attempt, default=None)
    if latest is None:
        return []
    last_steps = dict(latest.lineage)
    return [one for one in found if one.attempt == latest.attempt or one.step <= last_steps.get(one.attempt, -1)]


def find_latest_attempt(folder: str) -> int:
    """Return the highest number of an attempt that has begun to write a checkpoint, or 0."""
    parsed = map(_parse_name, storage.find_folders(folder))
    return max((attempt for _, attempt in filter(None, parsed)), default=0)


def find_last(folder: str) -> Checkpoint | None:
    """Returns the checkpoint with the most steps, or None where there are none."""
    found = find_checkpoints(folder)
    return found[-1] if found else None


def find_best(folder: str) -> Checkpoint | None:
    """Returns the best checkpoint by validation, or None where there are none."""
    evaluated = [checkpoint for checkpoint in find_checkpoints(folder) if checkpoint.is_evaluated]
    return max(evaluated, key=lambda checkpoint: checkpoint.rank, default=None)


def find_named(folder: str, name: str) -> Checkpoint:
    """Return the checkpoint of a name.

    Raises:
        DamagedError: its commit cannot be read; says what to do.
        InputError: there is none, or it is not complete; says what to do.
    """
    try:
        return _read_commit(folder, name)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no complete checkpoint {name}; {_describe_remedy(folder)}") from error
    except NewerFormatError:
        raise
    except RecordError as error:
        raise DamagedError(f"{error}; {_describe_remedy(folder)}") from error


def _describe_remedy(folder: str) -> str:
    run = storage.parent(folder)
    return (
        f"to go on with those of its checkpoints that are whole, delete {run}/result.json, if there is one, and give "
        "the run's training command again"
    )


def read_file(folder: str, checkpoint: Checkpoint, name: str) -> bytes:
    """Return one file of a checkpoint.

    Raises:
        DamagedError: it is not the file that was written; says what to do.
        InputError: the checkpoint has none of that name.
    """
    if name not in checkpoint.sha256:
        raise InputError(
            f"{folder}: checkpoint {checkpoint.name} has no {name}: an earlier version of this program wrote it; train "
            "under another --run-name"
        )
    try:
        return _read_whole(folder, checkpoint, name)
    except DamagedError as error:
        raise DamagedError(f"{error}; {_describe_remedy(folder)}") from error


def _read_whole(folder: str, checkpoint: Checkpoint, name: str) -> bytes:
    uri = storage.join(folder, checkpoint.name, name)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise DamagedError(f"{uri} is missing") from error
    digest, written = hashlib.sha256(content).hexdigest(), checkpoint.sha256[name]
    if digest != written:
        raise DamagedError(
            f"{uri} is damaged: its {len(content)} bytes have sha256 {shorten_digest(digest)}, {_COMMIT_NAME} says "
            f"{shorten_digest(written)}"
        )
    return content


def find_whole(
    folder: str, find: Callable[[str], Checkpoint | None], check_owner: Callable[[], None] = lambda: None
) -> tuple[Checkpoint | None, list[str]]:
    """Return a checkpoint all of whose files are as they were written, and what was wrong with better ones.

    Those are set aside: they are no checkpoints any more, and stay to be looked at. Only for the writer of a run.

    Args:
        folder: of the checkpoints.
        find: `find_last` or `find_best`.
        check_owner: raises where a later attempt writes the run.

    Returns:
        The checkpoint, or None where no whole one is left; and a line for each one that was set aside.
    """
    damaged, lines = _find_unreadable(folder), list[str]()
    while True:
        for name, reason in damaged.items():
            check_owner()
            _set_aside(folder, name, reason)
        lines = [*lines, *damaged.values()]
        checkpoint = find(folder)
        if checkpoint is None or not (reason := _find_damage(folder, checkpoint)):
            return checkpoint, lines
        damaged = {checkpoint.name: reason}


def _find_unreadable(folder: str) -> dict[str, str]:
    """Return what is wrong with each commit that cannot be read, by the name of its folder."""
    damaged = {}
    for name in filter(_parse_name, storage.find_folders(folder)):
        try:
            _read_commit(folder, name)
        except (FileNotFoundError, NewerFormatError):
            continue
        except RecordError as error:
            damaged[name] = str(error)
    return damaged


def _find_damage(folder: str, checkpoint: Checkpoint) -> str:
    """Return what is wrong with a file of a checkpoint; empty where all are whole."""
    for name in checkpoint.sha256:
        try:
            _read_whole(folder, checkpoint, name)
        except DamagedError as error:
            return str(error)
    return ""


def _set_aside(folder: str, name: str, reason: str) -> None:
    commit, damaged = (storage.join(folder, name, one) for one in (_COMMIT_NAME, _DAMAGED_NAME))
    content = {"reason": reason, _COMMIT_NAME: storage.read_bytes(commit).decode(errors="replace")}
    storage.write_bytes(damaged, json.dumps(content, indent=2).encode())
    # Not renamed or copied: an object store cannot rename, and weights may be large.
    storage.delete_file(commit)


def delete_old_checkpoints(folder: str, keep_best: int, check_owner: Callable[[], None] = lambda: None) -> None:
    """Delete all but the last checkpoint and the best ones, and what a killed writer has left of older ones.

    Damaged ones that were set aside stay.

    Args:
        folder: of the checkpoints.
        keep_best: how many of the best ones are kept.
        check_owner: raises where a later attempt writes the run; asked when it is known what is to be deleted.
    """
    names = [(parsed, name) for name in storage.find_folders(folder) if (parsed := _parse_name(name))]
    checkpoints = find_checkpoints(folder)
    evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.is_evaluated]
    best = sorted(evaluated, key=lambda checkpoint: checkpoint.rank, reverse=True)[:keep_best]
    kept = {(checkpoint.step, checkpoint.attempt) for checkpoint in [*best, *checkpoints[-1:]]}
    old = [name for parsed, name in names if parsed not in kept and parsed < max(kept, default=(0, 0))]
    old = [name for name in old if not storage.exists(storage.join(folder, name, _DAMAGED_NAME))]
    check_owner()
    for name in old:
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
