"""Real Ray, one and two real workers: the same numbers, exact steps, and a worker that dies."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import read_split
from trainer import launch
from trainer.config.request import parse_request
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder, RunResult
from trainer.runtime import storage
from trainer.runtime.errors import JobError
from trainer.runtime.events import AttemptStarted, EpochFinished, RunStarted, StepProfiled, WorkersLost
from trainer.training.batch_norm import synchronize_batch_norm
from trainer.training.dataset import load_manifest, open_split
from trainer.training.evaluation import COLUMNS, Evaluator, mean_loss_and_accuracy
from trainer.training.network import build_network
from trainer.training.step import compile_eval_step, compile_gather

# The stripes are 84 train, 18 val and 18 test images: no batch size used here divides 84 or 18.
GLOBAL_BATCH_SIZE = 8
STEPS_PER_EPOCH = 10
# Everything that has a state of its own: averages of images and of the weights, and random numbers by step.
WITH_BATCH_NORM = {
    "arch": "cnn_softmax",
    "arch_arguments": {
        "first_filters": 8,
        "later_filters": [8],
        "dense_units": 32,
        "batch_norm": True,
        "dropout": 0.3,
    },
    "optimizer": "sgd",
    "base_learning_rate": 0.0035,
    "weight_decay": 5e-4,
    "ema_momentum": 0.5,
    "augment_rotation": 10.0,
    "augment_translation": 0.0,
    "augment_zoom": 0.0,
    "augment_flip": True,
    "augment_mixup": 0.4,
    "augment_cutmix": 1.0,
}
# So that the weights are still finite after the first step, and no longer after the second one.
DIVERGING = {
    "arch": "cnn_softmax",
    "arch_arguments": {"first_filters": 8, "later_filters": [8], "dense_units": 32},
    "optimizer": "sgd",
    "base_learning_rate": 1e30,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "augment_rotation": 0.0,
    "augment_translation": 0.0,
    "augment_zoom": 0.0,
}


@pytest.fixture(scope="module")
def train(resources, stripes, tmp_path_factory):
    storage = tmp_path_factory.mktemp("runs")

    def run(
        name: str,
        num_workers: int,
        on_event=lambda event: None,
        max_failures: int = 3,
        profile_steps: int = 0,
        **options,
    ) -> RunFolder:
        options = {
            **WITH_BATCH_NORM,
            "recipe": "modern",
            "dataset": str(stripes),
            "num_workers": str(num_workers),
            "global_batch_size": str(GLOBAL_BATCH_SIZE),
            "precision": "float32",
            "epochs": 3,
            **options,
        }
        with launch.open_run(str(storage), name, options["arch"], resources) as run:
            plan = launch.plan_run(parse_request(options), run, resources)
            limits = {"max_failures": max_failures, "profile_steps": profile_steps}
            launch.launch(plan, run, resources, **limits, on_event=on_event)
        return run

    return run


@pytest.fixture(scope="module")
def run_of_one(train):
    return train("one", 1)


@pytest.fixture(scope="module")
def profiles() -> list[StepProfiled]:
    """Of run_of_two."""
    return []


@pytest.fixture(scope="module")
def run_of_two(train, profiles):
    def keep_profiles(event):
        if isinstance(event, StepProfiled):
            profiles.append(event)

    return train("two", 2, keep_profiles, profile_steps=3, evaluate_test=True)


def beside(run: RunFolder, name: str) -> RunFolder:
    return RunFolder(storage.join(storage.parent(run.uri), name))


def metrics(run: RunFolder) -> dict[str, list[float]]:
    return pq.read_table(run.path("metrics.parquet")).to_pydict()


def last_weights(run: RunFolder) -> checkpoints.Arrays:
    last = checkpoints.find_last(run.checkpoints)
    return checkpoints.from_safetensors(checkpoints.read_file(run.checkpoints, last, checkpoints.MODEL_NAME))


def assert_same_training(one: RunFolder, two: RunFolder) -> None:
    of_one, of_two = metrics(one), metrics(two)
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "grad_norm"):
        np.testing.assert_allclose(of_two[name], of_one[name], rtol=1e-4, err_msg=name)


def test_two_workers_train_like_one(run_of_one, run_of_two):
    assert metrics(run_of_two)["num_workers"] == [2, 2, 2]
    assert_same_training(run_of_one, run_of_two)


def test_every_epoch_takes_exactly_its_steps(run_of_two):
    last = checkpoints.find_last(run_of_two.checkpoints)
    content = checkpoints.read_file(run_of_two.checkpoints, last, checkpoints.OPTIMIZER_NAME)
    iterations = [int(v) for name, v in checkpoints.from_safetensors(content).items() if "iteration" in name]
    assert iterations == [last.step] == [3 * STEPS_PER_EPOCH]
    assert metrics(run_of_two)["step"] == [10, 20, 30]


def test_every_validation_row_counts_once(run_of_one, run_of_two):
    for run in (run_of_one, run_of_two):
        best = checkpoints.find_best(run.checkpoints)
        predictions = pq.read_table(run.path("checkpoints", best.name, checkpoints.PREDICTIONS_NAME))
        assert predictions.num_rows == 18
        assert predictions["label"].to_pylist() == [0] * 6 + [1] * 6 + [2] * 6


def test_validation_over_two_workers_is_exactly_that_of_one_process(run_of_two, stripes):
    config, manifest = run_of_two.read_record().config, load_manifest(str(stripes))
    network = build_network(manifest, config.model_copy(update={"num_workers": 1}), steps_per_epoch=STEPS_PER_EPOCH)
    # As the training step of two workers has left it: the fused kernel rounds otherwise.
    synchronize_batch_norm(network.model, True)
    best = checkpoints.find_best(run_of_two.checkpoints)
    content = checkpoints.read_file(run_of_two.checkpoints, best, checkpoints.MODEL_NAME)
    checkpoints.assign_variables(network.model.variables, checkpoints.from_safetensors(content))
    val = open_split(str(stripes), manifest, "val")
    eval_step, gather = compile_eval_step(network, manifest, config), compile_gather(network)
    outcomes = Evaluator(val, config.per_replica_batch_size, 0, 1, eval_step, gather).evaluate()
    row = best.history[-1]
    assert mean_loss_and_accuracy(outcomes, val.labels) == (row["val_loss"], row["val_accuracy"])


def test_both_workers_hold_the_same_weights(run_of_two):
    of_first, of_second = run_of_two.read_result().weights_crc32
    assert of_first == of_second


def test_result_and_note_say_k_of_n(run_of_two):
    result = RunResult.model_validate_json(Path(run_of_two.path("result.json")).read_text())
    assert (result.status, result.val.total, result.test.total, result.attempts) == ("completed", 18, 18, 1)
    assert result.val.confusion[2].sum() == 18
    low, high = result.val.accuracy_interval
    assert low < result.val.accuracy < high or result.val.accuracy == 1
    note = Path(run_of_two.path("note.md")).read_text()
    assert f"loss: {result.val.loss:.4f} - accuracy: {result.val.accuracy:.4f} ({result.val.correct} of 18" in note


def test_every_step_has_its_row(run_of_two):
    steps = run_of_two.read_steps()
    assert steps["step"].to_pylist() == list(range(1, 31))
    by_epoch = steps["grad_norm"].to_numpy().reshape(3, STEPS_PER_EPOCH).mean(axis=1)
    np.testing.assert_allclose(by_epoch, metrics(run_of_two)["grad_norm"], rtol=1e-6)


def test_reading_the_test_split_is_counted(run_of_one, run_of_two):
    assert (run_of_one.count_test_reads(), run_of_two.count_test_reads()) == (0, 1)


def test_run_folder_is_complete(run_of_two):
    names = {path.name for path in Path(run_of_two.uri).iterdir()}
    assert {"config.json", "metrics.parquet", "checkpoints", "result.json", "note.md", "model.keras", "plots"} <= names
    record = json.loads(Path(run_of_two.path("config.json")).read_text())
    assert record["config"]["num_workers"] == 2
    assert record["config"]["dataset_fingerprint"]


def test_export_gives_the_scores_of_the_best_checkpoint(run_of_one, stripes):
    import tf_keras

    images = np.stack(read_split(stripes, "val")["image"])
    scores = tf_keras.models.load_model(run_of_one.path("model.keras"), compile=False).predict(images, verbose=0)
    best = checkpoints.find_best(run_of_one.checkpoints)
    predictions = pq.read_table(run_of_one.path("checkpoints", best.name, checkpoints.PREDICTIONS_NAME))
    np.testing.assert_allclose(scores.max(axis=1), predictions[COLUMNS[2]].to_numpy(), rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax(axis=1), predictions[COLUMNS[1]].to_numpy())


def test_a_profile_has_a_trace_and_says_where_a_step_goes(run_of_two, profiles):
    (trace,) = Path(run_of_two.path("profile")).rglob("*.xplane.pb")
    assert trace.name == "worker-0.xplane.pb"
    assert json.loads(Path(run_of_two.path("profile", "ray_timeline.json")).read_text())
    (profiled,) = profiles
    assert profiled.steps == 3
    assert profiled.all_reduce_ms > 0
    assert profiled.compute_ms > 0
    assert len(profiled.slowest_ms) == 5


def test_a_finished_run_is_not_trained_again(train, run_of_two):
    events = []
    train("two", 2, events.append, evaluate_test=True)
    assert events == []


def test_a_finished_run_is_trained_on_from_before_its_end(train, run_of_one):
    first = metrics(run_of_one)
    longer = RunFolder(shutil.copytree(run_of_one.uri, beside(run_of_one, "longer").uri))
    train(longer.name, 1, epochs=5)
    rows = metrics(longer)
    assert rows["val_loss"][:3] == first["val_loss"]
    assert rows["stage"] == [*first["stage"], "train", "decay"]
    decay = first["stage"].index("decay")
    assert rows["started_from"][: decay + 1] == list(range(decay + 1))
    # The last epoch before the learning rate fell.
    assert rows["started_from"][3] == decay
    assert longer.read_result().epochs == 5


@contextlib.contextmanager
def killed_in_its_second_epoch(run: RunFolder) -> Iterator[None]:
    """Kill the first worker of a run, which saves a checkpoint after each step, during the context."""
    ended = threading.Event()

    def kill() -> None:
        while not any(name >= "step-00000012" for name in storage.find_folders(run.checkpoints)):
            if ended.wait(0.002):
                return
        (attempt,) = Path(run.path("attempts")).iterdir()
        os.kill(json.loads(attempt.read_text())["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    ended.set()
    killer.join()


@pytest.fixture(scope="module")
def killed(train, run_of_two):
    """A run like that of two workers of which one is killed, and its events."""
    run, events = beside(run_of_two, "killed"), []
    with killed_in_its_second_epoch(run):
        train(run.name, 2, events.append, checkpoint_every=1)
    return run, events


def test_a_run_killed_within_an_epoch_ends_as_if_it_had_not_been(killed, run_of_two):
    run, events = killed
    assert sum(isinstance(event, RunStarted) for event in events) == 1
    assert metrics(run)["epoch"] == [1, 2, 3]
    assert metrics(run)["attempt"] == [1, 2, 2]
    assert run.read_steps()["step"].to_pylist() == list(range(1, 31))
    assert_identical(run, run_of_two)


def test_the_dead_worker_is_reported_and_is_in_the_result_and_the_note(killed):
    run, events = killed
    first = json.loads(Path(run.path("attempts", "0001.json")).read_text())
    (lost,) = (event for event in events if isinstance(event, WorkersLost))
    assert f"worker 0 (process {first['pid']} on {first['node']}) was killed by SIGKILL" in lost.reason
    assert (lost.failures, lost.max_failures) == (1, 3)
    assert re.fullmatch(rf"{first['node']}:/.*{first['pid']}\.err", lost.log)
    (again,) = (event for event in events if isinstance(event, AttemptStarted))
    assert (again.attempt, again.num_workers, again.previous_num_workers) == (2, 2, 2)
    result = RunFolder(run.uri).read_result()
    assert result.attempts == 2
    (incident,) = result.incidents
    assert (incident.attempt, incident.what, incident.next_step) == (1, lost.reason, again.step)
    assert 11 <= again.step < 20
    assert Path(run.path(incident.log)).read_bytes() == lost.tail
    assert str(incident) in Path(run.path("note.md")).read_text()


def test_batch_norm_averages_are_in_the_checkpoint(run_of_one, run_of_two):
    of_one, of_two = map(last_weights, (run_of_one, run_of_two))
    averages = [name for name in of_one if "moving_" in name]
    assert len(averages) == 4
    for name in averages:
        np.testing.assert_allclose(of_two[name], of_one[name], rtol=2e-3, atol=1e-4, err_msg=name)


# One worker: test_local_worker.py.
@pytest.mark.slow
def test_a_frozen_trunk_keeps_its_weights_and_averages_on_all_workers(train, run_of_one):
    options = {"init_from": run_of_one.uri, "freeze_trunk": True, "ema_momentum": 0.0, "epochs": 1}
    frozen = train("frozen", 2, **options)
    best = checkpoints.find_best(run_of_one.checkpoints)
    before = checkpoints.from_safetensors(checkpoints.read_file(run_of_one.checkpoints, best, checkpoints.MODEL_NAME))
    after = last_weights(frozen)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert len(changed) == 2
    assert all(after[name].shape[-1] == 3 for name in changed)
    assert any("moving_" in name for name in before)


@pytest.mark.slow
def test_another_number_of_workers_goes_on_with_a_batch_that_it_can_share(train, run_of_two):
    run = beside(run_of_two, "two-then-three")

    def kill_first_worker(event):
        if isinstance(event, EpochFinished) and event.row["epoch"] == 2:
            (attempt,) = Path(run.path("attempts")).iterdir()
            os.kill(json.loads(attempt.read_text())["pid"], signal.SIGKILL)

    with pytest.raises(JobError, match="the same command continues it"):
        train(run.name, 2, kill_first_worker, max_failures=0, global_batch_size="20")
    events = []
    train(run.name, 3, events.append, global_batch_size="20")
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert (started.global_batch_size, started.num_replicas) == (18, 3)
    rows = metrics(run)
    assert (rows["num_workers"][0], rows["num_workers"][-1]) == (2, 3)
    assert (rows["global_batch_size"][0], rows["global_batch_size"][-1]) == (20, 18)
    assert rows["step"] == [4, 8, 12]
    # At its end the schedule has come to its end, at whatever batch.
    assert rows["learning_rate"][-1] < 0.1 * max(rows["learning_rate"])
    assert len(run.read_result().weights_crc32) == 3


@pytest.mark.slow
def test_the_same_command_continues_a_killed_run_without_a_trace(train, run_of_two):
    run = beside(run_of_two, "continued")
    with killed_in_its_second_epoch(run), pytest.raises(JobError, match="the same command continues it"):
        train(run.name, 2, max_failures=0, checkpoint_every=1)
    assert 11 <= checkpoints.find_last(run.checkpoints).step < 20
    train(run.name, 2, checkpoint_every=1)
    assert_identical(run, run_of_two)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(train):
    run = train("diverges", 1, **DIVERGING, global_batch_size="84", epochs=20)
    result = run.read_result()
    assert (result.status, result.val.total) == ("diverged", 18)
    assert re.fullmatch(
        r"the loss or its gradient became nan or inf in (step \d|one of the steps \d to \d)", result.reason
    )
    assert result.findings[0].startswith("diverged: ")
    for array in last_weights(run).values():
        assert np.isfinite(array).all()
    assert result.epochs == checkpoints.find_last(run.checkpoints).epoch < 20


def assert_identical(run: RunFolder, other: RunFolder) -> None:
    lasts = [checkpoints.find_last(one.checkpoints) for one in (run, other)]
    for name in (checkpoints.MODEL_NAME, checkpoints.OPTIMIZER_NAME, checkpoints.PREDICTIONS_NAME):
        contents = [
            checkpoints.read_file(one.checkpoints, last, name) for one, last in zip((run, other), lasts, strict=True)
        ]
        assert contents[0] == contents[1], name
    assert run.read_steps() == other.read_steps()
    for name in ("step", "loss", "accuracy", "grad_norm", "val_loss", "val_accuracy", "learning_rate"):
        assert metrics(run)[name] == metrics(other)[name], name
