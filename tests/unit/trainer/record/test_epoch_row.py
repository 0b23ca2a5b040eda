import math

import pyarrow.parquet as pq

from trainer.record.epoch_row import EpochRow, complete_row, find_curve
from trainer.record.run_folder import RunFolder

ROW = EpochRow(
    epoch=2,
    step=8,
    loss=1.5,
    accuracy=0.25,
    learning_rate=0.125,
    grad_norm=3.0,
    clipped_fraction=0.5,
    noise_scale=48.0,
    images_per_second=640.0,
    data_wait_seconds=0.75,
    attempt=1,
    num_workers=2,
    global_batch_size=20,
    val_loss=1.25,
    val_accuracy=0.625,
    peak_memory_gib=2.0,
    checkpoint_seconds=0.0625,
    epoch_seconds=4.0,
    stage="trial",
    augmentation="rotation",
    started_from=1,
)


def test_the_columns_of_metrics_parquet_keep_their_names_and_their_order(tmp_path):
    run = RunFolder(str(tmp_path))
    run.write_metrics([ROW.to_metrics()])
    table = pq.read_table(run.path("metrics.parquet"))
    # Notes, plots, plans and the users' own scripts read these.
    expected = {"epoch": 2, "step": 8, "loss": 1.5, "accuracy": 0.25, "learning_rate": 0.125, "grad_norm": 3.0}
    expected |= {"clipped_fraction": 0.5, "noise_scale": 48.0, "images_per_second": 640.0}
    expected |= {"data_wait_seconds": 0.75, "attempt": 1}
    expected |= {"num_workers": 2, "global_batch_size": 20, "val_loss": 1.25, "val_accuracy": 0.625}
    expected |= {"peak_memory_gib": 2.0, "checkpoint_seconds": 0.0625, "epoch_seconds": 4.0}
    expected |= {"stage": "trial", "augmentation": "rotation", "started_from": 1}
    assert table.column_names == list(expected)
    assert table.to_pylist() == [expected] == run.read_metrics()


def test_a_row_of_an_earlier_version_has_nan_for_what_was_not_measured_then():
    earlier = {name: value for name, value in ROW.to_metrics().items() if name != "noise_scale"}
    row = complete_row(earlier)
    assert math.isnan(row.pop("noise_scale"))
    assert row == earlier


def test_a_run_that_an_earlier_version_began_gets_the_newer_columns(tmp_path):
    run = RunFolder(str(tmp_path))
    run.write_metrics([{"epoch": 1, "loss": 2.0}, ROW.to_metrics()])
    first, second = run.read_metrics()
    assert second == ROW.to_metrics()
    assert (first["loss"], first["stage"]) == (2.0, None)


def test_a_curve_leaves_out_candidates_that_lost_unless_one_of_them_is_the_best_epoch():
    # The candidate of epoch 2 lost to that of 3. The decay of epoch 6 started from 4, before training went on too long.
    rows = [("plain", 0), ("trial", 1), ("trial", 1), ("train", 3), ("train", 4), ("decay", 4)]
    history = [{"epoch": epoch, "stage": stage, "started_from": start} for epoch, (stage, start) in enumerate(rows, 1)]
    assert [row["epoch"] for row in find_curve(history)] == [1, 3, 4, 5, 6]
    assert [row["epoch"] for row in find_curve(history, best_epoch=2)] == [1, 2, 3, 4, 5, 6]
    # Of an earlier version.
    assert len(find_curve([{"epoch": 1}, {"epoch": 2}])) == 2
    assert find_curve([]) == []
