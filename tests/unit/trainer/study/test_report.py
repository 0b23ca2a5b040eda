import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.notes.run_page import PAGES_FOLDER
from trainer.record.checkpoint import PREDICTIONS_NAME, Position, save_checkpoint
from trainer.record.evaluation_result import summarise
from trainer.record.run_folder import describe_run
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
    worse = trial(1, objective=0.1, correct=1, values={"optimizer": "adamw", "base_learning_rate": 0.001})
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


@pytest.fixture
def finish(folder, make_config, make_result):
    """Return a function that finishes a trial's run, which predicts so many of the first of 100 images correctly."""

    def finish(one: Trial, chance: int = 10) -> Trial:
        run = folder.run(one)
        run.write_record(describe_run(make_config(), "1 node", command=f"python jobs/train.py {one.run_name}"))
        labels = np.array([0] * chance + [1 + row % 9 for row in range(100 - chance)])
        predicted = np.where(np.arange(100) < one.correct, labels, 10)
        columns = {"label": labels, "predicted": predicted, "loss": np.ones(100), "confidence": np.ones(100)}
        predictions = pa.table({**columns, "likelier": np.zeros(100, np.int32)})
        row = {"epoch": 7, "val_accuracy": one.correct / 100, "val_loss": 0.1}
        position = Position(epoch=7, epoch_rows=0, step=70, global_batch_size=4, history=[row])
        save_checkpoint(run.checkpoints, position, {PREDICTIONS_NAME: storage.parquet_bytes(predictions)})
        run.write_metrics([{**row, "loss": 1.0, "accuracy": 0.5}])
        names = [str(label) for label in range(11)]
        run.write_ending(make_result(val=summarise("val", predictions, names)))
        return one

    return finish


def of_hundred(index: int, correct: int, optimizer: str, seconds: float = 9) -> Trial:
    values = {"optimizer": optimizer, "base_learning_rate": 0.03}
    return trial(index, objective=correct / 100, correct=correct, total=100, values=values, seconds=seconds)


def answer_of(folder: StudyFolder) -> str:
    return read(folder).partition("\n## ")[2].partition("\n## ")[0]


def test_a_study_at_chance_has_no_answer_and_says_what_to_do(folder, study, finish):
    write_study_report(folder, study, [finish(of_hundred(0, 31, "sgd"), 30), finish(of_hundred(1, 20, "adamw"), 30)])
    answer = answer_of(folder)
    assert answer.startswith("No answer\n")
    assert "no trial is above chance: the best, trial-0000: val_accuracy 0.3100; accuracy: 0.3100 (31 of 100" in answer
    assert "against 0.30 for always predicting the most frequent class" in answer
    assert "start another round (--new-round)" in answer
    assert "optimizer = " not in answer
    assert "no trial is above chance (0.30): more trials of these ranges will not help" in read(folder)


def test_a_study_whose_best_are_tied_has_no_answer_and_names_the_fastest(folder, study, finish):
    trials = [of_hundred(0, 90, "sgd", seconds=40), of_hundred(1, 88, "adamw", seconds=34), of_hundred(2, 50, "adamw")]
    write_study_report(folder, study, [finish(one) for one in trials])
    answer = answer_of(folder)
    assert answer.startswith("No answer\n")
    assert "optimizer = sgd; base_learning_rate = 0.03" in answer
    assert "optimizer = adamw; base_learning_rate = 0.03" in answer
    assert "trial-0002" not in answer
    assert "choose by cost: trial-0001 took the least time (34 s)" in answer
    assert "python jobs/train.py trial-0001" in answer


def test_a_study_whose_best_differs_beyond_chance_has_an_answer(folder, study, finish):
    write_study_report(folder, study, [finish(of_hundred(0, 90, "sgd")), finish(of_hundred(1, 80, "adamw"))])
    answer = answer_of(folder)
    assert answer.startswith("Answer\n")
    assert "- optimizer = sgd\n" in answer
    assert "python jobs/train.py trial-0000" in answer


def test_a_page_of_a_trial_leads_back_to_its_study(folder, study, finish):
    write_study_report(folder, study, [finish(of_hundred(0, 90, "sgd"))])
    page = read(folder, f"{PAGES_FOLDER}/trial-0000.html")
    assert '<nav class="quiet"><a href="../study.html">study</a>' in page
    assert f'href="{PAGES_FOLDER}/trial-0000.html"' in read(folder, "study.html")


def test_without_predictions_the_interval_of_the_best_decides(folder, study):
    write_study_report(folder, study, [of_hundred(0, 90, "sgd"), of_hundred(1, 83, "adamw")])
    assert answer_of(folder).startswith("No answer\n")
    write_study_report(folder, study, [of_hundred(0, 90, "sgd"), of_hundred(1, 82, "adamw")])
    assert answer_of(folder).startswith("Answer\n")


def test_values_in_a_script_that_no_font_has_are_reported_once_in_the_report(folder, study):
    # Cuneiform.
    scientific = {"init_from": ["/weights/\U00012000", "/weights/other"]}
    study = study.model_copy(update={"scientific": scientific, "nuisance": {}})
    values = {"init_from": "/weights/\U00012000"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_study_report(folder, study, [trial(0, values=values)])
    report = read(folder)
    assert report.count("no font on this machine has \U00012000:") == 1
