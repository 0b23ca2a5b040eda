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
from ray.train.collective import broadcast_from_rank_zero

from trainer.architectures.source import format_layers
from trainer.config.config import TrainConfig, resize_batch
from trainer.record import checkpoint as checkpoints
from trainer.record.checkpoint import Checkpoint, Position
from trainer.record.epoch_row import EpochRow
from trainer.record.evaluation_result import find_mistakes
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.events import (
    AttemptStarted,
    CheckpointsSetAside,
    EpochFinished,
    StageProgressed,
    StepProfiled,
    WeightsTransferred,
)
from trainer.training.batches import make_batch
from trainer.training.dataset import BatchFeed, ImageSplit, epoch_order, open_split, worker_rows
from trainer.training.devices import peak_memory_gib, share_devices
from trainer.training.evaluation import Evaluator, mean_loss_and_accuracy, predictions_table
from trainer.training.export import write_exports
from trainer.training.job import WorkerJob, WorkerResult
from trainer.training.profile import StepProfiler
from trainer.training.step import (
    STEP_GRAD_NORM,
    STEP_LOSS,
    Network,
    averaged_weights,
    build_network,
    compile_eval_step,
    compile_gather,
    compile_train_step,
)
from trainer.training.tracking import write_tensorboard
from trainer.training.transfer import read_weights

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


Writer = Callable[..., None]


class DivergedError(Exception):
    """The loss became NaN or infinite; the message says between which steps."""


def train_worker(job: WorkerJob) -> WorkerResult:
    """Trains the run's network from its last checkpoint, or from scratch, to its last epoch."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    share_devices(context.get_local_world_size())
    run = RunFolder(job.run, job.lease)
    config = resize_batch(job.config, num_workers, job.largest_per_replica)
    attempt = broadcast_from_rank_zero(run.start_attempt() if rank == 0 else None)
    last = broadcast_from_rank_zero(_find_last(job, run) if rank == 0 else None)
    if rank == 0 and attempt > 1:
        job.send_event(_describe_attempt(attempt, last, config))
    training = _Training(job, run, config, rank, attempt, last)
    reason = training.run()

    network = training.network
    weights_crc32 = _gather_weights_crc32(network, training.gather)
    best = broadcast_from_rank_zero(_find_best(job, run) if rank == 0 else None)
    if best is not None and config.evaluate_test and not reason:
        _restore(network, run, best)
        test = open_split(config.dataset, job.manifest, "test")
        if rank == 0:
            run.record_test_read("train.py")
        table = predictions_table(training.evaluate(test), test.labels)
        if rank == 0:
            run.write(storage.parquet_bytes(table), "test_predictions.parquet")
    mistakes = training.val.images[:0]
    if best is not None and rank == 0:
        content = checkpoints.read_file(run.checkpoints, best, checkpoints.MODEL_NAME)
        write_exports(run, checkpoints.from_safetensors(content), job.manifest, config)
        predictions = checkpoints.read_file(run.checkpoints, best, checkpoints.PREDICTIONS_NAME)
        mistakes = training.val.images[find_mistakes(storage.parquet_table(predictions))]
    layers = format_layers(network.model)
    return WorkerResult(reason, attempt, network.model.count_params(), layers, weights_crc32, np.array(mistakes))


def _find_last(job: WorkerJob, run: RunFolder) -> Checkpoint | None:
    """Return the last checkpoint that is whole, and tell of those that are not."""
    last, damaged = checkpoints.find_whole(run.checkpoints, checkpoints.find_last, run.check_owner)
    goes_on = f"training goes on from step {last.step}" if last else "no other is whole: training begins anew"
    _tell_of_damage(job, run, damaged, goes_on)
    return last


def _find_best(job: WorkerJob, run: RunFolder) -> Checkpoint | None:
    """Return the best checkpoint that is whole, and tell of those that are not."""
    best, damaged = checkpoints.find_whole(run.checkpoints, checkpoints.find_best, run.check_owner)
    used = f"the best of the others, that of epoch {best.epoch}, takes its place" if best else "no other is whole"
    _tell_of_damage(job, run, damaged, used)
    return best


def _tell_of_damage(job: WorkerJob, run: RunFolder, damaged: list[str], instead: str) -> None:
    if damaged:
        event = CheckpointsSetAside(tuple(damaged), instead)
        run.record_recovery(str(event))
        job.send_event(event)


def _describe_attempt(attempt: int, last: Checkpoint | None, config: TrainConfig) -> AttemptStarted:
    if last is None:
        return AttemptStarted(attempt, step=0, epoch=1, num_workers=config.num_workers)
    return AttemptStarted(
        attempt, step=last.step, epoch=min(last.epoch + 1, config.epochs), num_workers=config.num_workers
    )


class _Training:
    """A network on its way through the epochs, and what is known of the way so far."""

    def __init__(
        self, job: WorkerJob, run: RunFolder, config: TrainConfig, rank: int, attempt: int, last: Checkpoint | None
    ) -> None:
        self._job, self._run, self._config, self._rank, self._attempt = job, run, config, rank, attempt
        self._lineage = (*last.lineage, (last.attempt, last.step)) if last else ()
        self._train, self.val = (open_split(config.dataset, job.manifest, name) for name in ("train", "val"))
        initial_weights = read_weights(config.init_from) if config.init_from and last is None else None
        steps_per_epoch = len(self._train) // config.global_batch_size
        self.network = build_network(job.manifest, config, steps_per_epoch, initial_weights)
        if self.network.transferred and rank == 0:
            job.send_event(WeightsTransferred(self.network.transferred))
        self._train_step = compile_train_step(self.network, job.manifest, config)
        self._eval_step = compile_eval_step(self.network, job.manifest, config)
        self.gather = compile_gather(self.network)
        self._history: list[dict[str, float]] = []
        self._steps = STEPS_SCHEMA.empty_table()
        # Of the epoch that is not finished.
        self._epoch_rows = 0
        self._checkpoint_seconds = 0.0
        self._profiler = StepProfiler(self._run, rank, job.profile_steps)
        if last is not None:
            self._continue(last, steps_per_epoch)

    def _continue(self, last: Checkpoint, steps_per_epoch: int) -> None:
        with averaged_weights(self.network):
            _restore(self.network, self._run, last)
        self._history, self._epoch_rows = list(last.history), last.epoch_rows
        self._steps = storage.parquet_table(checkpoints.read_file(self._run.checkpoints, last, checkpoints.STEPS_NAME))
        if last.global_batch_size != self._config.global_batch_size:
            # The schedule counts steps: it goes on where as many epochs of this batch would have led.
            in_epoch = self._epoch_rows // self._config.global_batch_size
            self.network.optimizer.iterations.assign(len(self._history) * steps_per_epoch + in_epoch)

    def run(self) -> str:
        """Trains to the last epoch; returns why it ended early, or an empty string."""
        with _background_writer() as write:
            try:
                while len(self._history) < self._config.epochs:
                    row = self._run_epoch(write)
                    if self._rank == 0:
                        self._job.send_event(EpochFinished(row.to_metrics(), self._config.epochs))
            except DivergedError as error:
                return str(error)
            finally:
                self._tell(self._profiler.close())
        return ""

    def _run_epoch(self, write: Writer) -> EpochRow:
        """Take what is left of an epoch's steps, evaluate, save a checkpoint, and return the epoch's metrics."""
        started = time.perf_counter()
        images_per_second, wait_seconds = self._take_steps(write)
        with averaged_weights(self.network):
            outcomes = self.evaluate(self.val)
            row = self._summarize_epoch(outcomes, images_per_second, wait_seconds, started)
            self._history, self._epoch_rows, self._checkpoint_seconds = [*self._history, row.to_metrics()], 0, 0.0
            self._save(write, {checkpoints.PREDICTIONS_NAME: predictions_table(outcomes, self.val.labels)})
        return row

    def _summarize_epoch(
        self, outcomes: npt.NDArray[np.float32], images_per_second: float, wait_seconds: float, started: float
    ) -> EpochRow:
        """Return the metrics of the epoch whose steps were taken; all workers must call it.

        Args:
            outcomes: of the validation split, from `evaluate`.
            images_per_second: of the steps of this attempt.
            wait_seconds: that this worker waited for batches.
            started: when the epoch began, by `time.perf_counter`.

        Raises:
            DivergedError: the validation loss is not finite.
        """
        epoch, config = len(self._history) + 1, self._config
        val_loss, val_accuracy = mean_loss_and_accuracy(outcomes, self.val.labels)
        if not np.isfinite(val_loss):
            # The last step of the epoch was still finite, and what it did to the weights is not.
            raise DivergedError(f"the validation loss became nan or inf in epoch {epoch}")
        longest_wait, peak_memory = self.gather([[wait_seconds, peak_memory_gib()]]).max(axis=0)
        of_epoch = self._steps.slice(int(self._history[-1]["step"]) if self._history else 0)
        return EpochRow(
            epoch=epoch,
            step=self._steps.num_rows,
            loss=_finite_mean(of_epoch["loss"]),
            accuracy=_finite_mean(of_epoch["accuracy"]),
            learning_rate=float(self.network.optimizer.learning_rate.numpy()),
            grad_norm=_finite_mean(of_epoch["grad_norm"]),
            clipped_fraction=_finite_mean(of_epoch["clipped"]),
            images_per_second=images_per_second,
            data_wait_seconds=float(longest_wait),
            attempt=self._attempt,
            num_workers=config.num_workers,
            global_batch_size=config.global_batch_size,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            peak_memory_gib=float(peak_memory),
            checkpoint_seconds=self._checkpoint_seconds,
            epoch_seconds=time.perf_counter() - started,
        )

    def evaluate(self, split: ImageSplit) -> npt.NDArray[np.float32]:
        """Returns what the model says of every row of a split, in row order: see `trainer.training.evaluation`."""
        config = self._config
        return Evaluator(
            split, config.per_replica_batch_size, self._rank, config.num_workers, self._eval_step, self.gather
        ).evaluate()

    def _take_steps(self, write: Writer) -> tuple[float, float]:
        """Take the optimizer steps of an epoch that were not taken yet.

        Returns:
            Images per second, and the seconds that this worker waited for batches.
        """
        config, epoch = self._config, len(self._history) + 1
        order = epoch_order(len(self._train), config.seed, epoch)[self._epoch_rows :]
        first_step = self._steps.num_rows
        num_steps = len(order) // config.global_batch_size

        def batch_of_step(step: int) -> tuple[Any, Any]:
            rows = worker_rows(order, step, config.global_batch_size, self._rank, config.num_workers)
            return make_batch(self._train, rows)

        feed = BatchFeed()
        started = last_event = time.perf_counter()
        stats: list[Any] = []
        for images, labels in feed.batches(batch_of_step, range(num_steps)):
            stats.append(self._train_step(images, labels))
            taken = len(stats)
            is_traced = self._profiler.after_step(stats[-1], feed.wait_seconds, is_last=taken == num_steps)
            self._epoch_rows += config.global_batch_size
            if taken % _STEPS_BETWEEN_FINITE_CHECKS == 0:
                _check_finite(stats, first_step, config.precision)
            if self._rank == 0 and time.perf_counter() - last_event > _PROGRESS_INTERVAL_SECONDS:
                last_event = time.perf_counter()
                self._job.send_event(StageProgressed(f"epoch {epoch}", taken, num_steps))
            is_due = config.checkpoint_every and (first_step + taken) % config.checkpoint_every == 0
            if (is_due and taken < num_steps) or is_traced:
                _check_finite(stats, first_step, config.precision)
                self._keep_steps(stats, first_step)
                with averaged_weights(self.network):
                    self._save(write, {})
            if is_traced:
                # Whatever TensorFlow does while it collects the trace, no step is lost by it.
                write(_wait_for_checkpoint)
                self._tell(self._profiler.close())
        _check_finite(stats, first_step, config.precision)
        self._keep_steps(stats, first_step)
        seconds = time.perf_counter() - started
        return num_steps * config.global_batch_size / seconds, feed.wait_seconds

    def _tell(self, profiled: StepProfiled | None) -> None:
        if profiled is not None and self._rank == 0:
            self._job.send_event(profiled)

    def _keep_steps(self, stats: list[Any], first_step: int) -> None:
        """Adds the answers of the steps that are not in the table yet."""
        known = self._steps.num_rows
        self._steps = pa.concat_tables([self._steps, _steps_table(stats[known - first_step :], known)])

    def _save(self, write: Writer, tables: dict[str, pa.Table]) -> None:
        """Starts to write a checkpoint of this moment; training goes on meanwhile.

        Every worker reads its variables, since that communicates; the first one writes.
        """
        started = time.perf_counter()
        arrays = {
            checkpoints.MODEL_NAME: checkpoints.read_variables(self.network.model.variables),
            checkpoints.OPTIMIZER_NAME: checkpoints.read_variables(self.network.optimizer_variables),
        }
        if self._rank == 0:
            position = Position(
                epoch=len(self._history),
                epoch_rows=self._epoch_rows,
                step=self._steps.num_rows,
                global_batch_size=self._config.global_batch_size,
                history=self._history,
                attempt=self._attempt,
                lineage=self._lineage,
            )
            tables = {checkpoints.STEPS_NAME: self._steps, **tables}
            write(_write_checkpoint, self._job, self._run, position, arrays, tables)
        self._checkpoint_seconds += time.perf_counter() - started


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


def _steps_table(stats: list[Any], taken_before: int) -> pa.Table:
    """Returns one row for each step's answer."""
    if not stats:
        return STEPS_SCHEMA.empty_table()
    numbers = pa.array(range(taken_before + 1, taken_before + len(stats) + 1), pa.int64())
    return pa.table([numbers, *np.stack(stats).T.astype(np.float32)], schema=STEPS_SCHEMA)


def _finite_mean(column: pa.ChunkedArray) -> float:
    """Returns the mean without the gradients that loss scaling left out."""
    values = column.to_numpy()
    return float(values.mean(dtype=np.float64, where=np.isfinite(values)))


def _check_finite(stats: list[Any], first_step: int, precision: str) -> None:
    if not stats:
        return  # what is left of a continued epoch is less than a batch of now
    last = np.asarray(stats[-1])
    # A float16 gradient that overflowed is what loss scaling is for: the step is left out and the scale is halved.
    watched = [STEP_LOSS] if precision == "mixed_float16" else [STEP_LOSS, STEP_GRAD_NORM]
    if not np.isfinite(last[watched]).all():
        unchecked = (len(stats) - 1) % _STEPS_BETWEEN_FINITE_CHECKS + 1
        steps = f"[{first_step + len(stats) - unchecked + 1}, {first_step + len(stats)}]"
        raise DivergedError(f"the loss or its gradient became nan or inf somewhere within steps {steps}")


@contextlib.contextmanager
def _background_writer() -> Iterator[Writer]:
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


def _wait_for_checkpoint() -> None:
    """Do nothing; what was given to the background writer before has been written by the time that it takes this."""


def _write_checkpoint(
    job: WorkerJob,
    run: RunFolder,
    position: Position,
    arrays: dict[str, checkpoints.Arrays],
    tables: dict[str, pa.Table],
) -> None:
    files = {name: checkpoints.to_safetensors(one) for name, one in arrays.items()}
    files |= {name: storage.parquet_bytes(one) for name, one in tables.items()}
    checkpoints.save_checkpoint(run.checkpoints, position, files, run.check_owner)
    checkpoints.delete_old_checkpoints(run.checkpoints, job.config.keep_best, run.check_owner)
    if position.epoch_rows:
        return
    run.write_metrics(position.history)
    run.write_steps(tables[checkpoints.STEPS_NAME])
    if "tensorboard" in job.trackers:
        write_tensorboard(run, position.history)
