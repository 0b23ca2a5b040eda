"""The record of an incident: the loss of a run's workers, or damage to its files, which the run survived."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Literal

from trainer.runtime.record_format import Record

_LOST: Literal["workers lost"] = "workers lost"
_DAMAGED: Literal["files damaged"] = "files damaged"


class Incident(Record):
    """One incident of a run."""

    # Earlier versions had two records: one for lost workers, with the number of the attempt, and one for damage.
    RENAMED: ClassVar[Mapping[str, str]] = {"ended": "at", "reason": "what"}
    ADDED: ClassVar[Mapping[str, Any]] = {"kind": lambda old: _LOST if "attempt" in old else _DAMAGED, "attempt": 0}

    kind: Literal["workers lost", "files damaged"]
    attempt: int
    """Number of the last attempt that had started; 0 if none had, or if it was not recorded."""
    at: datetime
    what: str
    """Which worker was lost, and how it ended; or which files are damaged, and what is used instead."""
    log: str = ""
    """The file in the run folder with the end of a lost worker's output; empty if there is none."""
    next_step: int | None = None
    """Number of optimizer steps that the attempt after a loss resumed after; None if there was none."""

    def __str__(self) -> str:
        if self.kind == _DAMAGED:
            return f"recovered at {self.at.isoformat(timespec='seconds')}: {self.what}"
        log = f" ({self.log})" if self.log else ""
        went_on = "" if self.next_step is None else f"; the run continued after step {self.next_step}"
        return f"attempt {self.attempt} was lost: {self.what}{log}{went_on}"


def find_former_incidents(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the incidents in the ``result.json`` of an earlier version, which had two lists of them.

    Args:
        result: the fields of the record.

    Returns:
        The fields of each `Incident`, in the order of their times.
    """
    damaged = [recovery.partition(": ") for recovery in result.get("recoveries", ())]
    incidents = [{"at": at, "what": what} for at, _, what in damaged]
    return sorted([*incidents, *result.get("lost_attempts", ())], key=lambda one: one.get("at") or one["ended"])
