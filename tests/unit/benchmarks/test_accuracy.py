import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.accuracy import Run, Turn, find_marks, keep_predictions, measure_cpu_seconds, read_kept, read_run
from trainer.record.checkpoint import Position, delete_old_checkpoints, save_checkpoint
from trainer.runtime.storage import parquet_bytes


def save_epoch(folder: Path, epoch: int, predicted: list[int] | None, accuracy: float = 0.5, rows: int = 0) -> None:
    row = {"epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0}
    position = Position(
        epoch=epoch, epoch_rows=rows, step=10 * epoch + rows, global_batch_size=32, history=[row], attempt=1
    )
    table = (
        pa.table({"label": [1, 1], "predicted": predicted or [], "loss": [0.5, float(epoch)]}) if predicted else None
    )
    files = {"predictions.parquet": parquet_bytes(table)} if table is not None else {"steps.parquet": b""}
    checkpoint = save_checkpoint(str(folder), position, files)
    os.utime(folder / checkpoint.name / "checkpoint.json", (1000 + epoch, 1000 + epoch))


def test_predictions_of_every_epoch_stay_when_the_run_deletes_them(tmp_path):
    checkpoints, kept = tmp_path / "checkpoints", tmp_path / "kept"
    for epoch, predicted in ((1, [1, 0]), (2, [1, 1]), (3, [0, 0]), (4, [0, 1])):
        save_epoch(checkpoints, epoch, predicted, accuracy=sum(predicted) / 2)
        save_epoch(checkpoints, epoch, None, rows=5)
        keep_predictions(checkpoints, kept, cpu_seconds=10 * epoch)
        delete_old_checkpoints(str(checkpoints), keep_best=1)
        keep_predictions(checkpoints, kept, cpu_seconds=10 * epoch + 5)
    assert not list(checkpoints.glob("step-00000030*"))
    assert read_kept(kept, began=990) == {
        "seconds": [11, 12, 13, 14],
        "cpu_seconds": [10, 20, 30, 40],
        "predicted": [[1, 0], [1, 1], [0, 0], [0, 1]],
        "losses": [[0.5, 1], [0.5, 2], [0.5, 3], [0.5, 4]],
    }


def make_run(correct: list[int], seconds: list[float], images: int = 400, ending: str = "completed") -> Run:
    """Return a run with a number of correct answers after each epoch, the same ones first."""
    order = np.random.default_rng(2).permutation(images)
    predicted = [(order < count).astype(int).tolist() for count in correct]
    found = {"labels": [1] * images, "seconds": seconds, "predicted": predicted, "whole_seconds": 99.0}
    return read_run(found | {"losses": [[1.0] * images for _ in correct], "ending": ending})


@pytest.fixture
def turn() -> Turn:
    script = make_run([300, 350, 340], [10, 20, 30])
    return Turn("mstar", "cnn_tapered", "", 0, script, make_run([200, 345, 390], [8, 25, 31]))


def test_the_product_is_judged_by_what_it_had_when_the_script_ended(turn):
    assert len(turn.at_equal_seconds.seconds) == 2
    assert turn.advantages == (5, -5)
    # Five images on one side only, and none on the other.
    assert turn.p_values == (2 / 2**5, 2 / 2**5)
    # 340 are the script's last: it had them at 20 s first.
    assert turn.seconds_to_last == (20, 25)


def test_the_marks_count_rows_that_are_worse_and_rows_that_are_better(turn):
    script = turn.script
    worse = Turn("mstar", "cnn_tapered", "", 1, script, make_run([300], [29]))
    better = Turn("mstar", "cnn_tapered", "", 2, script, make_run([360], [5]))
    marks = find_marks([turn, worse, better])
    assert [(mark.value, mark.is_reached) for mark in marks] == [
        (1, False),
        (1, False),
        (1.25, False),
        (float("inf"), False),
    ]
    assert [mark.is_reached for mark in find_marks([better])] == [True] * 4
    beside = replace(worse, options="--augment-zoom 0")
    assert [mark.is_reached for mark in find_marks([better, beside])] == [True] * 4 + [False, False, False, False]


def test_a_run_without_an_epoch_has_no_correct_answer(turn):
    nothing = Turn("mstar", "cnn_tapered", "", 0, turn.script, make_run([], [], ending="diverged"))
    assert nothing.advantages == (-340, -350)
    assert nothing.seconds_to_last == (20, float("inf"))


def test_seconds_are_those_of_the_clock_that_is_asked_for():
    found = {"labels": [1], "predicted": [[1], [1]], "losses": [[0], [0]], "ending": "completed"}
    found |= {"seconds": [1, 2], "whole_seconds": 3, "cpu_seconds": [10, 20], "whole_cpu_seconds": 30}
    assert [read_run(found, clock).curve.seconds.tolist() for clock in ("wall", "cpu")] == [[1, 2], [10, 20]]
    assert [read_run(found, clock).whole_seconds for clock in ("wall", "cpu")] == [3, 30]


def test_the_seconds_of_cores_are_those_of_a_process_and_of_all_that_it_started():
    spin = "import time\nwhile time.process_time() < 0.3: pass\n"
    command = (
        f"import subprocess, sys\n{spin}for _ in range(2): subprocess.run([sys.executable, '-c', {spin!r}])\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE) as process:
        # The system gives whole hundredths of the seconds of each process, rounded down: two of them have 0.6.
        while measure_cpu_seconds(process.pid) < 0.8:
            assert process.poll() is None
        process.communicate(b"\n")
    assert measure_cpu_seconds(process.pid) == 0
