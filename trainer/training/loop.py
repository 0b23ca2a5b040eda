"""The training loop: what every Ray Train worker runs.

An attempt starts with the data, then builds the network, then restores its state: from the last complete checkpoint of
this run if there is one, else from the weights of --init-from if given, else from the seeded initialization.
"""

import contextlib
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.train
import tensorflow as tf
from ray.train.collective import broadcast_from_rank_zero

from trainer.architectures.source import format_layers
from trainer.config.config import TrainConfig, resize_batch
from trainer.record import checkpoint as checkpoints
from trainer.record.augmentation_choice import describe_trials
from trainer.record.checkpoint import Checkpoint, Position
from trainer.record.epoch_row import EpochRow, Metrics, complete_row
from trainer.record.evaluation_result import find_mistakes
from trainer.record.noise_scale import find_noise_scale
from trainer.record.predictions import (
    PREDICTIONS_NAME,
    THUMBNAILS_NAME,
    make_thumbnails,
    name_predictions,
    select_shown,
)
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.events import (
    AttemptStarted,
    AugmentationChosen,
    CheckpointsSetAside,
    EpochFinished,
    StageProgressed,
    StepProfiled,
    Tf32Used,
    WeightsTransferred,
    ignore_event,
)
from trainer.runtime.markdown import format_loss
from trainer.training.batch_norm import compile_estimate, count_estimate_steps
from trainer.training.batches import make_batch, move_batch
from trainer.training.dataset import (
    BatchFeed,
    ImageSplit,
    all_worker_rows,
    epoch_order,
    open_split,
    read_sources,
    worker_rows,
)
from trainer.training.devices import peak_memory_gib, share_devices, uses_tf32
from trainer.training.evaluation import COLUMNS, Evaluator, mean_loss_and_accuracy, predictions_table
from trainer.training.execution import Execution, choose_execution, next_number
from trainer.training.export import score_images, write_exports
from trainer.training.job import WorkerJob, WorkerResult
from trainer.training.network import Network, averaged_weights, build_network
from trainer.training.noise import FIRST_STEP, STEPS_BETWEEN, add_noise
from trainer.training.profile import StepProfiler
from trainer.training.stages import EpochPlan, needed_epochs, plan_epoch
from trainer.training.step import STEP_GRAD_NORM, STEP_LOSS, compile_eval_step, compile_execution, compile_gather
from trainer.training.tracking import write_tensorboard_epoch
from trainer.training.transfer import read_initial_weights

_PROGRESS_INTERVAL_SECONDS = 0.5
# The loss that is shown while an epoch runs is the mean of so many steps.
_SHOWN_STEPS = 10
# Every worker checks the same loss at the same steps, so all stop together.
_STEPS_BETWEEN_FINITE_CHECKS = 50
# The number of a step, and the columns of what a training step returns.
STEPS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("loss", pa.float32()),
        ("accuracy", pa.float32()),
        ("grad_norm", pa.float32()),
        ("clipped", pa.float32()),
        ("grad_noise", pa.float32()),
    ]
)


Writer = Callable[..., None]


class DivergedError(Exception):
    """The loss became NaN or infinite; the message says within which steps."""


def train_worker(job: WorkerJob) -> WorkerResult:
    """Train the run's network from its last checkpoint, or from scratch, to its last epoch."""
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
        test = open_split(config.dataset, job.manifest, "test", config.cache_gib)
        if rank == 0:
            run.record_test_read("train.py")
        table = predictions_table(training.evaluate(test), test.labels)
        if rank == 0:
            run.write(storage.parquet_bytes(table), "test_predictions.parquet")
    mistakes = training.val.take(np.arange(0))
    if best is not None and rank == 0:
        content = checkpoints.read_file(run.checkpoints, best, checkpoints.MODEL_NAME)
        weights = checkpoints.from_safetensors(content)
        write_exports(run, weights, job.manifest, config)
        predictions = _describe_predictions(job, run, best, weights, training.val, training.mean_losses)
        run.write(storage.parquet_bytes(predictions), PREDICTIONS_NAME)
        shown = select_shown(predictions)
        run.write(storage.parquet_bytes(make_thumbnails(training.val.take(shown), shown)), THUMBNAILS_NAME)
        mistakes = training.val.take(find_mistakes(predictions))
    layers = format_layers(network.model)
    return WorkerResult(reason, attempt, network.model.count_params(), layers, weights_crc32, mistakes)


def _describe_predictions(
    job: WorkerJob,
    run: RunFolder,
    best: Checkpoint,
    weights: checkpoints.Arrays,
    val: ImageSplit,
    mean_losses: npt.NDArray[np.float64],
) -> pa.Table:
    """Return the table of ``predictions.parquet``: the predictions of the best epoch, and the mean loss over all."""
    sources = read_sources(job.config.dataset, job.manifest, "val")
    content = checkpoints.read_file(run.checkpoints, best, checkpoints.PREDICTIONS_NAME)
    table = name_predictions(storage.parquet_table(content), sources, job.manifest.class_names)
    table = table.append_column("mean_loss", pa.array(mean_losses, pa.float32()))
    if job.config.save_probabilities:
        scores = score_images(weights, job.manifest, job.config, val, job.config.per_replica_batch_size)
        listed = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), scores.shape[1])
        table = table.append_column("probabilities", listed)
    return table


def _find_last(job: WorkerJob, run: RunFolder) -> Checkpoint | None:
    """Return the last intact checkpoint, and report the damaged ones."""
    last, damaged = checkpoints.find_whole(run.checkpoints, checkpoints.find_last, run.check_owner)
    instead = f"training resumes from step {last.step}" if last else "no other is intact: training starts over"
    _report_damage(job, run, damaged, instead)
    return last


def _find_best(job: WorkerJob, run: RunFolder) -> Checkpoint | None:
    """Return the best intact checkpoint, and report the damaged ones."""
    best, damaged = checkpoints.find_whole(run.checkpoints, checkpoints.find_best, run.check_owner)
    instead = f"the next best, of epoch {best.epoch}, takes its place" if best else "no other is intact"
    _report_damage(job, run, damaged, instead)
    return best


def _report_damage(job: WorkerJob, run: RunFolder, damaged: list[str], instead: str) -> None:
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
    """A network in training, and the history of the run so far."""

    def __init__(
        self, job: WorkerJob, run: RunFolder, config: TrainConfig, rank: int, attempt: int, last: Checkpoint | None
    ) -> None:
        self._job, self._run, self._config, self._rank, self._attempt = job, run, config, rank, attempt
        self._lineage = (*last.lineage, (last.attempt, last.step)) if last else ()
        self._train, self.val = (
            open_split(config.dataset, job.manifest, name, config.cache_gib, config.shuffle_window_gib)
            for name in ("train", "val")
        )
        # Of this epoch and of the next one, whose images are fetched ahead.
        self._order = functools.lru_cache(maxsize=2)(
            partial(epoch_order, self._train, config.seed, window_gib=config.shuffle_window_gib)
        )
        read_weights = partial(read_initial_weights, config.init_from, storage.parent(run.uri))
        starts_elsewhere = bool(config.init_from) and last is None
        self._steps_per_epoch = len(self._train) // config.global_batch_size
        self.network = build_network(
            job.manifest, config, self._steps_per_epoch, read_weights if starts_elsewhere else None
        )
        if self.network.transferred and rank == 0:
            job.send_event(WeightsTransferred(self.network.transferred))
        if config.precision == "float32" and uses_tf32() and rank == 0:
            job.send_event(Tf32Used())
        self._eval_step = compile_eval_step(self.network, job.manifest, config)
        self._estimate = compile_estimate(self.network, job.manifest, config)
        self.gather = compile_gather(self.network)
        self._history: list[Metrics] = []
        self._steps = STEPS_SCHEMA.empty_table()
        # Rows of the unfinished epoch that were trained on.
        self._epoch_rows = 0
        # The last step that is known to be finite.
        self._finite_step = 0
        self._checkpoint_seconds = 0.0
        self._loss_sums, self._loss_epochs = np.zeros(len(self.val)), 0
        self._profiler = StepProfiler(self._run, rank, job.profile_steps)
        if last is not None:
            self._continue(last)
        self._execution = self._choose_execution()
        self._take = add_noise(self._execution, self.network, job.manifest, config)

    def _choose_execution(self) -> Execution:
        job, config = self._job, self._config
        return choose_execution(
            functools.partial(compile_execution, self.network, job.manifest, config),
            self.network,
            config,
            steps_left=config.epochs * self._steps_per_epoch - self._steps.num_rows,
            agree=lambda value: float(self.gather([[value]]).max()),
            on_event=job.send_event if self._rank == 0 else ignore_event,
        )

    def _continue(self, last: Checkpoint) -> None:
        self._restore(last)
        self._history, self._epoch_rows = [complete_row(row) for row in last.history], last.epoch_rows
        content = checkpoints.read_file(self._run.checkpoints, last, checkpoints.STEPS_NAME)
        self._steps = _upgrade_steps(storage.parquet_table(content))
        if checkpoints.VAL_LOSSES_NAME in last.sha256:
            content = checkpoints.read_file(self._run.checkpoints, last, checkpoints.VAL_LOSSES_NAME)
            losses = storage.parquet_table(content)
            self._loss_sums, self._loss_epochs = losses["loss_sum"].to_numpy().copy(), losses["epochs"][0].as_py()
        if last.global_batch_size != self._config.global_batch_size:
            # The schedule counts steps: it resumes where as many epochs with this batch would have ended.
            in_epoch = self._epoch_rows // self._config.global_batch_size
            self.network.optimizer.iterations.assign(len(self._history) * self._steps_per_epoch + in_epoch)

    @property
    def mean_losses(self) -> npt.NDArray[np.float64]:
        """Mean loss of each validation image over the epochs, ``[rows]``."""
        return self._loss_sums / max(1, self._loss_epochs)

    def run(self) -> str:
        """Train to the last epoch, and return why it ended early, or an empty string."""
        with _background_writer() as write:
            try:
                while plan := plan_epoch(self._history, self._config, self._steps_per_epoch):
                    before = self._history[-1].get("stage") if self._history else ""
                    if self._rank == 0 and (before, plan.stage) == ("trial", "train"):
                        evidence = f"validation loss: {describe_trials(self._history)}"
                        self._job.send_event(AugmentationChosen(plan.augmentation, evidence))
                    self._start_epoch(plan, write)
                    row = self._run_epoch(plan, write)
                    if self._rank == 0:
                        self._job.send_event(EpochFinished(row.to_metrics(), self._config.epochs))
            except DivergedError as error:
                return str(error)
            finally:
                # Patience ends a run before the epoch whose images are being fetched.
                self._train.expect(np.arange(0))
                self._report(self._profiler.close())
        return ""

    def _start_epoch(self, plan: EpochPlan, write: Writer) -> None:
        """Take up the weights and the optimizer state that an epoch starts from, unless it has begun already."""
        taken = self._epoch_rows // self._config.global_batch_size
        if plan.started_from != len(self._history) and not taken:
            write(_wait_for_checkpoint)
            found = checkpoints.find_epoch(self._run.checkpoints, plan.started_from) if self._rank == 0 else None
            start = broadcast_from_rank_zero(found)
            if start is not None:
                self._restore(start)
        first_step = int(self.network.optimizer.iterations.numpy()) - taken
        self.network.start_epoch(plan, self._config, first_step, self._steps_per_epoch)

    def _restore(self, checkpoint: Checkpoint) -> None:
        with averaged_weights(self.network):
            _restore(self.network, self._run, checkpoint)

    def _run_epoch(self, plan: EpochPlan, write: Writer) -> EpochRow:
        """Take the remaining steps of an epoch, evaluate, save a checkpoint, and return the metrics.

        Raises:
            DivergedError: the loss is not finite, and the epoch is not that of a candidate, which then has lost.
        """
        started, images_per_second, wait_seconds, has_lost = time.perf_counter(), 0.0, 0.0, False
        try:
            images_per_second, wait_seconds = self._take_steps(plan, write)
        except DivergedError:
            if plan.stage != "trial":
                raise
            has_lost = True
        # No epoch counts that was trained on damaged images.
        self._train.pixels.finish_check()
        with averaged_weights(self.network):
            self._estimate_batch_norm()
            outcomes = self.evaluate(self.val)
            row = self._summarize_epoch(plan, outcomes, images_per_second, wait_seconds, started)
            if plan.stage != "trial" and not np.isfinite(row.val_loss):
                # The loss of the last step was still finite, and the weights after it are not.
                raise DivergedError(f"the validation loss became nan or inf in epoch {row.epoch}")
            if has_lost or not np.isfinite(row.val_loss):
                row = replace(row, val_loss=math.inf, val_accuracy=0.0)
            else:
                self._loss_sums = self._loss_sums + outcomes[:, COLUMNS.index("loss")]
                self._loss_epochs += 1
            self._history, self._epoch_rows, self._checkpoint_seconds = [*self._history, row.to_metrics()], 0, 0.0
            self._save(write, {checkpoints.PREDICTIONS_NAME: predictions_table(outcomes, self.val.labels)})
        return row

    def _summarize_epoch(
        self,
        plan: EpochPlan,
        outcomes: npt.NDArray[np.float32],
        images_per_second: float,
        wait_seconds: float,
        started: float,
    ) -> EpochRow:
        """Return the metrics of the epoch whose steps were taken. Every worker must call this.

        Args:
            plan: how the epoch was trained.
            outcomes: what `evaluate` returned for the validation split.
            images_per_second: the speed of the steps of this attempt.
            wait_seconds: how long this worker waited for batches.
            started: `time.perf_counter` at the start of the epoch.
        """
        epoch, config = len(self._history) + 1, self._config
        val_loss, val_accuracy = mean_loss_and_accuracy(outcomes, self.val.labels)
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
            noise_scale=find_noise_scale(
                of_epoch["grad_noise"].to_numpy(), of_epoch["grad_norm"].to_numpy(), config.global_batch_size
            ),
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
            stage=plan.stage,
            augmentation=plan.augmentation,
            started_from=plan.started_from,
        )

    def _estimate_batch_norm(self) -> None:
        """Estimate the averages of BatchNorm on the first images of this epoch's order."""
        if self._estimate is None:
            return
        order = self._order(len(self._history) + 1)
        num_batches = count_estimate_steps(len(order), self._config.global_batch_size)
        batches = BatchFeed(move_batch).batches(lambda step: self._make_batch(order, step), range(num_batches))
        for number, (images, _) in enumerate(batches):
            self._estimate(images, number)

    def _own_rows(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows of this worker in an order, as it takes them, ``[steps, rows]``."""
        config = self._config
        num_steps = len(order) // config.global_batch_size
        return all_worker_rows(order, num_steps, config.global_batch_size, self._rank, config.num_workers)

    def _make_batch(self, order: npt.NDArray[np.int64], step: int) -> tuple[Any, Any]:
        """Return this worker's share of a global batch of rows in an order."""
        config = self._config
        return make_batch(
            self._train, worker_rows(order, step, config.global_batch_size, self._rank, config.num_workers)
        )

    def evaluate(self, split: ImageSplit) -> npt.NDArray[np.float32]:
        """Return the outcome of every row of a split, as `Evaluator.evaluate` does."""
        config = self._config
        return Evaluator(
            split, config.per_replica_batch_size, self._rank, config.num_workers, self._eval_step, self.gather
        ).evaluate()

    def _take_steps(self, plan: EpochPlan, write: Writer) -> tuple[float, float]:
        """Take the optimizer steps of the current epoch, as planned, that were not taken yet.

        Returns:
            Images per second, and the seconds that this worker waited for batches.

        Raises:
            DivergedError: the loss, the gradient or a weight became NaN or infinite; the steps so far are kept.
        """
        config, epoch = self._config, len(self._history) + 1
        limit = plan.most_steps and plan.most_steps * config.global_batch_size
        order = self._order(epoch)[self._epoch_rows : limit]
        first_step = self._finite_step = self._steps.num_rows
        rows = self._own_rows(order)
        num_steps = len(rows)
        following = self._own_rows(self._order(epoch + 1)) if epoch < config.epochs else rows[:0]
        self._train.expect(rows.ravel(), following.ravel())

        def make_batches(steps: range) -> tuple[Any, Any]:
            return make_batch(self._train, rows[steps.start : steps.stop])

        feed, taken = BatchFeed(move_batch), 0
        started = last_event = time.perf_counter()
        # Of the steps that are not in the table yet, a row for each.
        stats: list[Any] = []
        for images, labels in feed.batches(make_batches, self._plan_calls(first_step, num_steps)):
            stats.append(self._take(images, labels, first_step + taken))
            taken += len(images)
            is_traced = self._profiler.after_step(stats[-1], feed.wait_seconds, is_last=taken == num_steps)
            self._epoch_rows += len(images) * config.global_batch_size
            if taken % _STEPS_BETWEEN_FINITE_CHECKS == 0:
                self._check_step(stats)
            if self._rank == 0 and time.perf_counter() - last_event > _PROGRESS_INTERVAL_SECONDS:
                last_event = time.perf_counter()
                self._job.send_event(self._describe_progress(epoch, stats))
            is_due = config.checkpoint_every and (first_step + taken) % config.checkpoint_every == 0
            if (is_due and taken < num_steps) or is_traced:
                self._finish_steps(stats)
                with averaged_weights(self.network):
                    self._save(write, {})
            if is_traced:
                # Wait, so that no step is lost if TensorFlow crashes while it collects the trace.
                write(_wait_for_checkpoint)
                self._report(self._profiler.close())
        self._finish_steps(stats)
        seconds = time.perf_counter() - started
        return num_steps * config.global_batch_size / seconds, feed.wait_seconds

    def _plan_calls(self, first_step: int, num_steps: int) -> Iterator[range]:
        """Yield the steps of an epoch that each call takes.

        It is the last of them after which something is done: the loss is checked, or a checkpoint saved. It is the
        first before which the noise is measured. A profile is of single steps.
        """
        start, saves_every = 0, self._config.checkpoint_every
        while start < num_steps:
            most, step = 1 if self._job.profile_steps else self._execution.steps, first_step + start
            ends = [num_steps, start + most, next_number(start, _STEPS_BETWEEN_FINITE_CHECKS)]
            ends += [next_number(step, STEPS_BETWEEN, FIRST_STEP) - first_step]
            ends += [next_number(step, saves_every) - first_step] if saves_every else []
            yield range(start, min(ends))
            start = min(ends)

    def _describe_progress(self, epoch: int, stats: list[Any]) -> StageProgressed:
        """Return how far the whole run is, with the mean loss of the last steps but one call, which are done by now."""
        config = self._config
        taken = (epoch - 1) * self._steps_per_epoch + self._epoch_rows // config.global_batch_size
        rows = np.concatenate([np.asarray(one) for one in stats[-_SHOWN_STEPS - 1 : -1] or stats])
        loss = rows[-_SHOWN_STEPS:, STEP_LOSS].mean()
        at_most = "at most " if config.patience else ""
        detail = f"epoch {epoch} of {at_most}{config.epochs}, loss {format_loss(loss)}"
        return StageProgressed("training", taken, config.epochs * self._steps_per_epoch, detail)

    def _check_step(self, stats: list[Any]) -> None:
        """Raise DivergedError if the last step but one call is not finite; the steps so far are kept.

        The last call is computed by the device while the next one is made.
        """
        if len(stats) < 2:
            return
        step = self._steps.num_rows + sum(len(one) for one in stats[:-1])
        last = np.asarray(stats[-2])[-1:]
        try:
            self._finite_step = _check_finite(last, step, self._finite_step, self._config.precision)
        except DivergedError:
            self._keep_steps(stats)
            raise

    def _finish_steps(self, stats: list[Any]) -> None:
        """Keep the results of steps; raise DivergedError if one of them, or a weight after the last, is not finite.

        All are looked at, since NaN can hide: oneDNN's ReLU, on some CPUs, and pooling make a number of it. A network
        whose first kernel is NaN then has a finite loss, and so have the steps after the one that lost it.
        """
        first_step = self._steps.num_rows + 1
        rows = self._keep_steps(stats)
        self._finite_step = _check_finite(rows, first_step, self._finite_step, self._config.precision)
        if not self.network.has_finite_weights():
            raise DivergedError(f"a weight became nan or inf by step {self._finite_step}")

    def _report(self, profiled: StepProfiled | None) -> None:
        if profiled is not None and self._rank == 0:
            self._job.send_event(profiled)

    def _keep_steps(self, stats: list[Any]) -> npt.NDArray[np.float32]:
        """Move the results of steps to the table, and return them, a row for each step."""
        rows = tf.concat(stats, axis=0).numpy() if stats else np.empty((0, len(STEPS_SCHEMA) - 1), np.float32)
        self._steps = pa.concat_tables([self._steps, _steps_table(rows, self._steps.num_rows)])
        stats.clear()
        return rows

    def _save(self, write: Writer, tables: dict[str, pa.Table]) -> None:
        """Start to write a checkpoint of the current state, and return before it is written.

        Every worker reads its variables, since reading is collective; the first worker writes.
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
            losses = pa.table({"loss_sum": self._loss_sums, "epochs": [self._loss_epochs] * len(self._loss_sums)})
            tables = {checkpoints.STEPS_NAME: self._steps, checkpoints.VAL_LOSSES_NAME: losses, **tables}
            write(_write_checkpoint, self._job, self._run, position, arrays, tables)
        self._checkpoint_seconds += time.perf_counter() - started


def _gather_weights_crc32(network: Network, gather: Callable[[Any], Any]) -> tuple[int, ...]:
    """Return the checksum of every worker's weights.

    Raises:
        RuntimeError: they differ, so the workers did not train the same network.
    """
    checksum = 0
    for array in checkpoints.read_variables(network.model.variables).values():
        checksum = zlib.crc32(array.tobytes(), checksum)
    # Sent as two halves, since float32 represents integers exactly up to 2**24 only.
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


def _steps_table(rows: npt.NDArray[np.float32], taken_before: int) -> pa.Table:
    """Return the results of steps, a row for each, with their numbers."""
    numbers = pa.array(range(taken_before + 1, taken_before + len(rows) + 1), pa.int64())
    return pa.table([numbers, *rows.T], schema=STEPS_SCHEMA)


def _upgrade_steps(steps: pa.Table) -> pa.Table:
    """Return the steps of a checkpoint, which may be older than a column."""
    for field in STEPS_SCHEMA:
        if field.name not in steps.column_names:
            steps = steps.append_column(field, pa.array(np.full(steps.num_rows, np.nan), field.type))
    return steps


def _finite_mean(column: pa.ChunkedArray) -> float:
    """Return the mean of the finite values: without the steps that loss scaling skipped."""
    values = column.to_numpy()
    return float(values.mean(dtype=np.float64, where=np.isfinite(values)))


def _check_finite(rows: npt.NDArray[np.float32], first_step: int, finite_step: int, precision: str) -> int:
    """Return the number of the last of some steps, which are all finite.

    Args:
        rows: the results of steps that follow on each other.
        first_step: the number of the first of them.
        finite_step: the last step that is known to be finite; those between the two were not looked at.
        precision: that of the run.

    Raises:
        DivergedError: one of them is not finite.
    """
    # Loss scaling handles a float16 gradient that overflows: it skips the step and halves the scale.
    watched = [STEP_LOSS] if precision == "mixed_float16" else [STEP_LOSS, STEP_GRAD_NORM]
    lost = np.flatnonzero(~np.isfinite(rows[:, watched]).all(axis=1))
    if not len(lost):
        return first_step + len(rows) - 1
    step = first_step + int(lost[0])
    first = step if lost[0] else min(finite_step + 1, step)
    steps = f"in one of the steps {first} to {step}" if first < step else f"in step {step}"
    raise DivergedError(f"the loss or its gradient became nan or inf {steps}")


@contextlib.contextmanager
def _background_writer() -> Iterator[Writer]:
    """Yield a function that calls another one in a background thread, one at a time.

    An exception in the thread is raised at the next call or at the end of the context.
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
    """Do nothing: when the background writer accepts this, everything before it has been written."""


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
    needed = needed_epochs(position.history)
    checkpoints.delete_old_checkpoints(run.checkpoints, job.config.keep_best, run.check_owner, needed)
    if position.epoch_rows:
        return
    run.write_metrics(position.history)
    run.write_steps(tables[checkpoints.STEPS_NAME])
    if "tensorboard" in job.trackers:
        write_tensorboard_epoch(run, position.history, tables[checkpoints.STEPS_NAME])
