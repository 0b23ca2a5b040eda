import dataclasses
import time

import pytest

from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import LeaseLostError
from trainer.runtime.events import StudyTrialEnded, ignore_event
from trainer.runtime.lease import hold_lease
from trainer.study.file import parse_study
from trainer.study.folder import StudyFolder, Trial
from trainer.study.sweep import Outcome, _Running, _Sweep

STUDY = parse_study(
    """
goal = "Which optimizer?"
trials = 2
epochs = 10
[base]
arch = "cnn_softmax"
dataset = "/datasets/animals"
[scientific]
optimizer = ["sgd", "adamw"]
""",
    "study.toml",
)
ONE_MACHINE = Resources(num_nodes=1, num_cpus=4, num_gpus=0, free_gpus=0, devices="4 cores", node_memory_gib=16)


def test_a_study_that_was_taken_over_records_no_trial(tmp_path):
    folder = StudyFolder(str(tmp_path / "round"))
    with hold_lease(folder.path("lease.json"), "study") as lease:
        sweep = _Sweep(STUDY, folder, lease, ONE_MACHINE, retry_failed=False, max_failures=0, on_event=ignore_event)
        first, second = (Trial(run_name=f"trial-000{n}", kind="search", index=n, values={}) for n in (0, 1))
        sweep._keep(first)
        storage.delete_file(lease.uri)
        with pytest.raises(LeaseLostError):
            sweep._keep(second)
    assert folder.read_trials() == [first]


def test_a_settled_trial_is_settled_everywhere_at_once(tmp_path):
    study, folder, events = STUDY.model_copy(update={"algorithm": "tpe"}), StudyFolder(str(tmp_path / "round")), []
    outcome = Outcome("completed", objective=0.75, correct=15, total=20, best_step=40, steps=80)
    with hold_lease(folder.path("lease.json"), "study") as lease:
        sweep = _Sweep(study, folder, lease, ONE_MACHINE, retry_failed=False, max_failures=0, on_event=events.append)
        first, second = sweep.search_trials()
        for trial in (first, second):
            sweep._running[trial.run_name] = _Running(trial, f"actor of {trial.run_name}", time.monotonic() - 9)
        sweep._settle(first.run_name, outcome)

    (settled,) = folder.read_trials()
    assert settled == first.model_copy(update={**dataclasses.asdict(outcome), "seconds": settled.seconds})
    assert settled.seconds >= 9
    assert sweep.trials == [settled]
    assert list(sweep._running) == [second.run_name]
    assert sweep._idle == ["actor of trial-0000"]
    (ended,) = (event for event in events if isinstance(event, StudyTrialEnded))
    assert "val_accuracy 0.7500 (15 of 20)" in ended.outcome
    # The search takes a result once, and the trial is not run again.
    with pytest.raises(KeyError):
        sweep._search.end(0, 0.75)
    assert [trial.index for trial in sweep.search_trials()] == [1]


def test_the_best_trial_and_the_incumbent_are_repeated_with_seeds_that_have_not_ended(tmp_path):
    folder = StudyFolder(str(tmp_path / "round"))
    found = {"status": "completed", "objective": 0.75, "correct": 15, "total": 20, "best_step": 40, "steps": 80}
    trials = [
        Trial(run_name="trial-0000", kind="search", index=0, values={"optimizer": "sgd"}, status="infeasible"),
        Trial(run_name="trial-0001", kind="search", index=1, values={"optimizer": "adamw"}, **found),
        Trial(run_name="incumbent-seed-1", kind="incumbent", index=0, values={"seed": 1}, **found),
    ]
    for trial in trials:
        folder.write_trial(trial)
    with hold_lease(folder.path("lease.json"), "study") as lease:
        sweep = _Sweep(STUDY, folder, lease, ONE_MACHINE, retry_failed=False, max_failures=0, on_event=ignore_event)
        left = {one.run_name: (one.kind, one.index, one.values) for one in sweep.repetitions(2)}
    assert left == {
        "best-0001-seed-1": ("best", 1, {"optimizer": "adamw", "seed": 1}),
        "best-0001-seed-2": ("best", 1, {"optimizer": "adamw", "seed": 2}),
        "incumbent-seed-2": ("incumbent", 0, {"seed": 2}),
    }
