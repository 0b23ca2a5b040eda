import warnings
from pathlib import Path

import pytest

from trainer.runtime import storage
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


def trial(index: int, **values) -> Trial:
    found = {"status": "completed", "objective": 0.7, "correct": 7, "total": 10, "best_step": 6, "steps": 9}
    tried = {"optimizer": "sgd", "base_learning_rate": 0.03}
    return Trial(
        **{"run_name": f"trial-{index:04d}", "kind": "search", "index": index, "values": tried, **found, **values}
    )


def read(folder: StudyFolder, name: str = "study.md") -> str:
    return storage.read_bytes(folder.path(name)).decode()


def test_the_report_begins_with_the_best_trial_and_ends_with_all(folder, study):
    worse = trial(1, objective=0.5, correct=5, values={"optimizer": "adamw", "base_learning_rate": 0.001})
    write_study_report(folder, study, [worse, trial(0), trial(2, status="failed", reason="disk full", objective=None)])
    text = read(folder)
    answer, _, evidence = text.partition("## Best for each")
    assert text.startswith(f"# {study.goal}\n")
    assert "trial-0000: val_accuracy 0.7000; accuracy: 0.7000 (7 of 10, " in answer
    assert "optimizer = sgd" in answer
    assert "trial-0002 failed: disk full" in evidence
    table = evidence.partition("## All trials")[2]
    assert [name in table for name in ("trial-0000", "trial-0001", "trial-0002")] == [True] * 3
    assert study.goal in read(folder, "study.html")
    assert {"axes.png", "best_of_k.png", "curves.png"} <= storage.find_files(folder.path("plots")).keys()


def test_a_round_without_a_result_has_a_report_without_pictures(folder, study):
    write_study_report(folder, study, [trial(0, status="failed", reason="disk full", objective=None)])
    assert "no trial has completed yet" in read(folder)
    assert "![" not in read(folder)
    assert not storage.find_files(folder.path("plots"))


def test_values_in_a_script_that_no_font_has_are_told_once_in_the_report(folder, study):
    # Cuneiform.
    scientific = {"init_from": ["/weights/\U00012000", "/weights/other"]}
    study = study.model_copy(update={"scientific": scientific, "nuisance": {}})
    values = {"init_from": "/weights/\U00012000"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_study_report(folder, study, [trial(0, values=values)])
    report = read(folder)
    assert report.count("no font on this machine has \U00012000:") == 1
