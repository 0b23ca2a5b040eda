"""Studies of real runs: interrupted and continued, with trials that diverge and trials that are ended early."""

import json
from pathlib import Path

import pytest

from tests.conftest import run_job
from trainer.runtime.errors import InputError
from trainer.runtime.events import StudyTrialEnded
from trainer.runtime.lease import hold_lease
from trainer.study.file import parse_study
from trainer.study.folder import StudyFolder, Trial, find_round
from trainer.study.sweep import conclude_study, plan_study, run_study

STUDY = """
goal = "Which learning rate?"
trials = 2
epochs = 2
algorithm = "grid"

[base]
arch = "cnn_softmax"
dataset = "{dataset}"
arch_arguments = {{ first_filters = 8, later_filters = [8], dense_units = 32 }}
optimizer = "sgd"
clip_norm = 0.0
base_learning_rate = 0.05
global_batch_size = 20
precision = "float32"

[scientific]
base_learning_rate = [0.05, 1e30]
"""


@pytest.fixture
def study_text(stripes) -> str:
    return STUDY.format(dataset=stripes).replace("base_learning_rate = 0.05\n", "", 1)


def interrupt_after_the_first(event) -> None:
    if isinstance(event, StudyTrialEnded):
        raise KeyboardInterrupt


def test_an_interrupted_study_is_continued_and_answers(resources, study_text, tmp_path):
    study, folder = parse_study(study_text, "study.toml"), StudyFolder(str(tmp_path / "rates" / "2026-11-25-1"))
    with pytest.raises(KeyboardInterrupt):
        run_study(study, folder, resources, on_event=interrupt_after_the_first)
    assert [one.status for one in folder.read_trials()] == ["completed"]
    plan = plan_study(study, folder, resources)
    assert (plan.trials_left, plan.trials_per_value, plan.concurrency) == (1, 1, 1)

    events = []
    trials = run_study(study, folder, resources, on_event=events.append)
    assert [event.name for event in events if isinstance(event, StudyTrialEnded)] == ["trial-0001"]
    assert [one.status for one in trials] == ["completed", "infeasible"]
    assert "nan or inf" in trials[1].reason
    report = Path(folder.path("study.md")).read_text()
    assert "1 of 2 trials were infeasible" in report
    assert "not decided: --characterize 5" in report
    page = Path(folder.path("study.html")).read_text()
    assert "Which learning rate?" in page
    assert "http" not in page.replace("http://www.w3.org", "")

    # The command in the record of a trial makes the same run.
    record = folder.run(trials[0]).read_record()
    assert "--base-learning-rate 0.05" in record.command
    assert "--global-batch-size 20" in record.command
    assert "--epochs 2" in record.command

    # Complete: nothing is run again.
    events.clear()
    assert run_study(study, folder, resources, on_event=events.append) == trials
    assert not any(isinstance(event, StudyTrialEnded) for event in events)

    # Nor is the report lost of a job that was stopped before it wrote it.
    Path(folder.path("study.md")).unlink()
    assert conclude_study(study, folder) == trials
    assert Path(folder.path("study.md")).read_text() == report


@pytest.mark.slow
def test_a_trial_that_is_worse_than_others_is_ended_early_and_the_best_is_repeated(resources, study_text, tmp_path):
    text = study_text.replace("[0.05, 1e30]", "[0.2, 1e-9]")
    study = parse_study(text.replace("epochs = 2", 'epochs = 40\nearly_stopping = "asha"'), "study.toml")
    folder = StudyFolder(str(tmp_path / "2026-11-25-1"))
    good, bad, *repeated = run_study(study, folder, resources, characterize=1, on_event=lambda event: None)
    assert (good.status, bad.status) == ("completed", "stopped")
    assert {one.run_name: one.status for one in repeated} == {
        "best-0000-seed-1": "completed",
        "incumbent-seed-1": "completed",
    }
    assert len(folder.run(bad).read_metrics()) < 40
    assert folder.run(bad).read_result() is None


def test_a_trial_that_can_never_run_is_refused_before_any_runs(resources, study_text, tmp_path):
    study = parse_study(study_text.replace("global_batch_size = 20", "global_batch_size = 85"), "study.toml")
    with pytest.raises(InputError, match=r"trial 0: --global-batch-size 85 is more than the 84 train images"):
        plan_study(study, StudyFolder(str(tmp_path)), resources)


def test_a_study_of_another_job_or_with_other_questions_is_refused(resources, study_text, tmp_path):
    study, folder = parse_study(study_text, "study.toml"), find_round(str(tmp_path), "rates")
    folder.write_study(study)
    with hold_lease(folder.path("lease.json"), "study"), pytest.raises(InputError, match="is in use by process"):
        run_study(study, folder, resources, on_event=lambda event: None)
    folder.write_study(study.model_copy(update={"trials": 4}))
    with pytest.raises(InputError, match=r"started with another study \(seed: 0 -> 1\); .*--new-round"):
        folder.write_study(study.model_copy(update={"seed": 1}))
    assert find_round(str(tmp_path), "rates").uri == folder.uri
    assert find_round(str(tmp_path), "rates", new=True).uri == f"{folder.uri[:-1]}2"


def test_the_job_shows_what_has_run(study_text, tmp_path):
    file = tmp_path / "rates.toml"
    file.write_text(study_text)
    find_round(str(tmp_path), "rates").write_trial(
        Trial(run_name="trial-0000", kind="search", index=0, values={"base_learning_rate": 0.05}, status="failed")
    )
    status = run_job("sweep.py", str(file), "--storage", str(tmp_path), "--status", "--json")
    assert status.returncode == 0, status.stderr
    assert [trial["status"] for trial in json.loads(status.stdout)] == ["failed"]


def test_a_study_without_result_fails_each_time_and_one_with_a_result_is_shown(study_text, tmp_path):
    file = tmp_path / "rates.toml"
    file.write_text(study_text)
    command = ("sweep.py", str(file), "--storage", str(tmp_path))
    folder = find_round(str(tmp_path), "rates")
    bad = [
        Trial(
            run_name=f"trial-{index:04d}", kind="search", index=index, values={"base_learning_rate": rate}
        ).model_copy(update={"status": "failed", "reason": "disk"})
        for index, rate in enumerate((0.05, 1e30))
    ]
    for trial in bad:
        folder.write_trial(trial)
    status = run_job(*command, "--status")
    assert (status.returncode, "report" in status.stdout) == (0, False)

    again = run_job(*command)
    assert again.returncode == 1
    assert f"no trial of {folder.uri} has completed; the last one: disk" in again.stderr
    assert Path(folder.path("study.html")).exists()

    found = {"status": "completed", "objective": 0.5, "correct": 9, "total": 18, "best_step": 4, "steps": 8}
    folder.write_trial(bad[0].model_copy(update=found))
    complete = run_job(*command)
    assert complete.returncode == 0, complete.stderr
    assert complete.stdout.splitlines()[-1] == f"report  {folder.path('study.html')}"
    assert "trial-0001 failed: disk" in Path(folder.path("study.md")).read_text()
    assert not Path(folder.path("trial-0000")).exists()


def test_what_would_run_is_shown_with_its_time(resources, study_text, tmp_path):
    plan = str(plan_study(parse_study(study_text, "study.toml"), StudyFolder(str(tmp_path)), resources))
    assert "2 of 2 trials to run, 1 per scientific value, 1 at once" in plan
    assert "predicted: 1 minute" in plan
