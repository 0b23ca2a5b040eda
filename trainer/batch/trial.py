"""One trial of batch sizes: real training steps in worker processes, which may run out of memory at any time.

Measurements are sent as events as soon as they are made, since a process that is killed returns nothing.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray.train
import tensorflow as tf

from trainer.batch.job import TrialJob, TrialResult
from trainer.batch.search import Probe, Search, next_probe, settle_precision
from trainer.config.config import replace_values
from trainer.record import checkpoint as checkpoints
from trainer.runtime.events import LossesMeasured, OnEvent, SizeMeasured, SizeStarted, TrialStarted
from trainer.training.batches import make_batch, move_batch
from trainer.training.dataset import BatchFeed, ImageSplit, epoch_order, open_split, worker_rows
from trainer.training.devices import (
    allocator_limit_gib,
    has_gpu,
    killed_beyond,
    memory_limit_gib,
    peak_memory_gib,
    ran_out_of_memory,
    reset_peak_memory,
    share_devices,
)
from trainer.training.network import Network, build_network
from trainer.training.step import STEP_LOSS, compile_gather, compile_train_step

# Number of first steps whose losses show whether a precision trains like another.
_LOSS_STEPS = 8
# A precision whose step takes this many times as long as that of another is emulated, and not measured further.
_HOPELESS = 3
# How often each size is timed, alternating between precisions; all rounds together take a second or more.
_ROUNDS = 3
_ROUND_SECONDS = 0.35
# Activations, their gradients and what the operations need in addition, in multiples of the layers' outputs.
_ACTIVATION_COPIES = 3
# The first size takes at most this share of the memory limit, estimated from the layers' outputs.
_FIRST_SHARE = 0.5
_GIB = 2**30


def run_trial(job: TrialJob, send_event: OnEvent) -> TrialResult:
    """Measure one size after the other, as the search decides, as long as these processes can.

    Raises:
        MemoryError: a size needs more memory than there is, and TensorFlow reported it.
    """
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    share_devices(context.get_local_world_size())
    limit = job.memory_limit_gib or memory_limit_gib(context.get_local_world_size())
    send_event(TrialStarted(limit))
    with contextlib.ExitStack() as stack:
        if not has_gpu():
            stack.enter_context(killed_beyond(limit))
        config = job.config
        split = open_split(config.dataset, job.manifest, "train", config.cache_gib, config.shuffle_window_gib)
        bench = stack.enter_context(contextlib.closing(_Bench(job, split, rank, num_workers)))
        search, known = job.search, job.known
        while True:
            known = settle_precision(search, known)
            if (probe := next_probe(search, known)) is None or not bench.can_measure(probe):
                return TrialResult(known, is_complete=probe is None)
            with _named_memory_errors(probe.size):
                if not bench.is_built:
                    bench.build(probe.precisions[0])
                    known = known.limit(bench.agree_on_limit(limit))
                    send_event(TrialStarted(known.memory_limit_gib))
                    search = _start_smaller(search, bench.image_gib, known.memory_limit_gib)
                    continue
                for event in bench.measure(probe, compare_losses=len(search.precisions) > 1):
                    if not isinstance(event, SizeStarted):
                        known = known.add(event)
                    if rank == 0:
                        send_event(event)


@contextlib.contextmanager
def _named_memory_errors(size: int) -> Iterator[None]:
    """Raise MemoryError for every error of TensorFlow in the context that says in its own way that memory ran out."""
    try:
        yield
    except tf.errors.OpError as error:
        if not ran_out_of_memory(error):
            raise
        raise MemoryError(f"batch {size} per replica: {error.message}") from error


def _start_smaller(search: Search, image_gib: float, limit_gib: float) -> Search:
    """Return the search with a first size that is expected to fit; a given size does not change."""
    size = search.start
    while search.goal != "given" and size > 1 and size * image_gib > _FIRST_SHARE * limit_gib:
        size //= 2
    return replace(search, start=size)


@dataclass
class _Workbench:
    """The network of one precision."""

    network: Network
    gather: Callable[[Any], Any]
    steps: dict[int, Callable[[Any, Any], Any]]
    """Compiled steps by per-replica size."""


class _Bench:
    """Networks that take training steps of any batch size."""

    def __init__(self, job: TrialJob, split: ImageSplit, rank: int, num_workers: int) -> None:
        self._job, self._split, self._rank, self._num_workers = job, split, rank, num_workers
        self._order = epoch_order(split, job.config.seed, 1, job.config.shuffle_window_gib)
        self._networks: dict[str, _Workbench] = {}
        self._was_built: set[str] = set()
        self._largest = 0

    @property
    def is_built(self) -> bool:
        """Whether a network has been built before."""
        return bool(self._was_built)

    @property
    def image_gib(self) -> float:
        """Estimated memory of training for each image of a batch."""
        model = next(iter(self._networks.values())).network.model
        outputs = [getattr(layer, "output", None) for layer in model.layers]
        values = sum(math.prod(one.shape[1:]) for one in outputs if one is not None and hasattr(one, "shape"))
        return float(values) * 4 * _ACTIVATION_COPIES / _GIB

    def agree_on_limit(self, limit_gib: float) -> float:
        """Return the memory in GiB that each worker may use: the least of all, since all must measure the same."""
        bench = next(iter(self._networks.values()))
        return -float(bench.gather([[-min(limit_gib, allocator_limit_gib())]]).max())

    def can_measure(self, probe: Probe) -> bool:
        """Return whether these processes can measure a size as exactly as requested."""
        return not probe.alone or self._is_alone(probe)

    def _is_alone(self, probe: Probe) -> bool:
        if len(probe.precisions) > 1:
            return False
        # A GPU's memory is counted exactly. A CPU's is that of the process, which keeps what it held before.
        return has_gpu() or (self._was_built <= set(probe.precisions) and probe.size > self._largest)

    def close(self) -> None:
        """Release the memory, since the process may go on to train."""
        self._networks.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak_memory()

    def measure(self, probe: Probe, *, compare_losses: bool) -> Iterator[SizeStarted | LossesMeasured | SizeMeasured]:
        """Measure time and memory of training steps; each number is the largest of all replicas."""
        is_alone, size = self._is_alone(probe), probe.size
        if has_gpu():
            for other in set(self._networks) - set(probe.precisions):
                del self._networks[other]
            gc.collect()
        taken = dict.fromkeys(probe.precisions, 0.0)
        numbers: dict[str, tuple[float, float]] = {}
        for precision in probe.precisions:
            started = time.perf_counter()
            yield SizeStarted(precision, size)
            # From the seeded weights: before the first step of this network.
            is_new = not self.build(precision).steps
            if compare_losses and is_new and precision not in self._job.known.losses:
                longest = _HOPELESS * min((seconds for seconds, _ in numbers.values()), default=math.inf)
                losses, seconds = self._first_losses(precision, size, longest)
                yield LossesMeasured(precision, losses)
                if seconds > longest:
                    row = [seconds, 0.0, seconds, peak_memory_gib(), time.perf_counter() - started]
                    yield self._summarize(precision, size, row, alone=False)
                    continue
            numbers[precision] = self._warm_up(precision, size)
            taken[precision] += time.perf_counter() - started
        self._largest = max(size, self._largest)
        real: dict[str, list[float]] = {precision: [] for precision in probe.precisions}
        for number in range(_ROUNDS):
            for precision in numbers:
                started = time.perf_counter()
                real[precision].append(self._time_real(precision, size, numbers[precision][0], number))
                taken[precision] += time.perf_counter() - started
        for precision in numbers:
            timed = real[precision]
            row = [float(np.median(timed)), float(np.ptp(timed)), *numbers[precision], taken[precision]]
            yield self._summarize(precision, size, row, is_alone)

    def _summarize(self, precision: str, size: int, row: list[float], alone: bool) -> SizeMeasured:
        """Return a measurement of all replicas.

        Args:
            precision: the precision.
            size: images per replica.
            row: seconds per step, their spread, seconds per step without input, peak memory in GiB, and the seconds
                that the measurement took.
            alone: whether nothing else was in the process.
        """
        gathered = self._networks[precision].gather([row]).max(axis=0)
        seconds, spread, synthetic, peak, taken = (float(one) for one in gathered)
        return SizeMeasured(
            precision=precision,
            size=size,
            num_replicas=self._num_workers,
            seconds_per_step=seconds,
            seconds_spread=spread,
            synthetic_seconds_per_step=synthetic,
            peak_memory_gib=peak,
            seconds=taken,
            alone=alone,
        )

    def build(self, precision: str) -> _Workbench:
        """Return the network of a precision; build it if necessary."""
        if precision not in self._networks:
            self._was_built.add(precision)
            # The full learning rate from the first step on, so that the losses change.
            config = replace_values(self._job.config, schedule="constant", warmup_epochs=0.0, precision=precision)
            network = build_network(self._job.manifest, config, steps_per_epoch=1)
            self._networks[precision] = _Workbench(network, compile_gather(network), {})
        return self._networks[precision]

    def _first_losses(self, precision: str, size: int, longest: float) -> tuple[tuple[float, ...], float]:
        """Return the losses of the first steps from the seeded weights, and the seconds of a step.

        If two steps take longer than ``longest``, no more are taken: the precision is too slow to be chosen. One may
        have waited for another process. Without a limit nothing is timed, and the seconds are infinite.
        """
        step, losses, seconds = self._compile(precision, size), list[float](), math.inf
        for number in range(_LOSS_STEPS):
            started = time.perf_counter()
            losses.append(float(np.asarray(step(*self._batch(size, number)))[STEP_LOSS]))
            if number in (1, 2) and seconds > longest:  # the first one compiles
                seconds = float(self._networks[precision].gather([[time.perf_counter() - started]]).max())
            if number == 2 and seconds > longest:
                break
        return tuple(losses), seconds

    def _warm_up(self, precision: str, size: int) -> tuple[float, float]:
        """Return the seconds of a step without input, and the peak memory in GiB."""
        bench, batch = self._networks[precision], self._batch(size, 0)
        is_compiled = size in bench.steps
        step, gather = self._compile(precision, size), bench.gather
        reset_peak_memory()
        held = self._hold_what_training_holds(precision)
        if not is_compiled:
            _seconds(step, batch, 1)
            if has_gpu():
                # Trying kernels takes as much memory as there is, which no later step does.
                reset_peak_memory()
        synthetic = once = float(gather([[_seconds(step, batch, 1)]]).max())
        if _count(once) > 1:
            synthetic = _seconds(step, batch, _count(once))
        for more in BatchFeed(move_batch).batches(lambda number: self._make_batch(size, number), range(2)):
            np.asarray(step(*more))
        del held
        return float(gather([[synthetic]]).max()), peak_memory_gib()

    def _time_real(self, precision: str, size: int, synthetic: float, number: int) -> float:
        """Return the seconds of a step with input; steps follow each other without waiting for the device."""
        step, count = self._compile(precision, size), _count(synthetic)
        # Beside a step that takes a whole round, the start of the feed is nothing.
        first = 1 if count > 1 else 0
        steps = range(number * count, (number + 1) * count + first)
        batches = BatchFeed(move_batch).batches(lambda one: self._make_batch(size, one), steps)
        for batch in itertools.islice(batches, first):
            np.asarray(step(*batch))
        started = time.perf_counter()
        for batch in batches:
            stats = step(*batch)
        np.asarray(stats)
        return (time.perf_counter() - started) / count

    def _compile(self, precision: str, size: int) -> Callable[[Any, Any], Any]:
        bench = self._networks[precision]
        if size not in bench.steps:
            values = {"global_batch_size": size * self._num_workers, "precision": precision}
            config = replace_values(self._job.config, **values)
            bench.steps[size] = compile_train_step(bench.network, self._job.manifest, config)
        return bench.steps[size]

    def _batch(self, size: int, number: int) -> tuple[Any, Any]:
        return move_batch(self._make_batch(size, number))

    def _make_batch(self, size: int, number: int) -> tuple[Any, Any]:
        global_batch_size = size * self._num_workers
        number %= max(1, len(self._order) // global_batch_size)
        return make_batch(
            self._split, worker_rows(self._order, number, global_batch_size, self._rank, self._num_workers)
        )

    def _hold_what_training_holds(self, precision: str) -> list[Any]:
        """Return as much memory as a run takes beside its steps.

        Those are the second gradient of `trainer.training.noise`, and on a CPU what is held while a checkpoint is
        written.
        """
        network = self._networks[precision].network
        held: list[Any] = [tf.identity(variable) for variable in network.model.trainable_variables]
        if has_gpu():
            return held
        arrays = [checkpoints.read_variables(part) for part in (network.model.variables, network.optimizer_variables)]
        return [held, arrays, [checkpoints.to_safetensors(one) for one in arrays]]


def _count(seconds: float) -> int:
    """Return the number of steps of a round."""
    return math.ceil(_ROUND_SECONDS / seconds)


def _seconds(step: Callable[[Any, Any], Any], batch: tuple[Any, Any], count: int) -> float:
    """Return the mean seconds of some steps that follow each other without waiting for the device."""
    started = time.perf_counter()
    for _ in range(count):
        stats = step(*batch)
    np.asarray(stats)
    return (time.perf_counter() - started) / count
