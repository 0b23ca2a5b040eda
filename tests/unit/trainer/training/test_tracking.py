import importlib.util

import pytest
from tensorboardX.proto.event_pb2 import Event

from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training.tracking import check_trackers, log_to_mlflow, write_tensorboard

HISTORY = [{"epoch": 1.0, "step": 4.0, "val_loss": 1.5}, {"epoch": 2.0, "step": 8.0, "val_loss": 0.75}]


def read_events(content: bytes) -> list[Event]:
    """Read TFRecords: length, its checksum, an event, its checksum."""
    events, position = [], 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        events.append(Event.FromString(content[position + 12 : position + 12 + length]))
        position += 12 + length + 4
    return events


def test_tensorboard_has_each_metric_at_its_step_once(tmp_path):
    run = RunFolder(str(tmp_path))
    write_tensorboard(run, HISTORY[:1])
    write_tensorboard(run, HISTORY)
    (name,) = storage.find_files(run.path("tensorboard"))
    assert "tfevents" in name
    values = [
        (event.step, value.tag, value.simple_value)
        for event in read_events(storage.read_bytes(run.path("tensorboard", name)))
        for value in event.summary.value
    ]
    assert [value for value in values if value[1] == "val_loss"] == [(4, "val_loss", 1.5), (8, "val_loss", 0.75)]


def test_an_unknown_tracker_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="--track 'wandb' is unknown; choose from tensorboard, mlflow"):
        check_trackers(["wandb"])
    check_trackers(["tensorboard"])


def test_a_tracker_whose_package_is_missing_is_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[mlflow\]'"):
        check_trackers(["mlflow"])


def test_mlflow_gets_config_metrics_and_result(tmp_path, monkeypatch, make_config, make_result):
    import mlflow

    # The client alone: complete MLflow, with its server, does not work with this version of pyarrow.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    check_trackers(["mlflow"])
    log_to_mlflow(RunFolder(str(tmp_path / "first")), make_config(epochs=50), HISTORY, make_result())
    (logged,) = mlflow.MlflowClient().search_runs(["0"])
    assert logged.info.run_name == "first"
    assert logged.data.params["epochs"] == "50"
    assert logged.data.metrics["val_loss"] == 0.75
    assert logged.data.metrics["best_val_accuracy"] == pytest.approx(51 / 66)


def test_an_mlflow_server_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"http://127.0.0.1:9 does not answer .*set MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"])
