"""Where metrics go in addition to the run folder: TensorBoard event files in it, or an MLflow server."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.config.config import TrainConfig
from trainer.record.epoch_row import Metrics
from trainer.record.run_folder import RunFolder, RunResult
from trainer.runtime.errors import InputError, JobError

TRACKERS = ("tensorboard", "mlflow")

History = Sequence[Metrics]


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError if a tracker is unknown, its package is not installed, or its server does not answer."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track {name!r} is unknown; choose from {', '.join(TRACKERS)}")
    if "mlflow" in names and importlib.util.find_spec("mlflow") is None:
        raise InputError("--track mlflow needs a package that is not installed: pip install -e '.[mlflow]'")
    if "mlflow" in names:
        # By default, MLflow waits minutes for a server that does not exist.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        try:
            mlflow.MlflowClient().search_experiments(max_results=1)
        except mlflow.MlflowException as error:
            uri = mlflow.get_tracking_uri()
            raise InputError(f"--track mlflow: {uri} does not answer ({error}); set MLFLOW_TRACKING_URI") from error


def write_tensorboard(run: RunFolder, history: History) -> None:
    """Rewrite ``tensorboard/events.out.tfevents.0.training-notes`` with all epochs so far.

    It is always the same file, rewritten: an object store cannot append, and a resumed run then repeats no epoch.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in history:
                for name, value in row.items():
                    if not isinstance(value, str):
                        writer.add_scalar(name, value, int(row["step"]))
        (written,) = Path(folder).iterdir()
        content = written.read_bytes()
    run.write(content, "tensorboard", "events.out.tfevents.0.training-notes")


def log_to_mlflow(run: RunFolder, config: TrainConfig, history: History, result: RunResult) -> None:
    """Log a finished run to the server that MLFLOW_TRACKING_URI names, as one MLflow run with the same name.

    Raises:
        JobError: the server refused the run.
    """
    import mlflow

    try:
        with mlflow.start_run(run_name=run.name):
            mlflow.log_params(config.model_dump())
            for row in history:
                metrics = {name: value for name, value in row.items() if name != "step" and not isinstance(value, str)}
                mlflow.log_metrics(metrics, step=int(row["step"]))
            mlflow.log_metrics({"best_val_accuracy": result.val.accuracy, "best_val_loss": result.val.loss})
            mlflow.set_tags({"status": result.status, "run_folder": run.uri})
    except mlflow.MlflowException as error:
        raise JobError(
            f"--track mlflow: {error}; {run.uri} holds the complete run; give the same command to log it again"
        ) from error
