import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from trainer.record import checkpoint as checkpoints
from trainer.runtime import storage
from trainer.runtime.errors import DamagedError, InputError, NewerFormatError, RecordError


@pytest.fixture
def folder(tmp_path) -> str:
    return str(tmp_path / "checkpoints")


def row(epoch: int, val_accuracy: float, val_loss: float = 1.0) -> dict[str, float]:
    return {"epoch": epoch, "val_accuracy": val_accuracy, "val_loss": val_loss}


def position(epoch: int, step: int, history, epoch_rows: int = 0, **values) -> checkpoints.Position:
    return checkpoints.Position(
        epoch=epoch, epoch_rows=epoch_rows, step=step, global_batch_size=4, history=history, **values
    )


def save(folder: str, accuracies, **files: bytes) -> list[checkpoints.Checkpoint]:
    """Save one checkpoint an epoch of ten steps."""
    history = [row(epoch, accuracy) for epoch, accuracy in enumerate(accuracies, start=1)]
    return [
        checkpoints.save_checkpoint(
            folder, position(epoch, 10 * epoch, history[:epoch]), files or {"model.safetensors": b"m"}
        )
        for epoch in range(1, len(history) + 1)
    ]


def steps(folder: str) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.find_checkpoints(folder)]


def test_a_checkpoint_is_found_as_it_was_saved(folder):
    saved = save(folder, [0.5, 0.6])
    assert checkpoints.find_checkpoints(folder) == saved
    assert saved[1].name == "step-00000020"
    assert saved[1].history == [row(1, 0.5), row(2, 0.6)]


def test_its_files_are_read_as_they_were_written(folder):
    (saved,) = save(folder, [0.5], model=b"weights", optimizer=b"moments")
    assert checkpoints.read_file(folder, saved, "model") == b"weights"
    assert checkpoints.read_file(folder, saved, "optimizer") == b"moments"


def test_without_checkpoints_there_is_neither_a_last_nor_a_best(folder):
    assert checkpoints.find_checkpoints(folder) == []
    assert checkpoints.find_last(folder) is None
    assert checkpoints.find_best(folder) is None


def test_the_last_has_the_most_steps_even_past_the_width_of_its_name(folder):
    for step in (999, 100_000_000, 20_000_000):
        checkpoints.save_checkpoint(folder, position(1, step, [row(1, 0.5)]), {})
    assert checkpoints.find_last(folder).step == 100_000_000
    assert steps(folder) == [999, 20_000_000, 100_000_000]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(0.5, 1.0), (0.7, 2.0), (0.6, 0.1)], 2),  # accuracy decides
        ([(0.7, 1.0), (0.7, 0.5), (0.7, 0.9)], 2),  # then the lower loss
        ([(0.7, 1.0), (0.7, 1.0)], 1),  # then the earlier epoch
    ],
)
def test_the_best_is_that_of_the_best_validation(folder, rows, best):
    for epoch, (accuracy, loss) in enumerate(rows, start=1):
        checkpoints.save_checkpoint(folder, position(epoch, 10 * epoch, [row(epoch, accuracy, loss)]), {})
    assert checkpoints.find_best(folder).epoch == best


def test_a_folder_without_its_commit_is_invisible(folder):
    first, second = save(folder, [0.5, 0.6])
    storage.delete_file(storage.join(folder, second.name, "checkpoint.json"))
    assert checkpoints.find_last(folder) == first
    assert checkpoints.find_best(folder) == first


def test_a_save_that_fails_half_way_is_invisible(folder):
    files = {"model": b"m", "model/below a file": b"o"}
    with pytest.raises(InputError, match="give a path that can be read and written"):
        checkpoints.save_checkpoint(folder, position(1, 10, [row(1, 0.5)]), files)
    assert storage.find_files(folder) == {"step-00000010/model": 1}
    assert checkpoints.find_checkpoints(folder) == []


def save_attempt(folder: str, step: int, attempt: int, lineage=()) -> checkpoints.Checkpoint:
    within = position(0, step, [], epoch_rows=4, attempt=attempt, lineage=lineage)
    return checkpoints.save_checkpoint(folder, within, {})


def test_a_checkpoint_has_its_attempt_in_its_name(folder):
    assert save_attempt(folder, 20, 3).name == "step-00000020-attempt-0003"
    assert storage.find_folders(folder) == ["step-00000020-attempt-0003"]


def test_what_an_attempt_commits_after_a_later_one_went_on_from_before_it_does_not_count(folder):
    first = [save_attempt(folder, step, 1) for step in (10, 20, 30)]
    assert checkpoints.find_last(folder) == first[2]
    second = save_attempt(folder, 25, 2, [(1, 20)])
    assert checkpoints.find_checkpoints(folder) == [*first[:2], second]
    third = save_attempt(folder, 15, 3, [(1, 10)])
    assert checkpoints.find_checkpoints(folder) == [first[0], third]


def test_a_run_from_before_attempts_were_in_names_goes_on(folder):
    (old,) = save(folder, [0.5])
    new = checkpoints.save_checkpoint(
        folder, position(2, 20, [row(1, 0.5), row(2, 0.6)], attempt=2, lineage=[(0, 10)]), {}
    )
    assert checkpoints.find_checkpoints(folder) == [old, new]


def test_folders_that_are_no_checkpoints_are_left_alone(folder):
    storage.write_bytes(storage.join(folder, "my-favourite", "checkpoint.json"), b"{}")
    save(folder, [0.5, 0.6])
    checkpoints.delete_old_checkpoints(folder, keep_best=1)
    assert storage.find_folders(folder) == ["my-favourite", "step-00000020"]


def test_the_tenth_attempt_is_later_than_the_ninth(folder):
    for attempt in (9, 10_000, 10):
        save_attempt(folder, 10, attempt, [(earlier, 10) for earlier in (9, 10) if earlier < attempt])
    checkpoints.delete_old_checkpoints(folder, keep_best=1)
    assert storage.find_folders(folder) == ["step-00000010-attempt-10000"]


def test_stray_files_are_no_checkpoints(folder):
    save(folder, [0.5])
    storage.write_bytes(storage.join(folder, "notes.txt"), b"")
    assert steps(folder) == [10]


def damage(folder: str, name: str, kind: str) -> None:
    model, commit = (storage.join(folder, name, file) for file in ("model.safetensors", "checkpoint.json"))
    match kind:
        case "truncated":
            storage.write_bytes(model, storage.read_bytes(model)[:-1])
        case "other bytes":
            storage.write_bytes(model, storage.read_bytes(model)[:-1] + b"?")
        case "missing":
            storage.delete_file(model)
        case "commit truncated":
            storage.write_bytes(commit, storage.read_bytes(commit)[:-9])
        case "commit empty":
            storage.write_bytes(commit, b"")
        case "commit without a field":
            storage.write_bytes(commit, json.dumps({**json.loads(storage.read_bytes(commit)), "step": None}).encode())
        case "commit of no encoding":
            storage.write_bytes(commit, b"\xff\xfe" + storage.read_bytes(commit))
        case "commit of another":
            storage.write_bytes(commit, storage.read_bytes(commit).replace(b'"step": ', b'"step": 9'))


OF_COMMIT = {
    "commit truncated": "checkpoint.json cannot be read",
    "commit empty": "checkpoint.json cannot be read",
    "commit without a field": "checkpoint.json cannot be read: step",
    "commit of no encoding": "checkpoint.json cannot be read",
    "commit of another": "checkpoint.json is that of step-00000920",
}
DAMAGES = {
    "truncated": r"model.safetensors is damaged: its 7 bytes have sha256 \w{12}, checkpoint.json says \w{12}$",
    "other bytes": r"model.safetensors is damaged: its 8 bytes have",
    "missing": "model.safetensors is missing",
    **OF_COMMIT,
}
FILES = {"model.safetensors": b"12345678", "optimizer.safetensors": b"9"}


def test_where_all_are_intact_nothing_is_set_aside(folder):
    assert checkpoints.find_whole(folder, checkpoints.find_last) == (None, [])
    first, second = save(folder, [0.6, 0.5], **FILES)
    before = storage.find_files(folder)
    assert checkpoints.find_whole(folder, checkpoints.find_last) == (second, [])
    assert checkpoints.find_whole(folder, checkpoints.find_best) == (first, [])
    assert storage.find_files(folder) == before


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_last_checkpoint_is_set_aside_and_stays_to_be_looked_at(folder, kind):
    first, second = save(folder, [0.5, 0.6], **FILES)
    damage(folder, second.name, kind)
    commit = storage.read_bytes(storage.join(folder, second.name, "checkpoint.json"))
    found, (line,) = checkpoints.find_whole(folder, checkpoints.find_last)
    assert found == first
    assert re.search(f"{second.name}/{DAMAGES[kind]}", line)
    assert checkpoints.find_checkpoints(folder) == [first]
    kept = json.loads(storage.read_bytes(storage.join(folder, second.name, "damaged.json")))
    assert kept == {"reason": line, "checkpoint.json": commit.decode(errors="replace")}
    # It is reported once.
    assert checkpoints.find_whole(folder, checkpoints.find_last) == (first, [])
    save(folder, [0.5, 0.6, 0.7])
    checkpoints.delete_old_checkpoints(folder, keep_best=1)
    if kind != "missing":
        assert storage.exists(storage.join(folder, second.name, "model.safetensors"))


def test_the_last_of_several_that_is_intact_is_found(folder):
    saved = save(folder, [0.5, 0.6, 0.7, 0.8], **FILES)
    for one, kind in zip(saved[1:], ["truncated", "commit empty", "missing"], strict=True):
        damage(folder, one.name, kind)
    found, lines = checkpoints.find_whole(folder, checkpoints.find_last)
    assert (found, len(lines)) == (saved[0], 3)


def test_of_checkpoints_that_are_all_damaged_none_is_found(folder):
    for one in save(folder, [0.5, 0.6], **FILES):
        damage(folder, one.name, "other bytes")
    found, lines = checkpoints.find_whole(folder, checkpoints.find_last)
    assert (found, len(lines)) == (None, 2)
    assert len(storage.find_folders(folder)) == 2


def test_the_next_best_takes_the_place_of_a_damaged_best(folder):
    saved = save(folder, [0.7, 0.9, 0.8, 0.6], **FILES)
    damage(folder, saved[1].name, "truncated")
    found, (line,) = checkpoints.find_whole(folder, checkpoints.find_best)
    assert found == saved[2]
    assert saved[1].name in line


def test_a_checkpoint_of_a_newer_program_is_not_set_aside(folder):
    _, second = save(folder, [0.5, 0.6], **FILES)
    commit = storage.join(folder, second.name, "checkpoint.json")
    newer = {**json.loads(storage.read_bytes(commit)), "format": 99}
    storage.write_bytes(commit, json.dumps(newer).encode())
    with pytest.raises(NewerFormatError, match="it is of format 99"):
        checkpoints.find_whole(folder, checkpoints.find_last)
    assert json.loads(storage.read_bytes(commit)) == newer


def test_a_stale_attempt_sets_nothing_aside(folder):
    (saved,) = save(folder, [0.5], **FILES)
    damage(folder, saved.name, "truncated")
    with pytest.raises(ZeroDivisionError):
        checkpoints.find_whole(folder, checkpoints.find_last, lambda: 1 / 0)
    assert checkpoints.find_checkpoints(folder) == [saved]


def test_a_disk_that_cannot_be_read_is_no_damage(folder):
    (saved,) = save(folder, [0.5], **FILES)
    model = Path(folder, saved.name, "model.safetensors")
    model.unlink()
    model.mkdir()
    with pytest.raises(InputError, match="give a path that can be read and written"):
        checkpoints.find_whole(folder, checkpoints.find_last)
    assert checkpoints.find_checkpoints(folder) == [saved]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_what_to_do_by_whoever_only_reads(folder, kind):
    _, saved = save(folder, [0.5, 0.6], **FILES)
    damage(folder, saved.name, kind)
    result = f"{Path(folder).parent}/result.json"
    remedy = rf"; to continue from an intact checkpoint, delete {re.escape(result)}, if there is one, and give"
    with pytest.raises(DamagedError, match=DAMAGES[kind].removesuffix("$") + ".*" + remedy):
        checkpoints.read_file(folder, checkpoints.find_named(folder, saved.name), "model.safetensors")
    assert not storage.exists(storage.join(folder, saved.name, "damaged.json"))
    checkpoints.find_whole(folder, checkpoints.find_last)
    with pytest.raises(InputError, match=f"no complete checkpoint {saved.name}{remedy}"):
        checkpoints.find_named(folder, saved.name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_survives(folder, value):
    checkpoints.save_checkpoint(folder, position(1, 10, [row(1, 0.1, value)]), {})
    (found,) = checkpoints.find_checkpoints(folder)
    assert str(found.history[0]["val_loss"]) == str(value)


@pytest.mark.parametrize(
    ("accuracies", "keep_best", "kept"),
    [
        ([0.5, 0.9, 0.6, 0.7], 1, [20, 40]),
        ([0.5, 0.9, 0.6, 0.7], 2, [20, 40]),
        ([0.5, 0.9, 0.8, 0.7], 2, [20, 30, 40]),
        ([0.5, 0.6, 0.7, 0.8], 1, [40]),
        ([0.9, 0.5, 0.5, 0.5], 1, [10, 40]),
        ([0.5, 0.5, 0.5], 2, [10, 20, 30]),
        ([0.5, 0.6], 5, [10, 20]),
        ([], 1, []),
    ],
)
def test_the_best_and_the_last_are_kept(folder, accuracies, keep_best, kept):
    save(folder, accuracies)
    checkpoints.delete_old_checkpoints(folder, keep_best)
    assert steps(folder) == kept
    assert storage.find_folders(folder) == [checkpoints.checkpoint_name(step) for step in kept]


def test_what_a_killed_writer_left_of_an_older_checkpoint_is_deleted(folder):
    save(folder, [0.5, 0.6])
    for step in (5, 1000):
        storage.write_bytes(storage.join(folder, checkpoints.checkpoint_name(step), checkpoints.MODEL_NAME), b"")
    checkpoints.delete_old_checkpoints(folder, keep_best=1)
    kept = [checkpoints.checkpoint_name(step) for step in (20, 1000)]
    assert storage.find_folders(folder) == kept  # the later one may be on its way


def test_arrays_survive_as_safetensors():
    arrays = {
        "conv/kernel:0": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        "iteration:0": np.array(7, np.int64),
        "empty:0": np.zeros((0, 3), np.float32),
        "flag": np.array(True),
    }
    restored = checkpoints.from_safetensors(checkpoints.to_safetensors(arrays))
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array)
        assert (restored[name].shape, restored[name].dtype) == (array.shape, array.dtype)


class Variable:
    """As a TensorFlow variable looks to this module."""

    def __init__(self, name: str, value) -> None:
        self.name, self.value = name, np.asarray(value)

    @property
    def shape(self):
        return self.value.shape

    def numpy(self):
        return self.value

    def assign(self, value) -> None:
        self.value = value


def test_variables_are_read_and_set_by_name():
    source = [Variable("a", [1.0, 2.0]), Variable("b", 3)]
    target = [Variable("b", 0), Variable("a", [0.0, 0.0])]
    checkpoints.assign_variables(target, checkpoints.read_variables(source))
    assert target[0].value == 3
    assert target[1].value.tolist() == [1.0, 2.0]


def test_two_variables_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two variables have the same name"):
        checkpoints.read_variables([Variable("a", 1), Variable("a", 2)])


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "c"]])
def test_other_names_are_refused_before_anything_is_set(names):
    variables = [Variable("a", 1), Variable("b", 2)]
    with pytest.raises(ValueError, match=r"other variables than the model: '[bc]' is in one of them only"):
        checkpoints.assign_variables(variables, {name: np.array(9) for name in names})
    assert variables[0].value == 1


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"a has shape \(3,\) in the checkpoint, \(2,\) in the model"):
        checkpoints.assign_variables([Variable("a", [0, 0])], {"a": np.zeros(3)})


def test_a_commit_of_a_newer_program_is_read_where_that_is_safe(folder):
    (saved,) = save(folder, [0.5])
    newer = {**json.loads(saved.to_json()), "shards": 2}
    storage.write_bytes(storage.join(folder, saved.name, "checkpoint.json"), json.dumps(newer).encode())
    assert checkpoints.find_checkpoints(folder) == [saved]
    storage.write_bytes(storage.join(folder, saved.name, "checkpoint.json"), json.dumps(newer | {"format": 3}).encode())
    with pytest.raises(RecordError, match="it is of format 3"):
        checkpoints.find_checkpoints(folder)


def test_a_file_that_an_earlier_form_had_not_is_named(folder):
    (saved,) = save(folder, [0.5])
    with pytest.raises(InputError, match=r"checkpoint step-00000010 has no elsewhere.bin"):
        checkpoints.read_file(folder, saved, "elsewhere.bin")


def test_a_checkpoint_within_an_epoch_is_the_last_but_never_the_best(folder):
    save(folder, [0.5, 0.9])
    history = [row(1, 0.5), row(2, 0.9)]
    for step in (23, 26):
        checkpoints.save_checkpoint(folder, position(2, step, history, epoch_rows=12), {})
    assert checkpoints.find_last(folder).step == 26
    assert checkpoints.find_best(folder).step == 20
    checkpoints.delete_old_checkpoints(folder, keep_best=2)
    assert steps(folder) == [10, 20, 26]


def test_within_the_first_epoch_there_is_no_best(folder):
    checkpoints.save_checkpoint(folder, position(0, 3, [], epoch_rows=12), {})
    assert checkpoints.find_last(folder).step == 3
    assert checkpoints.find_best(folder) is None
    checkpoints.delete_old_checkpoints(folder, keep_best=1)
    assert steps(folder) == [3]
