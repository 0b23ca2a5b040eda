"""The folder of one round of a study: its names and records.

STORAGE/STUDY/ROUND/study.json    the Study; a changed file starts another round
STORAGE/STUDY/ROUND/lease.json    which job works here; gone when none does
STORAGE/STUDY/ROUND/trials/       one Trial a file, named like its run, written when it starts and when it ends
STORAGE/STUDY/ROUND/RUN/          the run folder of a trial (`trainer.record.run_folder`)
STORAGE/STUDY/ROUND/study.md       the answer and its evidence; study.html and plots/ likewise
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
    """What is known of one trial."""

    run_name: str
    kind: Literal["search", "best", "incumbent"]
    """A trial of the search, or a repetition of one with another seed."""
    index: int
    """Number of the point, from 0; of a repetition, of the trial that it repeats."""
    values: dict[str, Any]
    """What it tries, by name of the option."""
    status: TrialStatus = "running"
    """infeasible: diverged, or too large for the memory; stopped: ended early, being worse than others."""
    reason: str = ""
    objective: float | None = None
    """Objective of the best checkpoint, or of the last epoch of a trial that was stopped."""
    correct: int = 0
    """Validation images that the best checkpoint classifies correctly."""
    total: int = 0
    best_step: int = 0
    """Optimizer step of the best checkpoint."""
    steps: int = 0
    seconds: float = 0.0
    """From start to end as the study saw it."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do."""
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
        """The URI of the page about the round; empty where there is none yet."""
        uri = self.path("study.html")
        return uri if storage.exists(uri) else ""

    def check_access(self) -> None:
        """Raise InputError where the storage cannot be used; nothing is left of the round that is looked at."""
        storage.check_access(storage.parent(storage.parent(self.uri)))

    def run(self, trial: Trial) -> RunFolder:
        """Return the run folder of a trial."""
        return RunFolder(self.path(trial.run_name))

    def read_study(self) -> Study | None:
        """Return the study of the round, or None where none has begun."""
        uri = self.path("study.json")
        try:
            return Study.parse(storage.read_bytes(uri), uri)
        except FileNotFoundError:
            return None
        except RecordError as error:
            raise RecordError(f"{error}; begin another round with --new-round") from error

    def write_study(self, study: Study) -> None:
        """Write ``study.json``, anew where the number of trials has grown.

        Raises:
            InputError: the round has begun with another study.
        """
        begun = self.read_study()
        if begun is not None:
            same = {name: getattr(begun, name) for name in _CHANGEABLE}
            if differences := find_differences(begun, study.model_copy(update=same)):
                raise InputError(
                    f"the round in {self.uri} has begun with another study ({'; '.join(differences)}); begin the next "
                    "one with --new-round, or undo the change"
                )
        storage.write_bytes(self.path("study.json"), study.to_json())

    def write_trial(self, trial: Trial) -> None:
        """Write what is known of a trial."""
        storage.write_bytes(self.path("trials", f"{trial.run_name}.json"), trial.to_json())

    def read_trials(self) -> list[Trial]:
        """Return the trials that have started; one whose record cannot be read has failed, for that reason."""
        found = [self._read_trial(name) for name in storage.find_files(self.path("trials"))]
        return sort_trials(trial for trial in found if trial is not None)

    def _read_trial(self, file_name: str) -> Trial | None:
        """Read the record of a trial; None where the file is not one of a trial's name."""
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
        storage_uri: where studies are kept.
        name: of the study.
        new: begin another round where there is one.
    """
    root = storage.join(storage.resolve_uri(storage_uri), name)
    rounds = find_rounds(root)
    if rounds and not new:
        return rounds[-1]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    of_today = sum(storage.basename(one.uri).startswith(today) for one in rounds)
    return StudyFolder(storage.join(root, f"{today}-{of_today + 1}"))


def find_rounds(study_uri: str) -> list[StudyFolder]:
    """Return the rounds of a study in their order."""
    names = [re.fullmatch(r"(\d{4}-\d\d-\d\d)-(\d+)", name) for name in storage.find_folders(study_uri)]
    ordered = sorted((match[1], int(match[2]), match[0]) for match in names if match)
    return [StudyFolder(storage.join(study_uri, name)) for *_, name in ordered]
