import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.config.config import TrainConfig
from trainer.notes.note import (
    compare_with_previous,
    describe_change,
    describe_training,
    find_compared,
    format_note,
    format_notebook,
    write_note,
)
from trainer.record.checkpoint import PREDICTIONS_NAME, Position, save_checkpoint
from trainer.record.evaluation_result import summarise
from trainer.record.incident import Incident
from trainer.record.run_folder import RunFolder, describe_run, find_runs
from trainer.runtime import storage

PAST = Path(__file__).parents[2] / "past_records"


@pytest.fixture
def start(tmp_path, make_config, write_dataset, monkeypatch):
    """Return a function that starts a run: its record and its dataset's manifest."""
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--arch", "alexnet"])
    manifest = write_dataset(rows=(7, 4, 3)).manifest

    def start(name: str, day: int = 12, **values) -> RunFolder:
        run = RunFolder(str(tmp_path / "runs" / name))
        run.write_manifest(manifest)
        options = {"arch": "alexnet", "epochs": 50, "base_learning_rate": 0.2, "num_workers": 2, "seed": 3}
        options |= {"batch_norm": "global", **values}
        record = describe_run(make_config(**options), "1 node")
        run.write_record(record.model_copy(update={"started": datetime(2023, 4, day, tzinfo=UTC)}))
        return run

    return start


def note_of(run: RunFolder, result=None) -> str:
    runs, _ = find_runs(storage.parent(run.uri))
    this = next(one for one in runs if one.folder.uri == run.uri)
    return format_note(this, runs, result or run.read_ending(), run.uri)


def test_the_note_has_the_form_of_the_users_own(start, make_result):
    assert (
        note_of(start("first"), make_result(findings=["overfitting: try less"]))
        == """\
### 2023-04-12
#### alexnet: first
the first alexnet run on this dataset here

```python
model = Sequential([
    Input((250, 250, 1)),
    layers.Dense(3),
])
```
Krizhevsky et al. 2012, as in the training notes (BatchNorm for LRN); 27,734,190 parameters

7 training, 4 validation and 3 test images, 5x5x1, 3 classes, from /photos

recipe modern: sgd, learning rate 0.1 (cosine) at global batch 64 = 2 x 32, epochs=50, 100 steps, float32, seed 3

```sh
python jobs/train.py --arch alexnet
```
loss: 0.9315 - accuracy: 0.7727 (51 of 66, 95% interval 0.658-0.857), best of 10 epochs on validation: epoch 7

mean of the last 3 epochs: loss: 0.9512 - accuracy: 0.7500 (95% interval 0.634-0.838), whatever their accuracy

61 s of training, attempts: 1; calibration error 0.073

overfitting: try less

| class | correct | of | precision | recall | F1 |
|---|---|---|---|---|---|
| cat | 22 | 22 | 0.917 | 1.000 | 0.957 |
| dog | 20 | 22 | 0.606 | 0.909 | 0.727 |
| eel | 9 | 22 | 1.000 | 0.409 | 0.581 |

![curves](plots/curves.png)

![confusion](plots/confusion.png)

![mistakes](plots/mistakes.png)
"""
    )


def test_what_training_showed_about_the_batch_stands_with_the_batch(start, make_result):
    result = make_result(findings=["overfitting: try less"], batch_remarks=("batch table: measured again",))
    note = note_of(start("first"), result)
    assert note.index("batch table: measured again") > note.index("| class |") > note.index("overfitting")
    assert "batch       batch table: measured again" in result.summary


def test_the_note_of_many_classes_has_the_worst_of_them(start, make_result):
    labels = np.arange(1000).repeat(3)
    predicted = labels.copy()
    predicted[-3:] = 7
    columns = {"label": labels, "predicted": predicted, "likelier": np.int32(labels != predicted)}
    columns |= {"loss": np.ones(3000), "confidence": np.ones(3000)}
    val = summarise("val", pa.table(columns), [f"class {label}" for label in range(1000)])
    note = note_of(start("first"), make_result(val=val))
    assert "| class 999 | class 7 | 3 |" in note
    assert "lowest accuracies of 1000 classes; result.json lists all:" in note
    assert "| class 999 | 0 | 3 |  | 0.000 | 0.000 |\n| class 0 | 3 | 3 | 1.000 | 1.000 | 1.000 |" in note
    assert len(note) < 5000


def test_the_test_split_has_a_line_that_says_how_often_it_was_read(start, make_result, evaluation):
    run = start("first")
    assert "test:" not in note_of(run, make_result())
    for _ in range(2):
        run.record_test_read("train.py")
    line = f"test: {evaluation}; the test split has been read 2 times for this run"
    assert line in note_of(run, make_result(test=evaluation)).splitlines()


def test_a_run_that_is_not_finished_says_so(start):
    assert "not finished: the same command continues it" in note_of(start("first"))


@pytest.mark.parametrize(
    ("status", "reason", "line"),
    [
        ("interrupted", "SIGTERM", "interrupted by SIGTERM: the same command continues it"),
        ("refused", "--init-from: no layer fits; give others", "refused: --init-from: no layer fits; give others"),
        ("failed", "no room; start nodes", "failed: no room; start nodes; the same command continues it"),
        (
            "failed",
            "a worker died; the same command continues it",
            "failed: a worker died; the same command continues it",
        ),
    ],
)
def test_a_run_that_ended_without_a_result_says_why_and_what_to_do(start, status, reason, line):
    run = start("first")
    run.write_interruption(status, reason)
    assert note_of(run).splitlines()[-1] == line


def test_what_changed_is_against_the_last_run_of_the_architecture(start):
    start("first", 12)
    start("other", 13, arch="vgg19")
    start("elsewhere", 13, dataset_fingerprint="beef")
    start("second", 14, epochs=20, seed=4)
    third = start("third", 15, epochs=20, seed=4)
    runs, _ = find_runs(storage.parent(third.uri))
    assert [run.folder.name for run in runs] == ["first", "elsewhere", "other", "second", "third"]
    assert describe_change(runs[1], runs) == "the first alexnet run on this dataset here"
    assert describe_change(runs[3], runs) == "after first: seed: 3 -> 4; epochs: 50 -> 20"
    assert describe_change(runs[4], runs) == "after second: no changes"


def test_what_the_program_filled_in_itself_is_no_change(start):
    start("first", 12, optimizer="sgd", optimizer_arguments={"nesterov": True}, known_augmentation="")
    start("second", 13, optimizer="adamw", optimizer_arguments={"beta_1": 0.9}, known_augmentation="zoom")
    third = start("third", 14, optimizer="adamw", optimizer_arguments={"beta_1": 0.8}, known_augmentation="zoom")
    runs, _ = find_runs(storage.parent(third.uri))
    assert describe_change(runs[1], runs) == "after first: optimizer: sgd -> adamw"
    assert describe_change(runs[2], runs).startswith("after second: optimizer_arguments: ")


def test_no_checksum_stands_in_what_changed_with_all_its_digits(start):
    start("first", 12, dataset=f"/cache/{'ab' * 32}/mnist")
    start("second", 13, dataset=f"/cache/{'cd' * 32}/mnist")
    runs, _ = find_runs(storage.parent(start("third", 14).uri))
    assert (
        describe_change(runs[1], runs) == "after first: dataset: /cache/abababababab/mnist -> /cache/cdcdcdcdcdcd/mnist"
    )


def finish(run: RunFolder, result, right: int) -> pa.Table:
    """Write the result of a run that predicts the first images of 66 correctly."""
    predicted = [0] * right + [1] * (66 - right)
    predictions = pa.table({"label": [0] * 66, "predicted": predicted})
    row = {"epoch": 7, "val_accuracy": right / 66, "val_loss": 0.1}
    position = Position(epoch=7, epoch_rows=0, step=70, global_batch_size=4, history=[row])
    save_checkpoint(run.checkpoints, position, {PREDICTIONS_NAME: storage.parquet_bytes(predictions)})
    run.write_ending(result)
    return predictions


def test_a_run_is_compared_with_the_last_of_its_dataset_and_architecture(start, make_result):
    finish(start("first", 12), make_result(), 51)
    finish(start("other", 13, arch="vgg19"), make_result(), 20)
    finish(start("elsewhere", 13, dataset_fingerprint="beef"), make_result(), 20)
    second, third, fourth = start("second", 14), start("third", 15), start("fourth", 16)
    of_second, of_third = finish(second, make_result(), 53), finish(third, make_result(), 40)
    assert compare_with_previous(find_compared(second), of_second) == (
        "first and second are not distinguishable on 66 images (correct only in first: 0, only in second: 2; p = 0.5)"
    )
    assert compare_with_previous(find_compared(third), of_third) == (
        "second is better than third on 66 images (correct only in second: 13, only in third: 0; p = 0.00024)"
    )
    assert compare_with_previous(find_compared(start("alone", 17, arch="googlenet")), of_third) == ""
    storage.write_bytes(third.path("result.json"), b"{")
    assert compare_with_previous(find_compared(fourth), of_third) == ""


def test_a_run_that_names_the_one_before_reads_no_other(start, monkeypatch):
    others = [start(name, 10 + number) for number, name in enumerate(("deleted", "other", "before"))]
    run = start("run", 15)

    def find_after(name: str) -> tuple[list[str], int]:
        run.write_record(run.read_record().model_copy(update={"previous": name}))
        read, places = storage.read_bytes, []
        with monkeypatch.context() as patch:
            patch.setattr(storage, "read_bytes", lambda uri, *part: (places.append(uri), read(uri, *part))[1])
            found = find_compared(run)
        return [one.folder.name for one in found], len(places)

    assert find_after("before") == (["before", "run"], 2)
    storage.delete_folder(others[0].uri)
    assert find_after("deleted") == (["other", "before", "run"], 5)
    storage.write_bytes(others[1].path("config.json"), b"{")
    assert find_after("other")[0] == ["before", "run"]
    elsewhere = start("elsewhere", 11, dataset_fingerprint="beef")
    assert find_after(elsewhere.name)[0] == ["elsewhere", "before", "run"]


def test_the_verdict_and_the_test_split_have_lines_of_their_own(start, make_result, evaluation):
    verdict = "a and b are not distinguishable on 66 images (correct only in a: 0, only in b: 2; p = 0.5)"
    result = make_result(comparison=verdict, test=evaluation)
    lines = note_of(start("first"), result).splitlines()
    of_val, of_late, of_all, of_test = (
        next(number for number, line in enumerate(lines) if line.startswith(beginning))
        for beginning in ("loss:", "mean of the last", verdict, "test:")
    )
    assert of_val < of_late < of_all < of_test
    assert [line.split("  ")[0] for line in result.summary] == ["val", "", "", "test", "compared"]
    assert "            best of 10 epochs on validation: epoch 7" in result.summary


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"weight_decay": 0.01, "augment_flip": True}, "seed 3; weight decay 0.01, augment flip"),
        ({"augment": "none", "augment_flip": True}, "seed 3"),
        # What a run that chooses used is said apart.
        ({"augment": "auto", "augment_rotation": 10, "augment_flip": True}, "seed 3; augment auto (flip, rotation 10)"),
        ({"batch_norm": "auto"}, "seed 3; batch norm replica"),
        ({"class_weights": "balanced"}, "seed 3; class weights balanced"),
        ({"optimizer_arguments": {"nesterov": False}}, "seed 3; no nesterov"),
        ({"init_from": "/runs/old", "freeze_trunk": True}, "seed 3; init from /runs/old, freeze trunk"),
    ],
)
def test_what_is_used_in_addition_is_said(start, make_result, values, text):
    assert any(line.endswith(text) for line in note_of(start("first", **values), make_result()).splitlines())


def test_a_new_option_is_in_the_note_without_being_named_there(make_config):
    class Wider(TrainConfig):
        erasing: float = 0.0

    config = make_config().model_dump()
    assert describe_training(Wider(**config), 9).endswith("seed 0")
    assert describe_training(Wider(**config, erasing=0.2), 9).endswith("seed 0; erasing 0.2")


def test_the_note_is_written_into_the_run_folder(start, make_result):
    run, result = start("first"), make_result()
    write_note(run, find_compared(run), result)
    note, how_to_load = note_of(run, result), 'model = keras.saving.load_model("model.keras")'
    written = storage.read_bytes(run.path("note.md")).decode()
    assert written.startswith(note)
    assert how_to_load in written.removeprefix(note)


def test_a_neighbour_that_is_no_run_of_this_program_is_left_out(start, make_result):
    run, neighbour = start("first", 12), start("another", 11)
    storage.write_bytes(neighbour.path("config.json"), b'{"model_type": "bert"}')
    write_note(run, find_compared(run), make_result())
    assert "the first alexnet run on this dataset here" in storage.read_bytes(run.path("note.md")).decode()


def test_the_notebook_has_all_runs_by_date(start, make_result):
    second, first = start("second", 20), start("first", 10)
    first.write_ending(make_result())
    notebook = format_notebook(*find_runs(storage.parent(second.uri)), storage.parent(second.uri))
    assert notebook.startswith("# Training notes\n")
    assert notebook.index("alexnet: first") < notebook.index("loss: 0.9315") < notebook.index("alexnet: second")
    assert "![mistakes](first/plots/mistakes.png)" in notebook
    assert "second/plots" not in notebook


def test_a_run_that_cannot_be_read_is_one_line_and_the_others_are_there(start, make_result):
    """Whatever is wrong: a config or a result of a newer format or damaged, tables that are none, a lost manifest."""
    whole = start("whole", 10)
    whole.write_ending(make_result())
    broken = {name: start(name, 11) for name in ("config", "newer", "result", "manifest")}
    for run in broken.values():
        run.write_ending(make_result())
    storage.write_bytes(broken["config"].path("config.json"), b'{"config": ')
    storage.write_bytes(broken["newer"].path("config.json"), b'{"format": 9}')
    storage.write_bytes(broken["result"].path("result.json"), b'{"format": 9}')
    storage.delete_file(broken["manifest"].path("dataset.json"))
    lines = format_notebook(*find_runs(storage.parent(whole.uri)), storage.parent(whole.uri)).splitlines()
    for name, file, reason in (
        ("config", "config.json", "cannot be read: Invalid JSON"),
        ("newer", "config.json", "it is of format 9: update this program"),
        ("result", "result.json", "it is of format 9: update this program"),
        ("manifest", "dataset.json", "is missing"),
    ):
        (line,) = [line for line in lines if f"{name}/{file}" in line]
        assert reason in line
    assert sum("loss: 0.9315" in line for line in lines) == 2
    assert [line for line in lines if line.startswith("#### ")] == [
        f"#### alexnet: {name}" for name in ("whole", "manifest", "result")
    ]


def test_a_run_of_the_first_version_has_its_note(start, make_result):
    run = start("first")
    for name in ("config", "result"):
        storage.write_bytes(run.path(f"{name}.json"), (PAST / "a9db2b2" / f"{name}.json").read_bytes())
    note = format_notebook(*find_runs(storage.parent(run.uri)), storage.parent(run.uri))
    assert "loss: 0.9315 - accuracy: 0.7727 (51 of 66" in note
    assert " s of training, attempts: 2\n" in note
    assert "calibration" not in note
    assert "```python" not in note


def test_a_run_of_an_architecture_that_is_not_known_has_its_note(start, make_result):
    run = start("first", arch="vit_tiny")
    assert "\n27,734,190 parameters\n" in note_of(run, make_result())


def test_the_first_incidents_stand_beside_the_number_of_attempts(start, make_result):
    at = datetime(2026, 1, 1, tzinfo=UTC)
    damage = Incident(kind="files damaged", attempt=0, at=at, what="a file is missing; training goes on from step 8")
    lost = [
        Incident(kind="workers lost", attempt=number, at=at, what=f"reason {number}", next_step=8)
        for number in range(1, 12)
    ]
    note = note_of(start("first"), make_result(attempts=12, incidents=(damage, *lost)))
    after = note[note.index("attempts: 12") :].splitlines()
    assert after[2] == "recovered at 2026-01-01T00:00:00+00:00: a file is missing; training goes on from step 8"
    assert after[4] == "attempt 1 was lost: reason 1; the run continued after step 8"
    assert "attempt 9 was lost" in note
    assert "attempt 10 was lost" not in note
    assert "2 more incidents; result.json lists all" in after


@pytest.mark.parametrize(
    ("config", "result", "line"),
    [
        (
            {"augment": "auto"},
            {"augmentation": "none 0.2 after 1 epoch", "augmentation_used": "zoom"},
            "zoom; validation",
        ),
        (
            {"augment": "auto", "schedule": "plateau"},
            {"augmentation_used": "none"},
            "none; too few epochs to try others",
        ),
        ({"augment": "auto", "schedule": "cosine"}, {"augmentation_used": "none"}, "none; only --schedule plateau"),
        (
            {"augment": "auto", "known_augmentation": "zoom"},
            {"augmentation_used": "zoom"},
            "zoom; chosen by an earlier",
        ),
        (
            {"augment": "auto", "known_augmentation": "zoom"},
            {"augmentation_used": "zoom", "augmentation_of_best": "none"},
            "zoom; chosen by an earlier run; the best epoch, whose weights are kept, had: none",
        ),
        ({"augment": "all", "augment_zoom": 0.1}, {"augmentation_used": "zoom"}, None),
        # A run of an earlier version.
        ({"augment": "auto"}, {}, None),
    ],
)
def test_a_run_that_chooses_its_augmentation_says_which_it_used_and_why(start, make_result, config, result, line):
    lines = note_of(start("first", **config), make_result(**result)).splitlines()
    found = [one.removeprefix("augmentation: ") for one in lines if one.startswith("augmentation: ")]
    assert [one.startswith(line) for one in found] == ([True] if line else [])
