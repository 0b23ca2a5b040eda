"""Where a run goes in addition to its folder: event files for TensorBoard in it, MLflow, and Weights & Biases.

TensorBoard gets each epoch when it ends. The others get the whole run at its end, from the driver, so that it is logged
once, whatever the number of workers and attempts; a run that is trained on goes on in the same run of the tracker.
"""

import hashlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from trainer.config.config import TrainConfig
from trainer.record.epoch_row import Metrics
from trainer.record.run_folder import RunFolder, RunResult
from trainer.runtime import storage
from trainer.runtime.errors import InputError, JobError

History = Sequence[Metrics]

# What is the same in each epoch, or is an axis.
_NO_CURVES = ("epoch", "step", "attempt", "num_workers", "global_batch_size", "started_from")
_STEP_CURVES = ("loss", "accuracy", "grad_norm")
_FIGURES = ("confusion", "mistakes")
_EVENT_FILE = "events.out.tfevents.{}.training-notes"
# After those of all epochs, which have numbers.
_END_FILE = _EVENT_FILE.format("end")
_PROJECT = "training-notes"


@dataclass(frozen=True)
class FinishedRun:
    """A run whose plots and note are written."""

    folder: RunFolder
    config: TrainConfig
    history: History
    result: RunResult

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the content of each file that people look at, and of the model."""
        plots = [f"plots/{name}" for name in storage.find_files(self.folder.path("plots"))]
        for name in ("note.md", *plots, "model.keras"):
            yield name, storage.read_bytes(self.folder.path(name))


def check_trackers(names: Sequence[str], storage_uri: str) -> None:
    """Check that trackers can be used.

    Args:
        names: names of trackers.
        storage_uri: where runs are, beside which MLflow keeps its own if no server is named.

    Raises:
        InputError: a tracker is unknown, its package is not installed, or its server does not answer.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track {name!r} is unknown; choose from {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise InputError(f"--track {name} needs a package that is not installed: pip install -e '.[{name}]'")
        TRACKERS[name].check(storage_uri)


def write_tensorboard_epoch(run: RunFolder, history: History, steps: pa.Table) -> None:
    """Write the last epoch of a history for TensorBoard: one file with train and one with val metrics.

    Metrics of both have the same names, so that they share a chart. The file of an epoch is written whole, since an
    object store cannot append, and replaced if the epoch is repeated.

    Args:
        run: the run folder.
        history: metrics of each epoch.
        steps: the table of ``steps.parquet``.
    """
    row, before = history[-1], history[-2]["step"] if len(history) > 1 else 0
    curves = {name: value for name, value in row.items() if name not in _NO_CURVES and not isinstance(value, str)}
    val = {name.removeprefix("val_"): value for name, value in curves.items() if name.startswith("val_")}
    train = {name: value for name, value in curves.items() if not name.startswith("val_")}
    taken = steps.filter((pc.field("step") > before) & (pc.field("step") <= row["step"]))
    name = _EVENT_FILE.format(f"{int(row['epoch']):06d}")
    with _event_file(run, "train", name) as writer:
        for of_step in taken.select(["step", *_STEP_CURVES]).to_pylist():
            for curve in _STEP_CURVES:
                writer.add_scalar(f"step/{curve}", of_step[curve], of_step["step"])
        _add_scalars(writer, train, row["step"])
    with _event_file(run, "val", name) as writer:
        _add_scalars(writer, val, row["step"])


def _add_scalars(writer: Any, values: Mapping[str, float], step: float) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, int(step))


@contextmanager
def _event_file(run: RunFolder, folder: str, name: str) -> Iterator[Any]:
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as written_to:
        with SummaryWriter(written_to) as writer:
            yield writer
        (written,) = Path(written_to).iterdir()
        content = written.read_bytes()
    run.write(content, "tensorboard", folder, name)


def _end_tensorboard(finished: FinishedRun) -> None:
    """Write the options as hyperparameters, with the result, and the figures."""
    from tensorboardX.summary import hparams

    result = finished.result
    best = {"best_accuracy": result.val.accuracy, "best_loss": result.val.loss}
    with _event_file(finished.folder, "val", _END_FILE) as writer:
        for summary in hparams(_flatten(finished.config), best):
            writer.file_writer.add_summary(summary)
        _add_scalars(writer, best, result.steps)
        for name in _FIGURES:
            picture = Image.open(io.BytesIO(storage.read_bytes(finished.folder.path("plots", f"{name}.png"))))
            writer.add_image(name, np.asarray(picture.convert("RGB")), result.steps, dataformats="HWC")


def _flatten(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a run with each argument under a name of its own."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        of_name = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: str(one) if isinstance(one, list) else one for key, one in of_name.items()}
    return flat


def _check_mlflow(storage_uri: str) -> None:
    # By default, MLflow waits minutes for a server that does not exist.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        root = storage_uri if storage.is_local(storage_uri) else "."
        os.environ["MLFLOW_TRACKING_URI"] = Path(root, "mlruns").absolute().as_uri()
        # The other local store needs a database that the client alone does not bring.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    import mlflow

    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except mlflow.MlflowException as error:
        uri = mlflow.get_tracking_uri()
        raise InputError(f"--track mlflow: {uri} does not answer ({error}); set MLFLOW_TRACKING_URI") from error


def _log_to_mlflow(finished: FinishedRun) -> None:
    """Log a run, with its note, plots and model, as one MLflow run of the same name.

    Raises:
        JobError: the server refused the run.
    """
    import mlflow

    run, result = finished.folder, finished.result
    try:
        known = mlflow.search_runs(filter_string=f"tags.run_folder = '{run.uri}'", output_format="list")
        with (
            mlflow.start_run(run_id=known[0].info.run_id if known else None, run_name=run.name),
            tempfile.TemporaryDirectory() as folder,
        ):
            logged = known[0].data if known else None
            # A parameter cannot be changed, such as the epochs of a run that is trained on.
            mlflow.log_params(
                {k: v for k, v in _flatten(finished.config).items() if not logged or k not in logged.params}
            )
            known_steps = {one.step for one in _history_of(known)}
            for row in finished.history:
                if int(row["step"]) not in known_steps:
                    values = {name: one for name, one in row.items() if name != "step" and not isinstance(one, str)}
                    mlflow.log_metrics(values, step=int(row["step"]))
            mlflow.log_metrics({"best_val_accuracy": result.val.accuracy, "best_val_loss": result.val.loss})
            mlflow.set_tags({"status": result.status, "run_folder": run.uri})
            _write_files(finished, Path(folder))
            mlflow.log_artifacts(folder)
    except mlflow.MlflowException as error:
        raise JobError(
            f"--track mlflow: {error}; {run.uri} holds the complete run; give the same command to log it again"
        ) from error


def _history_of(known: Sequence[Any]) -> Sequence[Any]:
    """Return the losses that an MLflow run has already, each with its step."""
    import mlflow

    history: Sequence[Any] = mlflow.MlflowClient().get_metric_history(known[0].info.run_id, "loss") if known else []
    return history


def _write_files(finished: FinishedRun, folder: Path) -> None:
    for name, content in finished.files():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _check_nothing(storage_uri: str) -> None:
    pass


def _check_wandb(storage_uri: str) -> None:
    # A batch job must not report its errors to a third party.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if storage.is_local(storage_uri):
        os.environ.setdefault("WANDB_DIR", storage_uri)
    import wandb

    is_offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
    # Otherwise it would ask for one.
    if not is_offline and not wandb.login(prompt=False):
        raise InputError("--track wandb: there is no key; set WANDB_API_KEY, or WANDB_MODE=offline")


def _log_to_wandb(finished: FinishedRun) -> None:
    """Log a run, with its note, plots and model, as one run of Weights & Biases of the same name.

    Raises:
        JobError: the service refused the run.
    """
    import wandb

    run, result = finished.folder, finished.result
    identity = hashlib.sha256(f"{run.uri} {finished.config.dataset_fingerprint}".encode()).hexdigest()[:16]
    try:
        with (
            wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=run.name,
                id=identity,
                resume="allow",
                config=_flatten(finished.config),
                # The note has the code version and the hardware.
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
                ),
            ) as logged,
            tempfile.TemporaryDirectory() as folder,
        ):
            for row in finished.history:
                values = {name: one for name, one in row.items() if name not in ("step", "stage", "augmentation")}
                logged.log(values, step=int(row["step"]))
            _write_files(finished, Path(folder))
            logged.log({name: wandb.Image(str(Path(folder, "plots", f"{name}.png"))) for name in _FIGURES})
            logged.summary.update({"best_val_accuracy": result.val.accuracy, "best_val_loss": result.val.loss})
            artifact = wandb.Artifact(f"run-{identity}", type="run")
            artifact.add_dir(folder)
            logged.log_artifact(artifact)
        # The end of a run does not wait until its last records are in the file.
        wandb.teardown()
    except wandb.Error as error:
        raise JobError(
            f"--track wandb: {error}; {run.uri} holds the complete run; give the same command to log it again"
        ) from error


@dataclass(frozen=True)
class Tracker:
    """Where a run can be logged."""

    package: str
    """The package of the extra of the tracker's name; empty if none is needed."""
    check: Callable[[str], None]
    """Raises InputError if it cannot be used; takes the URI of the storage of the runs."""
    end: Callable[[FinishedRun], None]
    """Logs what is known at the end of a run."""


TRACKERS: Mapping[str, Tracker] = {
    "tensorboard": Tracker("", _check_nothing, _end_tensorboard),
    "mlflow": Tracker("mlflow", _check_mlflow, _log_to_mlflow),
    "wandb": Tracker("wandb", _check_wandb, _log_to_wandb),
}


def end_trackers(names: Sequence[str], finished: FinishedRun) -> None:
    """Log what is known at the end of a run.

    Raises:
        JobError: a tracker refused the run.
    """
    for name in names:
        finished.folder.check_owner()
        TRACKERS[name].end(finished)
