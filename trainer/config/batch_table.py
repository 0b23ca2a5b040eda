"""The measurements of batch sizes, which size to try next, and which batch follows from them."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from trainer.config.config import BatchRequest
from trainer.runtime.events import SizeMeasured
from trainer.runtime.markdown import format_count
from trainer.runtime.record_format import Record

# Share of a worker's memory: evaluation, export and fragmentation are not in a trial.
SAFETY_MARGIN = 0.1
# Throughput this close to the best is as good (the knee), and a precision must gain more to replace float32.
_THROUGHPUT_TOLERANCE = 0.05
# The largest size that fits is known when the next one to try is not larger by more than this.
_SIZE_TOLERANCE = 0.03
# The line through two sizes may be this far from what a third one needs.
_PREDICTION_ERROR = 0.05
# A size that fit and one that ran out of memory are close together if the second is not larger by more than this.
_CLOSE = 1.25
# A doubled batch that gains less than this is where a bottleneck begins (tuning playbook: about double).
_DOUBLING_GAIN = 1.8
# A precision that is slower than float32 by this factor has no units on the device; one that has may be a little
# slower at small sizes.
_FAR_SLOWER = 1.5
# First losses of a precision may be this much worse than those of float32.
_LOSS_TOLERANCE = 0.1


# Training that is faster or slower than the table by this factor contradicts it.
_CONTRADICTION = 1.3
# A noise scale that differs from the assumed one by this factor is worth a line.
_NOISE_SURPRISE = 2.0
# Gradient noise scale in images if no run has measured it.
ASSUMED_NOISE_SCALE = 100.0


def result_seconds(row: SizeMeasured, noise_scale: float) -> float:
    """Return the time to a result with one size, comparable between sizes.

    A batch of B images takes steps in proportion to 1 + noise scale / B to reach a result (McCandlish et al. 2018).
    """
    images = row.size * row.num_replicas
    if math.isinf(noise_scale):
        return row.seconds_per_step / images
    return row.seconds_per_step * (1 + noise_scale / images) / (1 + noise_scale)


class BatchTable(Record):
    """The measurements behind the choice of a batch."""

    num_replicas: int
    memory_limit_gib: float
    """Memory limit of the worker that may use the least, in GiB."""
    node_memory_gib: float
    """Memory of the node that has the least, in GiB, as Ray reported it at the time of measuring."""
    precision: str
    """The chosen precision."""
    precision_reason: str
    measurements: dict[str, tuple[SizeMeasured, ...]]
    """Measured sizes by precision, in ascending order."""
    failed: dict[str, int]
    """The smallest per-replica size that ran out of memory, by precision."""
    trials: int
    """Number of groups of processes that were started."""
    measured: datetime

    @property
    def target_gib(self) -> float:
        """The most memory that a size may use, in GiB."""
        return usable_gib(self.rows, self.failed.get(self.precision), self.memory_limit_gib)

    @property
    def rows(self) -> tuple[SizeMeasured, ...]:
        """The sizes of the chosen precision."""
        return self.measurements[self.precision]

    @property
    def fitting(self) -> list[SizeMeasured]:
        """The sizes of the chosen precision that leave the safety margin free."""
        return [one for one in self.rows if one.peak_memory_gib <= self.target_gib]

    @property
    def knee(self) -> SizeMeasured:
        """The smallest size that is about as fast as the fastest: a larger one gains nothing."""
        best = max(one.images_per_second for one in self.fitting)
        return next(one for one in self.fitting if one.images_per_second >= best * (1 - _THROUGHPUT_TOLERANCE))

    @property
    def fills_memory(self) -> bool:
        """Whether a size much larger than the largest fitting one would not fit."""
        if self.failed.get(self.precision) or self.fitting[-1] != self.rows[-1]:
            return True
        needed = predict_gib(self.rows, math.ceil(self.rows[-1].size * _CLOSE))
        return needed is not None and needed > self.target_gib

    @property
    def largest_per_replica(self) -> int | None:
        """The largest size that is known or predicted to fit; None if one size was measured and more would fit."""
        last = self.fitting[-1]
        more_gib = predict_gib(self.rows, last.size + 1)
        if self.fills_memory or more_gib is None:
            return last.size if self.fills_memory else None
        return last.size + int((self.target_gib - last.peak_memory_gib) / (more_gib - last.peak_memory_gib))

    @property
    def saturates(self) -> bool:
        """Whether a size above the knee was measured, so that throughput is known to stop rising there."""
        return self.knee != self.fitting[-1]

    def verdict(self, row: SizeMeasured) -> str:
        """Return the verdict on one size."""
        if row.peak_memory_gib > self.target_gib:
            return "over the margin"
        return "fits, knee" if row == self.knee and self.saturates else "fits"


class BatchChoice(BaseModel):
    """The batch and the precision of a run, and why."""

    model_config = ConfigDict(frozen=True)

    request: BatchRequest
    global_batch_size: int
    precision: str
    limit: Literal["given", "rows", "memory", "throughput", "time"]
    """What set the batch; ``time``: a larger or a smaller one would take longer to the same result."""
    explanation: str
    table: BatchTable | None = None
    """None if nothing had to be measured."""
    table_name: str = ""
    """Name of the file of the table in the storage."""
    noise_scale: float | None = None
    """The gradient noise scale in images that the choice assumed; None if it needed none."""

    @property
    def largest_per_replica(self) -> int | None:
        """The largest size that fits in a worker's memory; None if that was not measured."""
        return self.table.largest_per_replica if self.table else None


def given_batch(request: BatchRequest, global_batch_size: int, precision: str) -> BatchChoice:
    """Return the choice of a given batch and precision, for which nothing is measured."""
    return BatchChoice(
        request=request, global_batch_size=global_batch_size, precision=precision, limit="given", explanation=""
    )


def round_size(size: int) -> int:
    """Return a per-replica size rounded down to a multiple of up to 8, by at most 5%: devices are faster at these."""
    multiple = 1
    while multiple < 8 and size >= 40 * multiple:
        multiple *= 2
    return size // multiple * multiple


def largest_for_rows(rows: int, num_replicas: int, min_steps_per_epoch: int) -> int:
    """Return the largest per-replica size with which an epoch has its minimum of steps; at least 1."""
    return max(1, round_size(rows // min_steps_per_epoch // num_replicas))


def predict_gib(measured: Sequence[SizeMeasured], size: int) -> float | None:
    """Return the memory of a size by the line through the two largest measured ones; None if there is none."""
    if len(measured) < 2:
        return None
    before, last = measured[-2:]
    slope = (last.peak_memory_gib - before.peak_memory_gib) / (last.size - before.size)
    return last.peak_memory_gib + slope * (size - last.size) if slope > 0 else None


def usable_gib(measured: Sequence[SizeMeasured], failed: int | None, limit_gib: float) -> float:
    """Return the most memory that a size may use: the limit without the safety margin.

    Args:
        measured: measurements so far, by size.
        failed: the smallest size that ran out of memory; None if none did.
        limit_gib: memory limit of a worker. If a size ran out of memory that should have fit, the kernel kills
            earlier, and only what the largest size that fit has used is certain.
    """
    survivors = [one for one in measured if failed is None or one.size < failed]
    if _died_early(survivors, failed, limit_gib):
        limit_gib = survivors[-1].peak_memory_gib
    return limit_gib * (1 - SAFETY_MARGIN)


def _died_early(survivors: Sequence[SizeMeasured], failed: int | None, limit_gib: float) -> bool:
    needed = predict_gib(survivors, failed) if failed else None
    return needed is not None and needed < limit_gib * (1 - _PREDICTION_ERROR)


def next_size(measured: Sequence[SizeMeasured], failed: int | None, most: int, limit_gib: float) -> int | None:
    """Return the per-replica size to try next, or None if the largest that fits is known.

    Memory is assumed to grow by the same amount with every image, found from two sizes; the next trial checks this.

    Args:
        measured: measurements so far, by size.
        failed: the smallest size that ran out of memory; None if none did.
        most: the largest useful size.
        limit_gib: memory limit of a worker.
    """
    survivors = [one for one in measured if failed is None or one.size < failed]
    if failed and _died_early(survivors, failed, limit_gib):
        # The limit is unknown: search until it lies between two sizes that are close together.
        between = round(math.sqrt(survivors[-1].size * failed))
        if failed > survivors[-1].size * _CLOSE and survivors[-1].size < between < failed:
            return between
    target_gib = usable_gib(measured, failed, limit_gib)
    too_large = [one.size for one in measured if one.peak_memory_gib > target_gib] + ([failed] if failed else [])
    bound = min([*too_large, most + 1])
    fitting = [one for one in measured if one.peak_memory_gib <= target_gib and one.size < bound]
    if not fitting:
        return max(1, bound // 4) if bound > 1 else None
    largest = fitting[-1].size
    known = list(measured[: len(fitting) + 1])[-2:]
    candidate = most
    if len(known) == 2:
        slope = (known[1].peak_memory_gib - known[0].peak_memory_gib) / (known[1].size - known[0].size)
        if slope > 0:
            candidate = min(most, int(known[1].size + (target_gib - known[1].peak_memory_gib) / slope))
    if candidate >= bound:
        candidate = (largest + bound) // 2
    candidate = round_size(candidate)
    return candidate if candidate > largest * (1 + _SIZE_TOLERANCE) else None


def is_far_slower(row: SizeMeasured, reference: Sequence[SizeMeasured]) -> bool:
    """Return whether one size shows that its precision is emulated, so that larger ones need not be measured.

    Args:
        row: the measurement of the size.
        reference: the measurements in float32.
    """
    return any(
        one.size == row.size and one.images_per_second > _FAR_SLOWER * row.images_per_second for one in reference
    )


def choose_precision(
    measurements: Mapping[str, tuple[SizeMeasured, ...]], losses: Mapping[str, tuple[float, ...]]
) -> tuple[str, str]:
    """Return the precision to train in, and why: the fastest whose first losses are not worse than those of float32.

    Args:
        measurements: at least one for each precision, the most exact precision first (float32, if it fits). Another
            precision must be faster at every size that was measured in both.
        losses: losses of the same first steps, by precision.
    """
    exact, *others = measurements
    if not others:
        return exact, f"{exact}, the only precision that fits"
    by_size = {name: {one.size: one.images_per_second for one in rows} for name, rows in measurements.items()}
    gains = {
        name: min(by_size[name][size] / by_size[exact][size] for size in by_size[name].keys() & by_size[exact].keys())
        for name in measurements
    }
    reference = float(np.mean(losses[exact][-4:]))
    means = {name: float(np.mean(losses[name][-4:])) for name in measurements}
    sane = [name for name in measurements if means[name] <= reference * (1 + _LOSS_TOLERANCE)]
    fastest = max(sane or [exact], key=lambda name: gains[name])
    chosen = fastest if gains[fastest] > 1 + _THROUGHPUT_TOLERANCE else exact
    return chosen, f"{_describe_speed(chosen, by_size, means)} against " + ", ".join(
        _describe_speed(name, by_size, means) for name in measurements if name != chosen
    )


def _describe_speed(name: str, by_size: Mapping[str, Mapping[int, float]], losses: Mapping[str, float]) -> str:
    speeds = [
        (size, speed) for size, speed in sorted(by_size[name].items()) if all(size in one for one in by_size.values())
    ]
    listed = " and ".join(f"{speed:.0f}" for _, speed in speeds)
    sizes = " and ".join(str(size) for size, _ in speeds)
    return f"{name} {listed} images/s at {sizes} and loss {losses[name]:.3f}"


def decide(
    request: BatchRequest, table: BatchTable, rows: int, noise_scale: float = ASSUMED_NOISE_SCALE
) -> BatchChoice:
    """Return the batch that a table gives for a request.

    Args:
        request: a request for auto, max or knee.
        table: a table with at least one size that fits.
        rows: number of rows of the train split.
        noise_scale: gradient noise scale in images.
    """
    replicas = table.num_replicas
    most = largest_for_rows(rows, replicas, request.min_steps_per_epoch)
    allowed = [one for one in table.fitting if one.size <= most] or table.fitting[:1]
    # The largest size is known to fit if a larger one does, measured or not.
    largest, bound = (most, "rows") if most <= table.fitting[-1].size else (table.fitting[-1].size, "memory")
    chosen, size = allowed[-1], largest
    if request.global_batch_size == "auto":
        chosen = min(allowed, key=lambda one: result_seconds(one, noise_scale))
        size = min(chosen.size, most)
    elif request.global_batch_size == "knee":
        size = min(table.knee.size, largest)
    limit: Any = bound
    if size < largest or (bound == "memory" and not table.fills_memory):
        limit = "time" if request.global_batch_size == "auto" else "throughput"
    return BatchChoice(
        request=request,
        global_batch_size=size * replicas,
        precision=table.precision,
        limit=limit,
        explanation=f"global batch {size * replicas} = {replicas} x {size} ({request.global_batch_size}), "
        + "; ".join([_describe_limit(limit, request, table, rows), *_describe_knee(table), table.precision_reason]),
        table=table,
        noise_scale=noise_scale if request.global_batch_size == "auto" else None,
    )


def _describe_limit(limit: str, request: BatchRequest, table: BatchTable, rows: int) -> str:
    failed = table.failed.get(table.precision)
    match limit:
        case "rows":
            least = format_count(request.min_steps_per_epoch, "step")
            return f"set by the rows: {format_count(rows, 'image')} in at least {least} per epoch"
        case "memory":
            largest = table.fitting[-1]
            return (
                f"set by memory: {largest.peak_memory_gib:.2f} of {table.memory_limit_gib:.2f} GiB per worker"
                + (f", {format_count(failed, 'image')} ran out of memory" if failed else "")
                + f"; {SAFETY_MARGIN:.0%} stay free"
            )
    return "set by the time to a result" if limit == "time" else "set by throughput"


def _describe_knee(table: BatchTable) -> list[str]:
    if not table.saturates:
        return []
    knee = table.knee
    return [f"throughput stops rising at {table.num_replicas} x {knee.size} ({knee.images_per_second:.0f} images/s)"]


def describe_time(choice: BatchChoice, steps: int, *, may_end_early: bool = False) -> str:
    """Describe how long a run takes with the batch that ``auto`` chose, with half of it and with double.

    Args:
        choice: a measured choice.
        steps: number of optimizer steps of the run.
        may_end_early: whether the run may take fewer steps.
    """
    table, noise_scale = choice.table, choice.noise_scale
    if table is None or noise_scale is None:
        return ""
    size = choice.global_batch_size // table.num_replicas
    by_size = {one.size: one for one in table.fitting}
    if size not in by_size:
        return ""
    minutes = by_size[size].seconds_per_step * steps / 60
    unit = minutes / result_seconds(by_size[size], noise_scale)
    text = f"{'at most' if may_end_early else 'about'} {minutes:.1f} minutes of steps"
    texts = [
        f"{unit * result_seconds(by_size[other], noise_scale):.1f} with {factor} the batch"
        for factor, other in (("half", size // 2), ("double", 2 * size))
        if other in by_size
    ]
    if not texts:
        return text
    return f"{text}, to the same result {', '.join(texts)} (time of a step x (1 + {noise_scale:.0f} / batch))"


def find_contradiction(choice: BatchChoice, history: Sequence[Mapping[str, Any]]) -> str:
    """Return a finding if training was far faster or slower than the measurement of its size; empty if not.

    Args:
        choice: the choice of the run.
        history: one row of metrics per epoch. The first epoch does not count, because it compiles.
    """
    table = choice.table
    rates = [row["images_per_second"] for row in history[1:] if row["global_batch_size"] == choice.global_batch_size]
    if table is None or not rates:
        return ""
    measured = [one for one in table.rows if one.size * table.num_replicas == choice.global_batch_size]
    if not measured:
        return ""
    trained, expected = float(np.median(rates)), measured[0].images_per_second
    if max(trained / expected, expected / trained) < _CONTRADICTION:
        return ""
    return (
        f"batch table: training ran at {trained:.0f} images/s, measured were {expected:.0f} at a batch of "
        f"{choice.global_batch_size}; the next run measures again"
    )


def format_noise_scale(noise_scale: float) -> str:
    """Return a gradient noise scale in words; infinite is one whose gradients are no longer than their noise."""
    return "more images than can be measured" if math.isinf(noise_scale) else f"{noise_scale:.0f} images"


def find_noise_surprise(choice: BatchChoice, noise_scale: float | None, rows: int) -> str:
    """Return a finding if the noise scale is so far from the assumed one that ``auto`` would choose another batch.

    Args:
        choice: the choice of the run.
        noise_scale: noise scale that the run measured, in images; None if it did not.
        rows: number of rows of the train split.
    """
    assumed, table = choice.noise_scale, choice.table
    if assumed is None or table is None or noise_scale is None:
        return ""
    if 1 / _NOISE_SURPRISE < (noise_scale + 1) / (assumed + 1) < _NOISE_SURPRISE:
        return ""
    better = decide(choice.request, table, rows, noise_scale).global_batch_size
    if better == choice.global_batch_size:
        return ""
    return (
        f"noise scale: {format_noise_scale(noise_scale)}, {assumed:.0f} were assumed; with it the batch of the next "
        f"run is {better} instead of {choice.global_batch_size}, as far as sizes were measured"
    )


def find_bottlenecks(table: BatchTable, alone: SizeMeasured | None) -> list[str]:
    """Return what keeps throughput from doubling with the batch, one line each (tuning playbook, B5).

    Args:
        table: the table of all workers.
        alone: the measurement of one worker alone at the size of the knee; None if there is only one worker.
    """
    lines: list[str] = []
    pairs = [(one, two) for one in table.fitting for two in table.fitting if two.size == 2 * one.size]
    weak = [(one, two) for one, two in pairs if two.images_per_second < _DOUBLING_GAIN * one.images_per_second]
    if not weak:
        return lines
    one, two = weak[0]
    gain = two.images_per_second / one.images_per_second
    lines.append(
        f"from {one.size} to {format_count(two.size, 'image')} per replica throughput grows {gain:.2f} times, not "
        "about 2"
    )
    knee = table.knee
    input_share = 1 - knee.synthetic_seconds_per_step / knee.seconds_per_step
    if input_share > _THROUGHPUT_TOLERANCE:
        lines.append(f"input: at {knee.size} a step waits {input_share:.0%} of its time for images")
    if alone is not None:
        efficiency = alone.seconds_per_step / knee.seconds_per_step
        lines.append(
            f"synchronization: at {knee.size} a step of one worker alone takes {efficiency:.0%} of a step of all "
            f"{table.num_replicas}"
        )
    if len(lines) == 1:
        lines.append(f"computation: synthetic images are no faster, so the device is busy from about {knee.size} on")
    return lines
