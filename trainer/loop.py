"""The training loop: what every Ray Train worker runs.

Order at the start of an attempt: data, network, then its state: the last complete checkpoint of this run if there is
one, else the weights of --init-from if there are any, else the seeded initialisation.
"""

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.train
import tensorflow as tf
from ray.train.collective import broadcast_from_rank_zero

from trainer import checkpoint as checkpoints
from trainer import storage
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig, resize_batch
from trainer.dataset import BatchFeed, ImageSplit, epoch_order, open_split, worker_rows
from trainer.devices import peak_memory_gib, share_devices
from trainer.evaluation import Evaluator, mean_loss_and_accuracy, predictions_table
from trainer.events import EpochFinished, StageProgressed, WeightsTransferred
from trainer.export import write_exports
from trainer.job import WorkerJob, WorkerResult
from trainer.layers import format_layers
from trainer.plots import write_mistakes
from trainer.run_folder import RunFolder
from trainer.step import (
    STEP_ACCURACY,
    STEP_CLIPPED,
    STEP_GRAD_NORM,
    STEP_LOSS,
    Network,
    build_network,
    compile_eval_step,
    compile_gather,
    compile_train_step,
    swap_averages,
)
from trainer.tracking import write_tensorboard
from trainer.transfer import read_weights

_PROGRESS_INTERVAL_SECONDS = 0.5
# Every worker looks at the same loss at the same steps, so all stop together.
_STEPS_BETWEEN_FINITE_CHECKS = 50
# The columns of a training step's answer, after its number.
STEPS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("loss", pa.float32()),
        ("accuracy", pa.float32()),
        ("grad_norm", pa.float32()),
        ("clipped", pa.float32()),
    ]
)


class DivergedError(Exception):
    """The loss became NaN or infinite; the message says between which steps."""


def train_worker(job: WorkerJob) -> WorkerResult:
    """Trains the run's network from its last checkpoint, or from scratch, to its last epoch."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    share_devices(context.get_local_world_size())
    run = RunFolder(job.run)
    config = resize_batch(job.config, num_workers, job.largest_per_replica)
    attempt = broadcast_from_rank_zero(run.start_attempt() if rank == 0 else None)

    splits = {name: open_split(config.dataset, job.manifest, name) for name in ("train", "val")}
    steps_per_epoch = len(splits["train"]) // config.global_batch_size
    last = broadcast_from_rank_zero(checkpoints.find_last(run.checkpoints) if rank == 0 else None)
    initial_weights = read_weights(config.init_from) if config.init_from and last is None else None
    network = build_network(job.manifest, config, steps_per_epoch, initial_weights)
    if network.transferred and rank == 0:
        job.send_event(WeightsTransferred(network.transferred))
    train_step = compile_train_step(network, job.manifest, config)
    eval_step, gather = compile_eval_step(network, job.manifest, config), compile_gather(network)

    def evaluator(split: ImageSplit) -> Evaluator:
        return Evaluator(split, config.per_replica_batch_size, rank, num_workers, eval_step, gather)

    history: list[dict[str, float]] = []
    steps = STEPS_SCHEMA.empty_table()
    if last is not None:
        _restore(network, run, last)
        swap_averages(network)
        history = list(last.history)
        if history[-1]["global_batch_size"] != config.global_batch_size:
            # The schedule counts steps: it goes on where as many epochs of this batch would have led.
            network.optimizer.iterations.assign(len(history) * steps_per_epoch)
        steps = storage.parquet_table(checkpoints.read_file(run.checkpoints, last, checkpoints.STEPS_NAME))

    reason = ""
    with _background_writer() as write:
        try:
            for epoch in range(len(history) + 1, config.epochs + 1):
                started = time.perf_counter()
                row, epoch_steps = _train_epoch(
                    job, config, splits["train"], train_step, rank, epoch, int(history[-1]["step"]) if history else 0
                )
                steps = pa.concat_tables([steps, epoch_steps])
                swap_averages(network)
                outcomes = evaluator(splits["val"]).evaluate()
                row["val_loss"], row["val_accuracy"] = mean_loss_and_accuracy(outcomes, splits["val"].labels)
                row["learning_rate"] = float(network.optimizer.learning_rate.numpy())
                waited, peak = gather([[row["data_wait_seconds"], peak_memory_gib()]]).max(axis=0)
                row["data_wait_seconds"], row["peak_memory_gib"] = float(waited), float(peak)
                row |= {"attempt": attempt, "num_workers": num_workers, "global_batch_size": config.global_batch_size}
                row["epoch_seconds"] = time.perf_counter() - started
                history = [*history, row]
                arrays = (
                    checkpoints.read_variables(network.model.variables),
                    checkpoints.read_variables(network.optimizer_variables),
                )
                swap_averages(network)
                if rank == 0:
                    tables = (steps, predictions_table(outcomes, splits["val"].labels))
                    write(lambda *parts: _save(job, *parts), epoch, row["step"], history, arrays, tables)
                    job.send_event(EpochFinished(row, config.epochs))
        except DivergedError as error:
            reason = str(error)

    weights_crc32 = _gather_weights_crc32(network, gather)
    best = broadcast_from_rank_zero(checkpoints.find_best(run.checkpoints) if rank == 0 else None)
    if best is not None and config.evaluate_test and not reason:
        _restore(network, run, best)
        test = open_split(config.dataset, job.manifest, "test")
        if rank == 0:
            run.record_test_read("train.py")
        table = predictions_table(evaluator(test).evaluate(), test.labels)
        if rank == 0:
            storage.write_bytes(run.path("test_predictions.parquet"), storage.parquet_bytes(table))
    if best is not None and rank == 0:
        content = checkpoints.read_file(run.checkpoints, best, checkpoints.MODEL_NAME)
        write_exports(run, checkpoints.from_safetensors(content), job.manifest, config)
        predictions = checkpoints.read_file(run.checkpoints, best, checkpoints.PREDICTIONS_NAME)
        write_mistakes(run, splits["val"].images, storage.parquet_table(predictions), job.manifest.class_names)
    return WorkerResult(reason, attempt, network.model.count_params(), format_layers(network.model), weights_crc32)


def _gather_weights_crc32(network: Network, gather: Callable[[Any], Any]) -> tuple[int, ...]:
    """Returns the checksum of every worker's weights.

    Raises:
        RuntimeError: they differ, so the workers did not train one network.
    """
    checksum = 0
    for array in checkpoints.read_variables(network.model.variables).values():
        checksum = zlib.crc32(array.tobytes(), checksum)
    # Two halves, since float32 holds integers up to 2**24 exactly.
    halves = gather([[checksum >> 16, checksum & 0xFFFF]]).astype(np.int64)
    of_workers = tuple(int(high << 16 | low) for high, low in halves)
    if len(set(of_workers)) > 1:
        raise RuntimeError(f"the workers hold different weights (CRC-32 by rank: {of_workers}); report this as a bug")
    return of_workers


def _restore(network: Network, run: RunFolder, checkpoint: Checkpoint) -> None:
    for name, variables in (
        (checkpoints.MODEL_NAME, network.model.variables),
        (checkpoints.OPTIMIZER_NAME, network.optimizer_variables),
    ):
        content = checkpoints.read_file(run.checkpoints, checkpoint, name)
        with network.strategy.scope():
            checkpoints.assign_variables(variables, checkpoints.from_safetensors(content))


def _train_epoch(
    job: WorkerJob,
    config: TrainConfig,
    split: ImageSplit,
    train_step: Callable[[Any, Any], Any],
    rank: int,
    epoch: int,
    first_step: int,
) -> tuple[dict[str, float], pa.Table]:
    """Takes every optimizer step of one epoch.

    Returns:
        The part of the epoch's metrics row that training knows, and one row a step.
    """
    steps_per_epoch = len(split) // config.global_batch_size
    order = epoch_order(len(split), config.seed, epoch)

    def make_batch(step: int) -> tuple[Any, Any]:
        rows = worker_rows(order, step, config.global_batch_size, rank, config.num_workers)
        return tf.constant(split.images[rows]), tf.constant(split.labels[rows])

    feed = BatchFeed()
    started = last_event = time.perf_counter()
    stats: list[Any] = []
    for images, labels in feed.batches(make_batch, range(steps_per_epoch)):
        stats.append(train_step(images, labels))
        if len(stats) % _STEPS_BETWEEN_FINITE_CHECKS == 0:
            _check_finite(stats, first_step, config.precision)
        if rank == 0 and time.perf_counter() - last_event > _PROGRESS_INTERVAL_SECONDS:
            last_event = time.perf_counter()
            job.send_event(StageProgressed(f"epoch {epoch}", len(stats), steps_per_epoch))
    _check_finite(stats, first_step, config.precision)
    seconds = time.perf_counter() - started
    by_step = np.stack(stats)
    # Not of the gradients that loss scaling left out.
    means: npt.NDArray[np.float64] = by_step.mean(axis=0, dtype=np.float64, where=np.isfinite(by_step))
    row = {
        "epoch": epoch,
        "step": first_step + steps_per_epoch,
        "loss": float(means[STEP_LOSS]),
        "accuracy": float(means[STEP_ACCURACY]),
        "grad_norm": float(means[STEP_GRAD_NORM]),
        "clipped_fraction": float(means[STEP_CLIPPED]),
        "images_per_second": steps_per_epoch * config.global_batch_size / seconds,
        "data_wait_seconds": feed.wait_seconds,
    }
    numbers = pa.array(range(first_step + 1, first_step + steps_per_epoch + 1), pa.int64())
    return row, pa.table([numbers, *by_step.T.astype(np.float32)], schema=STEPS_SCHEMA)


def _check_finite(stats: list[Any], first_step: int, precision: str) -> None:
    last = np.asarray(stats[-1])
    # A float16 gradient that overflowed is what loss scaling is for: the step is left out and the scale is halved.
    watched = [STEP_LOSS] if precision == "mixed_float16" else [STEP_LOSS, STEP_GRAD_NORM]
    if not np.isfinite(last[watched]).all():
        unchecked = (len(stats) - 1) % _STEPS_BETWEEN_FINITE_CHECKS + 1
        steps = f"[{first_step + len(stats) - unchecked + 1}, {first_step + len(stats)}]"
        raise DivergedError(f"the loss or its gradient became nan or inf somewhere within steps {steps}")


@contextlib.contextmanager
def _background_writer() -> Iterator[Callable[..., None]]:
    """Yields a function that calls another one in a thread while training goes on, one at a time.

    An error of the thread is raised at the next call or at the end of the context.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as writer:
        pending: Future[None] | None = None

        def write(function: Callable[..., None], *arguments: Any) -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = writer.submit(function, *arguments)

        yield write
        if pending is not None:
            pending.result()


def _save(
    job: WorkerJob,
    epoch: int,
    step: int,
    history: list[dict[str, float]],
    arrays: tuple[checkpoints.Arrays, checkpoints.Arrays],
    tables: tuple[pa.Table, pa.Table],
) -> None:
    run, (model, optimizer), (steps, predictions) = RunFolder(job.run), arrays, tables
    files = {
        checkpoints.MODEL_NAME: checkpoints.to_safetensors(model),
        checkpoints.OPTIMIZER_NAME: checkpoints.to_safetensors(optimizer),
        checkpoints.STEPS_NAME: storage.parquet_bytes(steps),
        checkpoints.PREDICTIONS_NAME: storage.parquet_bytes(predictions),
    }
    checkpoints.save_checkpoint(run.checkpoints, epoch, step, history, files)
    checkpoints.delete_old_checkpoints(run.checkpoints, job.config.keep_best)
    run.write_metrics(history)
    run.write_steps(steps)
    if "tensorboard" in job.trackers:
        write_tensorboard(run, history)
