import importlib.util
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training.tracking import FinishedRun, check_trackers, end_trackers, write_tensorboard_epoch

ROW = {"epoch": 1.0, "step": 2.0, "loss": 1.0, "accuracy": 0.5, "val_loss": 1.5, "val_accuracy": 0.4, "stage": "plain"}
HISTORY = [{**ROW, "attempt": 1}, {**ROW, "epoch": 2.0, "step": 4.0, "loss": 0.5, "val_loss": 0.75, "attempt": 1}]
STEPS = pa.table({"step": [1, 2, 3, 4], **{name: [4.0, 3.0, 2.0, 1.0] for name in ("loss", "accuracy", "grad_norm")}})


def read_events(content: bytes) -> list[Event]:
    """Read TFRecords: length, its checksum, an event, its checksum."""
    events, position = [], 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        events.append(Event.FromString(content[position + 12 : position + 12 + length]))
        position += 12 + length + 4
    return events


def read_curves(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Returns the steps and values of each curve by folder and name, in the order in which TensorBoard reads them."""
    curves = defaultdict(list)
    for name in storage.find_files(run.path("tensorboard")):
        assert "tfevents" in name
        for event in read_events(storage.read_bytes(run.path("tensorboard", name))):
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    curves[f"{Path(name).parent}: {value.tag}"].append((event.step, value.simple_value))
    return dict(curves)


def write_epochs(run: RunFolder) -> None:
    for count in (1, 2):
        write_tensorboard_epoch(run, HISTORY[:count], STEPS[: 2 * count])


@pytest.fixture
def finished(tmp_path, make_config, make_result) -> FinishedRun:
    run = RunFolder(str(tmp_path / "runs" / "first"))
    for name in ("confusion", "mistakes"):
        sink = io.BytesIO()
        Image.fromarray(np.full((5, 7, 3), 200, np.uint8)).save(sink, "png")
        run.write(sink.getvalue(), "plots", f"{name}.png")
    run.write(b"### a note", "note.md")
    run.write(b"a model", "model.keras")
    config = make_config(epochs=50, arch_arguments={"dense_units": 8, "later_filters": [4, 8]})
    return FinishedRun(run, config, HISTORY, make_result())


def test_tensorboard_has_train_and_val_in_one_chart_and_a_curve_by_step(finished):
    write_epochs(finished.folder)
    by_step = [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert read_curves(finished.folder) == {
        "train: loss": [(2, 1.0), (4, 0.5)],
        "train: accuracy": [(2, 0.5), (4, 0.5)],
        "val: loss": [(2, 1.5), (4, 0.75)],
        "val: accuracy": [(2, pytest.approx(0.4)), (4, pytest.approx(0.4))],
        **{f"train: step/{name}": by_step for name in ("loss", "accuracy", "grad_norm")},
    }


def test_an_epoch_that_is_repeated_is_there_once(finished):
    write_epochs(finished.folder)
    before = read_curves(finished.folder)
    write_tensorboard_epoch(finished.folder, HISTORY, STEPS)
    assert read_curves(finished.folder) == before


def test_tensorboard_has_hyperparameters_result_and_figures_at_the_end(finished):
    write_epochs(finished.folder)
    end_trackers(["tensorboard"], finished)
    (name,) = [name for name in storage.find_files(finished.folder.path("tensorboard")) if "end" in name]
    events = read_events(storage.read_bytes(finished.folder.path("tensorboard", name)))
    values = {value.tag: value for event in events for value in event.summary.value}
    assert values["best_accuracy"].simple_value == pytest.approx(51 / 66)
    assert (values["confusion"].image.height, values["mistakes"].image.width) == (5, 7)
    started = HParamsPluginData.FromString(values["_hparams_/session_start_info"].metadata.plugin_data.content)
    hyperparameters = started.session_start_info.hparams
    assert hyperparameters["epochs"].number_value == 50
    assert hyperparameters["arch_arguments.dense_units"].number_value == 8
    assert hyperparameters["arch_arguments.later_filters"].string_value == "[4, 8]"


def test_an_unknown_tracker_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match="--track 'paper' is unknown; choose from tensorboard, mlflow, wandb"):
        check_trackers(["paper"], str(tmp_path))
    check_trackers(["tensorboard"], str(tmp_path))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_whose_package_is_missing_is_refused_with_how_to_install_it(monkeypatch, tmp_path, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"--track {name} needs .*: pip install -e '.\[{name}\]'"):
        check_trackers([name], str(tmp_path))


@pytest.fixture
def mlflow(monkeypatch):
    """MLflow without a server, as it is found; the variables that are set for it are restored."""
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return mlflow


def test_mlflow_gets_config_metrics_result_and_files_beside_the_runs_once(finished, mlflow, tmp_path):
    check_trackers(["mlflow"], str(tmp_path / "runs"))
    end_trackers(["mlflow"], finished)
    # Trained on for more epochs.
    longer = {**HISTORY[1], "epoch": 3.0, "step": 6.0, "val_loss": 0.5}
    config = finished.config.model_copy(update={"epochs": 60})
    end_trackers(["mlflow"], FinishedRun(finished.folder, config, [*HISTORY, longer], finished.result))
    assert (tmp_path / "runs" / "mlruns").is_dir()
    client = mlflow.MlflowClient()
    (logged,) = client.search_runs(["0"])
    assert logged.info.run_name == "first"
    assert (logged.data.params["epochs"], logged.data.params["arch_arguments.dense_units"]) == ("50", "8")
    assert [(one.step, one.value) for one in client.get_metric_history(logged.info.run_id, "val_loss")] == [
        (2, 1.5), (4, 0.75), (6, 0.5)
    ]  # fmt: skip
    assert logged.data.metrics["best_val_accuracy"] == pytest.approx(51 / 66)
    artifacts = {one.path for folder in ("", "plots") for one in client.list_artifacts(logged.info.run_id, folder)}
    assert artifacts >= {"note.md", "model.keras", "plots/confusion.png", "plots/mistakes.png"}


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The variables of Weights & Biases, which are restored."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_ERROR_REPORTING", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_wandb_keeps_the_run_beside_the_runs_when_it_is_offline(finished, wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"], str(tmp_path / "runs"))
    end_trackers(["wandb"], finished)
    (log,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for expected in (b"val_loss", b"0.75", b"arch_arguments.dense_units", b"best_val_accuracy", b"note.md", b"first"):
        assert expected in content


def test_wandb_without_a_key_is_refused_and_asks_for_none(wandb, tmp_path):
    with pytest.raises(InputError, match="there is no key; set WANDB_API_KEY, or WANDB_MODE=offline"):
        check_trackers(["wandb"], str(tmp_path))


def test_an_mlflow_server_that_does_not_answer_is_named(mlflow, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"http://127.0.0.1:9 does not answer .*set MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"], str(tmp_path))
