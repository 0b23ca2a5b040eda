import json
from pathlib import Path

import pytest

from trainer.runtime import storage
from trainer.runtime.errors import InputError, RecordError
from trainer.study.file import Study
from trainer.study.folder import StudyFolder, Trial
from trainer.study.report import write_study_report

PAST = Path(__file__).parents[2] / "past_records" / "d686027"


@pytest.fixture
def study() -> Study:
    return Study.parse((PAST / "study.json").read_bytes(), "study.json")


@pytest.fixture
def folder(tmp_path) -> StudyFolder:
    return StudyFolder(str(tmp_path / "runs" / "study" / "2026-11-28-1"))


def trial(run_name: str, kind: str, index: int) -> Trial:
    values = {"optimizer": "sgd", "base_learning_rate": 0.03}
    found = {"status": "completed", "objective": 0.7, "correct": 7, "total": 10, "best_step": 6, "steps": 9}
    return Trial(run_name=run_name, kind=kind, index=index, values=values, **found)


def test_a_round_of_an_earlier_version_goes_on(folder, study):
    storage.write_bytes(folder.path("study.json"), (PAST / "study.json").read_bytes())
    storage.write_bytes(folder.path("trials", "trial-0000.json"), (PAST / "trial.json").read_bytes())
    folder.write_study(study.model_copy(update={"trials": 9}))
    assert json.loads(storage.read_bytes(folder.path("study.json")))["format"] == 1
    assert folder.read_study().trials == 9
    assert [one.correct for one in folder.read_trials()] == [51]


def test_a_trial_that_cannot_be_read_has_failed_and_the_others_are_there(folder, study):
    """One line in the report, with the reason; the file of somebody else is not looked at."""
    names = [("trial-0000", "search", 0), ("trial-0012", "search", 12), ("incumbent-seed-1", "incumbent", 0)]
    names.append(("best-0012-seed-2", "best", 12))
    for name in names:
        folder.write_trial(trial(*name))
    for name, *_ in names[1:]:
        storage.write_bytes(folder.path("trials", f"{name}.json"), b'{"format": 9}')
    storage.write_bytes(folder.path("trials", "old.json"), b"{}")
    found = folder.read_trials()
    assert [(one.run_name, one.kind, one.index) for one in found] == names
    assert [one.status for one in found] == ["completed", "failed", "failed", "failed"]
    assert all("it is of format 9" in one.reason for one in found[1:])
    write_study_report(folder, study, found)
    report = storage.read_bytes(folder.path("study.md")).decode()
    (line,) = [line for line in report.splitlines() if "trials/trial-0012.json cannot be read" in line]
    assert line.startswith("- trial-0012 failed: ")
    assert "0.7000" in report


def test_a_study_that_cannot_be_read_says_how_to_go_on(folder, study):
    storage.write_bytes(folder.path("study.json"), b'{"format": 9}')
    with pytest.raises(RecordError, match=r"it is of format 9: .*; start another round with --new-round"):
        folder.write_study(study)


def test_another_study_is_refused_with_what_differs(folder, study):
    folder.write_study(study)
    with pytest.raises(InputError, match=r"started with another study \(seed: 0 -> 1\)"):
        folder.write_study(study.model_copy(update={"seed": 1}))
