"""The checkpoint format: resumable, either complete or invisible, and loaded without running code from a file.

    RUN/checkpoints/step-00000327-attempt-0002/
        model.safetensors      weights by variable name
        optimizer.safetensors  optimizer state by variable name
        steps.parquet          loss, gradient norm, ... of each optimizer step so far
        predictions.parquet    validation: label, predicted, confidence, ... of each row; at the end of an epoch only
        val_losses.parquet     validation: the sum of the losses of each row so far, and of how many epochs
        checkpoint.json        written last: epoch, step, metrics so far, SHA-256 of the files

A folder without ``checkpoint.json`` is not a checkpoint. The last checkpoint and the best ones are found by listing the
folders; nothing else records them. A damaged checkpoint is set aside (`find_whole`): ``damaged.json`` then holds the
content of ``checkpoint.json`` and what is wrong, and the folder stays for inspection.

A killed driver may leave workers that keep writing beside those of the next driver, and an object store has neither a
lock nor a conditional delete. Nothing that such a stale writer does, at any time, affects what a later attempt has read
or will read:

* Its files have names of their own, which contain its attempt.
* Its commits do not count. Each checkpoint records which checkpoint of each earlier attempt it continues
  (`Position.lineage`); as soon as the latest attempt has one, later checkpoints of earlier attempts are ignored.
* It deletes nothing that is needed. An attempt announces itself before it looks for the last checkpoint. A writer
  deletes only what it listed after a commit and before it saw that no later attempt was announced. An attempt that is
  announced after that has seen the commit, and uses none of the older checkpoints that the writer does not keep.

One case remains: until the later attempt has committed its first checkpoint, a commit of the stale one counts as the
last checkpoint of the run. It is complete and belongs to this run, so an attempt that continues it is correct, too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from trainer.record.epoch_row import Metrics
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
VAL_LOSSES_NAME = "val_losses.parquet"


class Position(Record):
    """How far a run has progressed."""

    ADDED: ClassVar[Mapping[str, Any]] = {
        # Checkpoints were written at the end of an epoch only.
        "epoch_rows": 0,
        # Unknown: the schedule resumes where as many epochs with the current batch would have ended.
        "global_batch_size": 0,
        # Attempts were not distinguished.
        "attempt": 0,
        "lineage": (),
    }

    epoch: int
    """Number of finished epochs."""
    epoch_rows: int
    """Number of rows of the next epoch's order that were trained on; 0 at the end of an epoch."""
    step: int
    """Number of optimizer steps taken."""
    global_batch_size: int
    """Global batch size of the last step."""
    history: list[Metrics]
    """One row of metrics per finished epoch, so that no epoch counts twice after a restart: see `EpochRow`."""
    attempt: int = 0
    """Which start of the workers wrote it, from 1; 0 if unknown."""
    lineage: tuple[tuple[int, int], ...] = ()
    """Attempt and step of the checkpoint of each earlier attempt that the next attempt continued."""


class Checkpoint(Position):
    """What ``checkpoint.json`` holds."""

    # 2: the name of its folder contains the attempt.
    FORMAT: ClassVar[int] = 2

    sha256: dict[str, str]
    """SHA-256 of each other file of the checkpoint, by name."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return checkpoint_name(self.step, self.attempt)

    @property
    def is_evaluated(self) -> bool:
        """Whether the last row of metrics describes its weights, which holds at the end of an epoch."""
        return self.epoch_rows == 0

    @property
    def rank(self) -> tuple[float, float, int]:
        """The sort key; larger is better: higher validation accuracy, then lower validation loss, then earlier."""
        return rank_epoch(self.history[-1])


def rank_epoch(row: Metrics) -> tuple[float, float, int]:
    """Return the sort key of one epoch's metrics; larger is better."""
    return (row["val_accuracy"], -row["val_loss"], -int(row["epoch"]))


def checkpoint_name(step: int, attempt: int = 0) -> str:
    """Return the folder name of the checkpoint of an attempt after a number of optimizer steps."""
    return f"step-{step:08d}" + (f"-attempt-{attempt:04d}" if attempt else "")


def _parse_name(name: str) -> tuple[int, int] | None:
    """Return step and attempt of a folder name, or None if it is not a checkpoint's."""
    match = re.fullmatch(r"step-(\d{8,})(?:-attempt-(\d{4,}))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def save_checkpoint(
    folder: str, position: Position, files: dict[str, bytes], check_owner: Callable[[], None] = lambda: None
) -> Checkpoint:
    """Write one checkpoint below ``folder``; it becomes visible when all its files are written.

    Args:
        folder: the folder of the checkpoints.
        position: how far the run has progressed.
        files: content by name.
        check_owner: raises if a later attempt writes the run; called right before the commit.
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
    """Return the complete checkpoints that the latest attempt has written or continues, by step.

    A checkpoint whose ``checkpoint.json`` cannot be read is ignored.

    Raises:
        NewerFormatError: a newer version of this program wrote one of them.
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
    """Leave out what an earlier attempt wrote after the checkpoint that the next attempt continued."""
    latest = max(found, key=lambda one: one.attempt, default=None)
    if latest is None:
        return []
    last_steps = dict(latest.lineage)
    return [one for one in found if one.attempt == latest.attempt or one.step <= last_steps.get(one.attempt, -1)]


def find_latest_attempt(folder: str) -> int:
    """Return the highest number of an attempt that has started to write a checkpoint, or 0."""
    parsed = map(_parse_name, storage.find_folders(folder))
    return max((attempt for _, attempt in filter(None, parsed)), default=0)


def find_last(folder: str) -> Checkpoint | None:
    """Return the checkpoint with the most steps, or None if there are none."""
    found = find_checkpoints(folder)
    return found[-1] if found else None


def find_best(folder: str) -> Checkpoint | None:
    """Return the best checkpoint by validation, or None if there are none."""
    evaluated = [checkpoint for checkpoint in find_checkpoints(folder) if checkpoint.is_evaluated]
    return max(evaluated, key=lambda checkpoint: checkpoint.rank, default=None)


def find_epoch(folder: str, epoch: int) -> Checkpoint | None:
    """Return the checkpoint at the end of an epoch, or None if there is none."""
    found = [one for one in find_checkpoints(folder) if one.is_evaluated and one.epoch == epoch]
    return found[-1] if found else None


def find_named(folder: str, name: str) -> Checkpoint:
    """Return the checkpoint with a name.

    Raises:
        DamagedError: its ``checkpoint.json`` cannot be read; the message says what to do.
        InputError: there is none, or it is not complete; the message says what to do.
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
        f"to continue from an intact checkpoint, delete {run}/result.json, if there is one, and give the training "
        "command of the run again"
    )


def read_file(folder: str, checkpoint: Checkpoint, name: str) -> bytes:
    """Return one file of a checkpoint.

    Raises:
        DamagedError: it is not the file that was written; the message says what to do.
        InputError: the checkpoint has no file with that name.
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
    """Return the first checkpoint whose files are all intact, and what is wrong with those that were preferred.

    These are set aside: they no longer count as checkpoints, and stay for inspection. Only the writer of a run may call
    this.

    Args:
        folder: the folder of the checkpoints.
        find: `find_last` or `find_best`.
        check_owner: raises if a later attempt writes the run.

    Returns:
        The checkpoint, or None if no intact one is left; and one line for each checkpoint that was set aside.
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
    """Return what is wrong with each ``checkpoint.json`` that cannot be read, by the name of its folder."""
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
    """Return what is wrong with a file of a checkpoint; empty if all are intact."""
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


def delete_old_checkpoints(
    folder: str,
    keep_best: int,
    check_owner: Callable[[], None] = lambda: None,
    needed_epochs: Collection[int] = (),
) -> None:
    """Delete all checkpoints but the last, the best and the needed ones, and incomplete older ones of killed writers.

    Damaged ones that were set aside stay.

    Args:
        folder: the folder of the checkpoints.
        keep_best: how many of the best ones are kept.
        check_owner: raises if a later attempt writes the run; called after the list of what to delete is made.
        needed_epochs: epochs whose checkpoints are kept because others may start from them.
    """
    names = [(parsed, name) for name in storage.find_folders(folder) if (parsed := _parse_name(name))]
    checkpoints = find_checkpoints(folder)
    evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.is_evaluated]
    best = sorted(evaluated, key=lambda checkpoint: checkpoint.rank, reverse=True)[:keep_best]
    needed = [checkpoint for checkpoint in evaluated if checkpoint.epoch in needed_epochs]
    kept = {(checkpoint.step, checkpoint.attempt) for checkpoint in [*best, *needed, *checkpoints[-1:]]}
    old = [name for parsed, name in names if parsed not in kept and parsed < max(kept, default=(0, 0))]
    old = [name for name in old if not storage.exists(storage.join(folder, name, _DAMAGED_NAME))]
    check_owner()
    for name in old:
        uri = storage.join(folder, name)
        # Delete the commit first, so that a half-deleted folder is not a checkpoint.
        storage.delete_file(storage.join(uri, _COMMIT_NAME))
        storage.delete_folder(uri)


def to_safetensors(arrays: Arrays) -> bytes:
    """Return named arrays as one safetensors file."""
    content: bytes = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return content


def from_safetensors(content: bytes) -> Arrays:
    """Return the named arrays of a safetensors file."""
    arrays: Arrays = safetensors.numpy.load(content)
    return arrays


def read_variables(variables: Any) -> Arrays:
    """Return the value of each variable by name.

    Under MultiWorkerMirroredStrategy this is collective: reading a BatchNorm average communicates, so every worker must
    call it, in the same order.
    """
    arrays = {variable.name: np.asarray(variable.numpy()) for variable in variables}
    if len(arrays) != len(variables):
        raise ValueError("two variables have the same name; give the layers names that differ")
    return arrays


def assign_variables(variables: Any, arrays: Arrays) -> None:
    """Set each variable to the array with its name.

    Raises:
        ValueError: names or shapes differ; the message names the first difference.
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
