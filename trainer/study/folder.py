"""The folder of one round of a study: its names and records.

STORAGE/STUDY/ROUND/study.json    the Study; a changed file starts another round
STORAGE/STUDY/ROUND/lease.json    the job that works here; absent when no job does
STORAGE/STUDY/ROUND/trials/       one Trial per file, named like its run, written when it starts and when it ends
STORAGE/STUDY/ROUND/RUN/          the run folder of a trial (`trainer.record.run_folder`)
STORAGE/STUDY/ROUND/study.md      the answer and its evidence; study.html and plots/ as well
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal

from trainer.config.config import find_differences
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.errors import InputError, RecordError
from trainer.runtime.record_format import Record
from trainer.study.file import Study

TrialStatus = Literal["running", "completed", "infeasible", "stopped", "failed"]
# trial-0007, and the repetitions best-0007-seed-1 and incumbent-seed-1.
_TRIAL_NAME = re.compile(r"((trial|best|incumbent)(?:-(\d+))?(?:-seed-\d+)?)\.json")
# May grow while a round goes on.
_CHANGEABLE = {"trials", "concurrency"}


class Trial(Record):
    """The record of one trial."""

    run_name: str
    kind: Literal["search", "best", "incumbent"]
    """A trial of the search, or a repetition of one with another seed."""
    index: int
    """Number of the trial, from 0; for a repetition, that of the repeated trial."""
    values: dict[str, Any]
    """The values that it tries, by name of the option."""
    status: TrialStatus = "running"
    """infeasible: diverged, or too large for the memory; stopped: ended early because it was worse than others."""
    reason: str = ""
    objective: float | None = None
    """Objective of the best checkpoint, or of the last epoch of a trial that was stopped."""
    correct: int = 0
    """Number of validation images that the best checkpoint classifies correctly."""
    total: int = 0
    best_step: int = 0
    """Optimizer step of the best checkpoint."""
    steps: int = 0
    seconds: float = 0.0
    """Time from start to end as measured by the study."""

    @property
    def ended(self) -> bool:
        """Whether the trial is not running any more."""
        return self.status != "running"


class StudyFolder:
    """The files of one round."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def path(self, *parts: str) -> str:
        """Return the URI of a file in the folder."""
        return storage.join(self.uri, *parts)

    @property
    def report(self) -> str:
        """The URI of the page about the round; empty if there is none yet."""
        uri = self.path("study.html")
        return uri if storage.exists(uri) else ""

    def check_access(self) -> None:
        """Raise InputError if the storage cannot be used; the folder of the round is not created."""
        storage.check_access(storage.parent(storage.parent(self.uri)))

    def run(self, trial: Trial) -> RunFolder:
        """Return the run folder of a trial."""
        return RunFolder(self.path(trial.run_name))

    def read_study(self) -> Study | None:
        """Return the study of the round, or None if it has not started."""
        uri = self.path("study.json")
        try:
            return Study.parse(storage.read_bytes(uri), uri)
        except FileNotFoundError:
            return None
        except RecordError as error:
            raise RecordError(f"{error}; start another round with --new-round") from error

    def write_study(self, study: Study) -> None:
        """Write ``study.json``; replace it if the number of trials has grown.

        Raises:
            InputError: the round was started with another study.
        """
        begun = self.read_study()
        if begun is not None:
            same = {name: getattr(begun, name) for name in _CHANGEABLE}
            if differences := find_differences(begun, study.model_copy(update=same)):
                raise InputError(
                    f"the round in {self.uri} was started with another study ({'; '.join(differences)}); start the "
                    "next one with --new-round, or undo the change"
                )
        storage.write_bytes(self.path("study.json"), study.to_json())

    def write_trial(self, trial: Trial) -> None:
        """Write the record of a trial."""
        storage.write_bytes(self.path("trials", f"{trial.run_name}.json"), trial.to_json())

    def read_trials(self) -> list[Trial]:
        """Return the trials that have started; one whose record cannot be read counts as failed."""
        found = [self._read_trial(name) for name in storage.find_files(self.path("trials"))]
        return sort_trials(trial for trial in found if trial is not None)

    def _read_trial(self, file_name: str) -> Trial | None:
        """Read the record of a trial; return None if the name of the file is not that of a trial."""
        named = _TRIAL_NAME.fullmatch(file_name)
        if named is None:
            return None
        uri = self.path("trials", file_name)
        try:
            return Trial.parse(storage.read_bytes(uri), uri)
        except RecordError as error:
            run_name, kind, index = named.groups()
            of = {"run_name": run_name, "kind": "search" if kind == "trial" else kind, "index": int(index or 0)}
            return Trial.model_validate({**of, "values": {}, "status": "failed", "reason": str(error)})


def sort_trials(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials of the search by number, then the repetitions."""
    return sorted(trials, key=lambda trial: (trial.kind != "search", trial.index, trial.run_name))


def find_round(storage_uri: str, name: str, *, new: bool = False) -> StudyFolder:
    """Return the latest round of a study, or the next one.

    Args:
        storage_uri: storage of the studies.
        name: name of the study.
        new: return the next round even if there is one.
    """
    root = storage.join(storage.resolve_uri(storage_uri), name)
    rounds = find_rounds(root)
    if rounds and not new:
        return rounds[-1]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    of_today = sum(storage.basename(one.uri).startswith(today) for one in rounds)
    return StudyFolder(storage.join(root, f"{today}-{of_today + 1}"))


def find_rounds(study_uri: str) -> list[StudyFolder]:
    """Return the rounds of a study in order."""
    names = [re.fullmatch(r"(\d{4}-\d\d-\d\d)-(\d+)", name) for name in storage.find_folders(study_uri)]
    ordered = sorted((match[1], int(match[2]), match[0]) for match in names if match)
    return [StudyFolder(storage.join(study_uri, name)) for *_, name in ordered]
