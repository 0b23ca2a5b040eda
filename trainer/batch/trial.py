"""One trial of batch sizes: real training steps in fresh worker processes, which may run out of memory at any time.

Measurements are sent as events as soon as they are made, since a process that is killed returns nothing.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray.train
import tensorflow as tf

from trainer.config.batch_table import is_far_slower, predict_gib
from trainer.config.config import replace_values
from trainer.record import checkpoint as checkpoints
from trainer.runtime.events import LossesMeasured, OnEvent, SizeMeasured, TrialStarted
from trainer.training.batches import make_batch
from trainer.training.dataset import BatchFeed, ImageSplit, epoch_order, open_split, worker_rows
from trainer.training.devices import (
    has_gpu,
    kill_beyond,
    memory_limit_gib,
    peak_memory_gib,
    reset_peak_memory,
    share_devices,
)
from trainer.training.job import TrialJob
from trainer.training.step import STEP_LOSS, Network, build_network, compile_gather, compile_train_step

# Number of first steps whose losses show whether a precision trains like another.
_LOSS_STEPS = 8
# Timed steps with real and with synthetic input: as many as fit into the seconds, at least one.
_MOST_TIMED_STEPS = 5
_TIMED_SECONDS = 1.5
# A size that would take longer than this, without compilation, is left to a trial of its own.
_LONGEST_SIZE_SECONDS = 20.0


def run_trial(job: TrialJob, send_event: OnEvent) -> None:
    """Measure each size in turn, as long as the next one is expected to fit, to be fast enough and to be useful.

    Raises:
        MemoryError: a size needs more memory than there is, and TensorFlow reported it.
    """
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    share_devices(context.get_local_world_size())
    limit = job.memory_limit_gib or memory_limit_gib(context.get_local_world_size())
    send_event(TrialStarted(limit))
    if not has_gpu():
        kill_beyond(limit)
    split = open_split(job.config.dataset, job.manifest, "train")
    trial = _Trial(job, split, rank, num_workers)
    # All workers must stop at the same size.
    limit = -float(trial.gather([[-limit]]).max())
    measured: list[SizeMeasured] = []
    for size in job.sizes:
        if not _promises_to_fit(measured, size, limit * job.memory_share):
            return
        if measured and measured[-1].seconds_per_step / measured[-1].size * size * 3 > _LONGEST_SIZE_SECONDS:
            return
        try:
            if job.compare_losses and not measured:
                losses = trial.first_losses(size)
                if rank == 0:
                    send_event(LossesMeasured(job.config.precision, losses))
            measured.append(trial.measure(size))
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(f"batch {size} per replica: {error.message}") from error
        if rank == 0:
            send_event(measured[-1])
        if is_far_slower(measured[-1], job.reference):
            return


def _promises_to_fit(measured: list[SizeMeasured], size: int, target_gib: float) -> bool:
    needed = predict_gib(measured, size)
    return needed is None or needed <= target_gib


class _Trial:
    """A network that takes training steps of any batch size."""

    def __init__(self, job: TrialJob, split: ImageSplit, rank: int, num_workers: int) -> None:
        self._job, self._split, self._rank, self._num_workers = job, split, rank, num_workers
        # The full learning rate from the first step on, so that the losses change.
        config = replace_values(
            job.config, schedule="constant", warmup_epochs=0.0, global_batch_size=job.sizes[0] * num_workers
        )
        self._network: Network = build_network(job.manifest, config, steps_per_epoch=1)
        self.gather = compile_gather(self._network)
        self._order = epoch_order(len(split), job.config.seed, 1)

    def first_losses(self, size: int) -> tuple[float, ...]:
        """Return the losses of the first steps from the seeded weights."""
        step, batch_of_step = self._compile(size)
        return tuple(float(np.asarray(step(*batch_of_step(number)))[STEP_LOSS]) for number in range(_LOSS_STEPS))

    def measure(self, size: int) -> SizeMeasured:
        """Measure time and memory of training steps; each number is the largest of all replicas."""
        step, batch_of_step = self._compile(size)
        reset_peak_memory()
        held = self._checkpoint_copy()
        first_batch = batch_of_step(0)
        _seconds(step, first_batch)  # traces and compiles
        once = float(self.gather([[_seconds(step, first_batch)]]).max())
        count = int(np.clip(_TIMED_SECONDS / once, 1, _MOST_TIMED_STEPS))
        synthetic = [once] + [_seconds(step, first_batch) for _ in range(count - 1)]
        real = []
        started = time.perf_counter()
        for batch in BatchFeed().batches(batch_of_step, range(1, count + 1)):
            np.asarray(step(*batch))
            real.append(time.perf_counter() - started)
            started = time.perf_counter()
        del held
        peak = peak_memory_gib()
        numbers = [float(np.median(real)), float(np.ptp(real)), float(np.median(synthetic)), peak]
        seconds, spread, synthetic_seconds, peak = (float(one) for one in self.gather([numbers]).max(axis=0))
        return SizeMeasured(
            precision=self._job.config.precision,
            size=size,
            num_replicas=self._num_workers,
            seconds_per_step=seconds,
            seconds_spread=spread,
            synthetic_seconds_per_step=synthetic_seconds,
            peak_memory_gib=peak,
        )

    def _compile(self, size: int) -> tuple[Callable[[Any, Any], Any], Callable[[int], tuple[Any, Any]]]:
        global_batch_size = size * self._num_workers
        config = replace_values(self._job.config, global_batch_size=global_batch_size)
        step = compile_train_step(self._network, self._job.manifest, config)
        steps_in_order = max(1, len(self._order) // global_batch_size)

        def batch_of_step(number: int) -> tuple[Any, Any]:
            rows = worker_rows(self._order, number % steps_in_order, global_batch_size, self._rank, self._num_workers)
            return make_batch(self._split, rows)

        return step, batch_of_step

    def _checkpoint_copy(self) -> list[Any]:
        """Return copies as large as those held while a checkpoint is written: on a CPU they take the same memory."""
        if has_gpu():
            return []
        network = self._network
        arrays = [checkpoints.read_variables(part) for part in (network.model.variables, network.optimizer_variables)]
        return [arrays, [checkpoints.to_safetensors(one) for one in arrays]]


def _seconds(step: Callable[[Any, Any], Any], batch: tuple[Any, Any]) -> float:
    started = time.perf_counter()
    np.asarray(step(*batch))
    return time.perf_counter() - started
