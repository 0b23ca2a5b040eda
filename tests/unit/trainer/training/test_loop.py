import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.conftest import OnDevice
from trainer.config.config import TrainConfig
from trainer.record import checkpoint as checkpoints
from trainer.record.checkpoint import Position
from trainer.record.epoch_row import EpochRow, main_path
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.errors import LeaseLostError
from trainer.runtime.events import EpochFinished, ignore_event
from trainer.training.augment import PARTS
from trainer.training.job import WorkerJob
from trainer.training.loop import (
    STEPS_SCHEMA,
    DivergedError,
    _check_finite,
    _find_best,
    _find_last,
    _finite_mean,
    _steps_table,
    _Training,
    _upgrade_steps,
    _write_checkpoint,
)

FINITE, NOT_FINITE = [1.0, 0.5, 2.0, 0.0, 0.1], [np.nan, 0.5, 2.0, 0.0, 0.1]


def test_a_step_without_a_finite_loss_stops_training_and_the_message_says_between_which_steps():
    assert _check_finite(np.float32([FINITE] * 51), 5, 0, precision="float32") == 55
    # Only the last step was looked at, and before it step 54.
    with pytest.raises(DivergedError, match=r"in one of the steps 55 to 56$"):
        _check_finite(np.float32([NOT_FINITE]), 56, 54, precision="float32")
    # A checkpoint has taken those before to the table.
    with pytest.raises(DivergedError, match=r"in step 56$"):
        _check_finite(np.float32([NOT_FINITE]), 56, 55, precision="float32")


def test_a_step_that_is_not_finite_is_found_though_those_after_it_are():
    # Continued by fewer workers, of an epoch less than a batch may be left.
    assert _check_finite(np.empty((0, 5), np.float32), 5, 4, precision="float32") == 4
    with pytest.raises(DivergedError, match=r"in step 7$"):
        _check_finite(np.float32([FINITE] * 2 + [NOT_FINITE] + [FINITE] * 3), 5, 4, precision="float32")


def test_an_overflow_of_the_gradient_is_an_error_unless_loss_scaling_takes_care_of_it():
    rows = np.float32([[1.0, 0.5, np.inf, 0.0, 0.1]])
    assert _check_finite(rows, 1, 0, precision="mixed_float16") == 1
    with pytest.raises(DivergedError, match=r"in step 1$"):
        _check_finite(rows, 1, 0, precision="float32")


def test_steps_are_numbered_from_those_before_and_the_mean_leaves_out_overflows():
    table = _steps_table(np.float32([[1.0, 0.5, norm, 0.0, np.nan] for norm in (2.0, np.inf, 4.0)]), taken_before=7)
    assert table.schema == STEPS_SCHEMA
    assert table["step"].to_pylist() == [8, 9, 10]
    assert _finite_mean(table["grad_norm"]) == 3.0


def test_steps_of_an_earlier_version_have_nan_where_nothing_was_measured():
    earlier = _steps_table(np.float32([FINITE]), taken_before=0)
    upgraded = _upgrade_steps(earlier.drop_columns(["grad_noise"]))
    assert upgraded.schema == STEPS_SCHEMA
    assert np.isnan(upgraded["grad_noise"].to_numpy()).all()
    assert _upgrade_steps(earlier).equals(earlier)


@pytest.fixture
def start(write_dataset, make_config, tmp_path):
    """Return a function that starts or continues a run of one worker, and returns it and its events."""
    dataset = write_dataset(rows=(14, 5, 1), image_size=22)

    def start(name: str = "run", **values) -> tuple[RunFolder, _Training, list]:
        config = make_config(
            **{
                "arch_arguments": {"first_filters": 3, "later_filters": [4], "dense_units": 8},
                "dataset": dataset.uri,
                "global_batch_size": 4,
                "epochs": 1,
                "ema_momentum": 0.5,
                "optimizer": "sgd",
                **values,
            }
        )
        run, events = RunFolder(str(tmp_path / name)), []
        job = WorkerJob(config, dataset.manifest, run.uri, None, (), 0, None, events.append)
        attempt = run.start_attempt()
        return run, _Training(job, run, config, 0, attempt, checkpoints.find_last(run.checkpoints)), events

    return start


def test_an_epoch_leaves_its_metrics_and_the_next_attempt_goes_on_from_the_same_weights(start):
    run, training, events = start()
    assert training.run() == ""
    (row,), last = run.read_metrics(), checkpoints.find_last(run.checkpoints)
    (event,) = (event for event in events if isinstance(event, EpochFinished))
    assert list(row) == [field.name for field in dataclasses.fields(EpochRow)]
    assert event.row == pytest.approx(row, abs=0, nan_ok=True)
    assert [row[name] for name in ("epoch", "step", "attempt", "global_batch_size")] == [1, 3, 1, 4]
    assert row["loss"] == pytest.approx(np.mean(run.read_steps()["loss"].to_numpy()))
    predictions = storage.parquet_table(checkpoints.read_file(run.checkpoints, last, checkpoints.PREDICTIONS_NAME))
    assert row["val_loss"] == pytest.approx(predictions["loss"].to_numpy().mean())
    # The weights, and not their averages, which are what was validated.
    trained = checkpoints.read_variables(training.network.model.variables)
    averages = checkpoints.from_safetensors(checkpoints.read_file(run.checkpoints, last, checkpoints.MODEL_NAME))
    assert any(not np.array_equal(trained[name], averages[name]) for name in trained)
    _, continued, _ = start()
    for of_first, of_second in (
        (training.network.model.variables, continued.network.model.variables),
        (training.network.optimizer_variables, continued.network.optimizer_variables),
    ):
        arrays, others = checkpoints.read_variables(of_first), checkpoints.read_variables(of_second)
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)


class StoppedError(Exception):
    """Ends an attempt as if its worker had died."""


STAGED = {
    "schedule": "plateau",
    "epochs": 26,
    "patience": 3,
    "augment": "auto",
    "augment_rotation": 90.0,
    "augment_translation": 0.3,
    "base_learning_rate": 3.0,
    "checkpoint_every": 1,
    "ema_momentum": 0.0,
}
# Of what an epoch did, all but seconds and the like.
DONE = ("epoch", "step", "stage", "augmentation", "started_from", "loss", "val_loss", "val_accuracy", "learning_rate")


def train_in_attempts(start, name: str, stops: list[int], **values) -> tuple[list, dict, np.ndarray]:
    """Train a run whose attempts end before the given numbers of steps; return its history, last weights and losses."""
    for stop in [*stops, math.inf]:
        run, training, _ = start(name, **{**STAGED, **values})

        def take(images, labels, number, stop=stop, take=training._take):
            if number < stop <= number + len(images):
                raise StoppedError
            return take(images, labels, number)

        training._take = take
        with contextlib.suppress(StoppedError):
            training.run()
    history = run.read_metrics()
    # The optimizer's state is that of the epochs that led to its weights.
    taken = sum(row["step"] - _step_before(row, history) for row in main_path(history))
    assert training.network.optimizer.iterations.numpy() == taken
    weights = checkpoints.read_variables(training.network.model.variables)
    return [{key: row[key] for key in DONE} for row in history], weights, training.mean_losses


def _step_before(row: dict, history: list[dict]) -> int:
    return history[row["epoch"] - 2]["step"] if row["epoch"] > 1 else 0


@pytest.mark.parametrize("trial_steps", [200, 2])
def test_a_run_goes_through_its_stages_alike_wherever_it_was_interrupted(start, monkeypatch, trial_steps):
    monkeypatch.setattr("trainer.training.stages._LEAST_STEPS", 3)
    monkeypatch.setattr("trainer.training.stages._TRIAL_STEPS", trial_steps)
    # There is one worker, and Ray refuses to speak outside of its workers.
    monkeypatch.setattr("trainer.training.loop.broadcast_from_rank_zero", lambda value: value)
    undisturbed, weights, mean_losses = train_in_attempts(start, "undisturbed", [])
    assert mean_losses.mean() == pytest.approx(np.mean([row["val_loss"] for row in undisturbed]))
    assert {row["stage"] for row in undisturbed} >= {"plain", "trial", "train", "decay"}
    branches = [row["epoch"] for row in undisturbed if row["started_from"] != row["epoch"] - 1]
    assert len(branches) >= 4
    # An epoch has three steps, or a trial's fewer.
    for row in undisturbed:
        most = trial_steps if row["stage"] == "trial" else 3
        assert row["step"] - _step_before(row, undisturbed) == min(3, most)
    # Within an epoch of `plain`; in a trial's first step and within it; in the first step of `train` and of `decay`.
    firsts = [_step_before(row, undisturbed) + 1 for row in undisturbed]
    stages = [row["stage"] for row in undisturbed]
    stops = [5, firsts[branches[1] - 1], firsts[branches[2] - 1] + 1]
    stops += [firsts[stages.index("train")], firsts[stages.index("decay")]]
    history, resumed, of_resumed = train_in_attempts(start, "interrupted", stops)
    assert history == undisturbed
    np.testing.assert_array_equal(of_resumed, mean_losses)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_a_run_with_several_steps_in_a_call_is_one_with_single_steps_and_so_is_its_resumption(
    start, monkeypatch, tmp_path
):
    # In the middle of an epoch, and of what a call would take.
    for module in ("noise", "loop"):
        monkeypatch.setattr(f"trainer.training.{module}.FIRST_STEP", 7)
    values = {"schedule": "constant", "augment": "all", "epochs": 3, "patience": 0, "checkpoint_every": 5}
    single, weights, _ = train_in_attempts(start, "single", [], **values)
    several, of_several, _ = train_in_attempts(start, "several", [6], **values, steps_per_execution=3)
    assert several == single
    for name, array in weights.items():
        np.testing.assert_array_equal(of_several[name], array, err_msg=name)
    steps, others = (RunFolder(str(tmp_path / name)).read_steps() for name in ("single", "several"))
    for column in STEPS_SCHEMA.names:
        np.testing.assert_array_equal(others[column].to_numpy(), steps[column].to_numpy(), err_msg=column)
    assert np.flatnonzero(np.isfinite(steps["grad_noise"].to_numpy())).tolist() == [7]


def test_no_step_is_waited_for_before_the_next_one_is_on_the_device(start, monkeypatch):
    monkeypatch.setattr("trainer.training.loop._STEPS_BETWEEN_FINITE_CHECKS", 1)
    monkeypatch.setattr("trainer.training.loop._PROGRESS_INTERVAL_SECONDS", math.inf)
    _, training, _ = start()
    take, taken, copies = training._take, [], []

    def take_on_device(images, labels, number):
        taken.append(number)
        return OnDevice(take(images, labels, number), lambda: copies.append((number, taken[-1])))

    training._take = take_on_device
    training.run()
    # Of each step, to see whether it is finite, when the next one has been taken. At the end of the epoch all of them
    # come together in one more copy, which is of a tensor on the device.
    assert copies == [(0, 1), (1, 2)]


def test_a_call_ends_where_something_is_done_after_a_step_or_before_the_next(start):
    _, training, _ = start(checkpoint_every=40, steps_per_execution=30)
    calls = [(one.start, one.stop) for one in training._plan_calls(first_step=100, num_steps=75)]
    # Checkpoints after 120 and 160 steps, the loss after 50 of an epoch; the noise is of step number 160, from 0.
    assert calls == [(0, 20), (20, 50), (50, 60), (60, 75)]
    training._job = dataclasses.replace(training._job, profile_steps=10)
    assert [len(one) for one in training._plan_calls(first_step=100, num_steps=5)] == [1] * 5


# The first epoch is the best.
ACCURACIES = [0.9, 0.5, 0.6, 0.7]


def write(run: RunFolder, config: TrainConfig, epoch: int, step: int, attempt: int, lineage=()) -> None:
    """Write the checkpoint of an epoch, and all that goes with it, as rank 0 does."""
    job = WorkerJob(config, None, run.uri, run.lease, (), 0, None, ignore_event)
    rows = enumerate(ACCURACIES[:epoch], start=1)
    history = [{"epoch": n, "val_accuracy": one, "val_loss": 1.0, "attempt": attempt} for n, one in rows]
    position = Position(
        epoch=epoch,
        epoch_rows=0,
        step=step,
        global_batch_size=4,
        history=history,
        attempt=attempt,
        lineage=lineage,
    )
    arrays = {checkpoints.MODEL_NAME: {"kernel": np.full(3, epoch, np.float32)}}
    _write_checkpoint(job, run, position, arrays, {checkpoints.STEPS_NAME: STEPS_SCHEMA.empty_table()})


def read_all(run: RunFolder, checkpoint: checkpoints.Checkpoint) -> None:
    for name in checkpoint.sha256:
        checkpoints.read_file(run.checkpoints, checkpoint, name)


STORAGE_CALLS = (
    "read_bytes",
    "write_bytes",
    "create_file",
    "find_files",
    "find_folders",
    "delete_file",
    "delete_folder",
)


@contextlib.contextmanager
def interruption(call_number: int, interrupt: Callable[[], None]) -> Iterator[None]:
    """Call a function once, before the call to the storage of this number."""
    numbers = itertools.count()

    def count(function):
        def call(*arguments, **options):
            if next(numbers) == call_number:
                interrupt()
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in STORAGE_CALLS:
            patch.setattr(storage, name, count(getattr(storage, name)))
        yield


def test_a_stale_writer_reaches_nothing_of_the_next_attempt_wherever_it_stood_still(tmp_path, make_config):
    config = make_config(keep_best=1)
    for call_number in itertools.count():
        stale, next_one = (RunFolder(f"{tmp_path}/run-{call_number}") for _ in range(2))
        assert stale.start_attempt() == 1
        for epoch in (1, 2):
            write(stale, config, epoch, 10 * epoch, attempt=1)
        bases = []

        def start_next(next_one=next_one, bases=bases) -> None:
            assert next_one.start_attempt() == 2
            bases.append(checkpoints.find_last(next_one.checkpoints))

        with contextlib.suppress(LeaseLostError):
            with interruption(call_number, start_next):
                write(stale, config, 3, 30, attempt=1)
            write(stale, config, 4, 40, attempt=1)
        if not bases:
            break
        (base,) = bases
        # All that the next attempt goes on from is there after all that the stale writer did.
        read_all(next_one, base)
        # With a larger batch, and so after fewer steps than what the stale one may have committed.
        lineage = [(base.attempt, base.step)]
        write(next_one, config, base.epoch + 1, base.step + 5, attempt=2, lineage=lineage)
        last, best = (find(next_one.checkpoints) for find in (checkpoints.find_last, checkpoints.find_best))
        assert [(one.attempt, one.epoch) for one in (last, best)] == [(2, base.epoch + 1), (1, 1)]
        for checkpoint in (last, best):
            read_all(next_one, checkpoint)
        assert [row["epoch"] for row in next_one.read_metrics()] == list(range(1, base.epoch + 2))
    # Not one write that was left out.
    assert call_number > 15


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_stale_writer_changes_nothing(place, tmp_path, make_config, request):
    root, config = str(tmp_path) if place == "disk" else request.getfixturevalue("bucket"), make_config(keep_best=1)
    stale, next_one = (RunFolder(f"{root}/run") for _ in range(2))
    stale.start_attempt()
    for epoch in (1, 2):
        write(stale, config, epoch, 10 * epoch, attempt=1)
    assert next_one.start_attempt() == 2
    write(next_one, config, 3, 30, attempt=2, lineage=[(1, 20)])
    found, files = checkpoints.find_checkpoints(next_one.checkpoints), storage.find_files(next_one.uri)
    with pytest.raises(LeaseLostError, match="attempt 1 at run run must not write any more: attempt 2 has started"):
        write(stale, config, 3, 30, attempt=1)
    with pytest.raises(LeaseLostError):
        checkpoints.delete_old_checkpoints(stale.checkpoints, 0, stale.check_owner)
    assert checkpoints.find_checkpoints(next_one.checkpoints) == found
    left = f"checkpoints/{checkpoints.checkpoint_name(30, attempt=1)}/"
    assert {name: size for name, size in storage.find_files(next_one.uri).items() if not name.startswith(left)} == files


@pytest.fixture
def damaged(tmp_path, make_config, request):
    """Return a run of three epochs, a function that cuts off the weights of one, and its events."""
    root = request.getfixturevalue("bucket") if hasattr(request, "param") else str(tmp_path)
    run, events = RunFolder(f"{root}/damaged"), []
    run.start_attempt()
    job = WorkerJob(make_config(keep_best=3), None, run.uri, None, (), 0, None, events.append)
    for epoch in (1, 2, 3):
        write(run, job.config, epoch, 10 * epoch, attempt=1)

    def damage(epoch: int) -> None:
        name = checkpoints.checkpoint_name(10 * epoch, 1)
        storage.write_bytes(storage.join(run.checkpoints, name, checkpoints.MODEL_NAME), b"")

    return run, job, damage, events


def test_training_goes_on_from_the_last_checkpoint_that_is_intact_and_says_so(damaged):
    assert_goes_on(damaged)


@pytest.mark.parametrize("damaged", ["bucket"], indirect=True)
def test_training_goes_on_so_in_a_bucket(damaged):
    assert_goes_on(damaged)


def assert_goes_on(damaged) -> None:
    run, job, damage, events = damaged
    assert _find_last(job, run).epoch == 3
    assert events == []
    damage(3)
    assert _find_last(job, run).epoch == 2
    (event,) = events
    assert "step-00000030-attempt-0001/model.safetensors is damaged" in str(event)
    assert str(event).endswith("; training resumes from step 20")
    assert [one.what for one in run.read_incidents()] == [str(event)]


def test_training_begins_again_where_no_checkpoint_is_intact_and_says_so(damaged):
    run, job, damage, events = damaged
    for epoch in (1, 2, 3):
        damage(epoch)
    assert _find_last(job, run) is None
    assert str(events[0]).endswith("no other is intact: training starts over")
    assert str(events[0]).count(" is damaged") == 3


def test_the_next_best_checkpoint_takes_the_place_of_a_damaged_one_and_that_is_said(damaged):
    run, job, damage, events = damaged
    damage(1)
    assert _find_best(job, run).epoch == 3
    assert str(events[0]).endswith("the next best, of epoch 3, takes its place")


def test_a_candidate_that_diverges_has_lost_and_the_run_goes_on(start, monkeypatch):
    monkeypatch.setattr("trainer.training.stages._LEAST_STEPS", 3)
    monkeypatch.setattr("trainer.training.loop.broadcast_from_rank_zero", lambda value: value)
    run, training, _ = start(**STAGED)
    take = training._take

    def step(*batch):
        if training.network.strengths.numpy()[PARTS.index("translation")]:
            kernel = training.network.model.trainable_variables[0]
            kernel.assign(kernel * np.nan)
        return take(*batch)

    training._take = step
    assert training.run() == ""
    history = run.read_metrics()
    lost = [row for row in history if "translation" in row["augmentation"]]
    assert [(row["stage"], row["val_loss"], row["val_accuracy"]) for row in lost] == [("trial", np.inf, 0.0)]
    assert history[-1]["stage"] == "decay" or history[-1]["augmentation"] == "none"
    assert all(np.isfinite(row["val_loss"]) for row in history if row not in lost)


def test_any_other_epoch_that_diverges_ends_the_run(start):
    run, training, _ = start(epochs=2, checkpoint_every=1)
    kernel = training.network.model.trainable_variables[0]
    kernel.assign(kernel * np.nan)
    # The loss can be finite all the same: on some CPUs a ReLU makes a number of NaN, and pooling does on all.
    assert "became nan or inf" in training.run()
    assert run.read_metrics() == []
