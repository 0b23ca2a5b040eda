import contextlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from trainer.config.config import TrainConfig
from trainer.record import checkpoint as checkpoints
from trainer.record.checkpoint import Position
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.errors import LeaseLostError
from trainer.runtime.events import ignore_event
from trainer.training.job import WorkerJob
from trainer.training.loop import STEPS_SCHEMA, _check_finite, _find_best, _find_last, _write_checkpoint


def test_an_epoch_of_which_less_than_a_batch_is_left_has_no_steps_to_check():
    # Continued by fewer workers, whose batch is larger than the rows that are left.
    _check_finite([], first_step=4, precision="float32")


# The first epoch is the best.
ACCURACIES = [0.9, 0.5, 0.6, 0.7]


def write(run: RunFolder, config: TrainConfig, epoch: int, step: int, attempt: int, lineage=()) -> None:
    """Writes the checkpoint of an epoch, and all that goes with it, as rank 0 does."""
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
    """Calls a function once, before the call to the storage of this number."""
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
    with pytest.raises(LeaseLostError, match="attempt 1 at run run writes no more: attempt 2 has started"):
        write(stale, config, 3, 30, attempt=1)
    with pytest.raises(LeaseLostError):
        checkpoints.delete_old_checkpoints(stale.checkpoints, 0, stale.check_owner)
    assert checkpoints.find_checkpoints(next_one.checkpoints) == found
    left = f"checkpoints/{checkpoints.checkpoint_name(30, attempt=1)}/"
    assert {name: size for name, size in storage.find_files(next_one.uri).items() if not name.startswith(left)} == files


@pytest.fixture
def damaged(tmp_path, make_config, request):
    """Returns a run of three epochs, a function that cuts off the weights of one, and what it tells."""
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


def test_training_goes_on_from_the_last_checkpoint_that_is_whole_and_says_so(damaged):
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
    assert str(event).endswith("; training goes on from step 20")
    assert [one.partition("+00:00: ")[2] for one in run.read_recoveries()] == [str(event)]


def test_training_begins_anew_where_no_checkpoint_is_whole_and_says_so(damaged):
    run, job, damage, events = damaged
    for epoch in (1, 2, 3):
        damage(epoch)
    assert _find_last(job, run) is None
    assert str(events[0]).endswith("no other is whole: training begins anew")
    assert str(events[0]).count(" is damaged") == 3


def test_the_next_best_checkpoint_takes_the_place_of_a_damaged_one_and_that_is_said(damaged):
    run, job, damage, events = damaged
    damage(1)
    assert _find_best(job, run).epoch == 3
    assert str(events[0]).endswith("the best of the others, that of epoch 3, takes its place")
