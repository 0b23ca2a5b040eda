"""Decide what a search for the batch measures next: the same decision in the driver and on every worker.

Nothing here depends on the clock or the machine: a decision follows from the request and the measurements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from trainer.config.batch_table import (
    choose_precision,
    is_far_slower,
    next_size,
    predict_gib,
    result_seconds,
    usable_gib,
)
from trainer.runtime.events import LossesMeasured, SizeMeasured

# Share of a run that the search for its batch may take.
BUDGET_SHARE = 0.1
# A larger batch must be faster by this factor for `knee` to go on.
_RISING = 1.05
# If memory holds more than the last measured power of two, by this factor or more, the search fills it.
_WORTH_FILLING = 1.2
# A size whose step would take longer than this is not measured: no budget has room for it.
_LONGEST_STEP_SECONDS = 20.0

Goal = Literal["auto", "max", "knee", "given", "every"]


@dataclass(frozen=True)
class Search:
    """The goal and the limits of a search. Sizes are images per replica."""

    goal: Goal
    """``auto``: the shortest way to a result; ``max``: what memory holds; ``knee``: the smallest size that is about as
    fast as the fastest; ``given``: the precision only; ``every``: the complete table."""
    precisions: tuple[str, ...]
    """The precisions to choose from, float32 first."""
    start: int
    """The first size."""
    most: int
    """The largest useful size."""
    noise_scale: float
    """Gradient noise scale in images."""
    images: int
    """Number of images that the run trains on, over all epochs."""


@dataclass(frozen=True)
class Known:
    """The measurements so far."""

    memory_limit_gib: float = math.inf
    measured: Mapping[str, tuple[SizeMeasured, ...]] = field(default_factory=dict)
    """Measured sizes by precision, in ascending order."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """The smallest size that ran out of memory, by precision."""
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Losses of the first steps, by precision."""
    precision: tuple[str, str] | None = None
    """The chosen precision, and the reason; None before the choice."""

    def add(self, event: SizeMeasured | LossesMeasured) -> "Known":
        """Return the measurements with one more."""
        if isinstance(event, LossesMeasured):
            return replace(self, losses={**self.losses, event.precision: event.losses})
        rows = {one.size: one for one in (*self.rows(event.precision), event)}
        of_precision = tuple(rows[size] for size in sorted(rows))
        return replace(self, measured={**self.measured, event.precision: of_precision})

    def add_failure(self, precision: str, size: int) -> "Known":
        """Return the measurements after a size has run out of memory."""
        size = min(size, self.failed.get(precision, size))
        return replace(self, failed={**self.failed, precision: size})

    def limit(self, memory_limit_gib: float) -> "Known":
        """Return the measurements with a memory limit that may be lower."""
        return replace(self, memory_limit_gib=min(self.memory_limit_gib, memory_limit_gib))

    def rows(self, precision: str) -> tuple[SizeMeasured, ...]:
        """Return the measured sizes of a precision in ascending order."""
        return self.measured.get(precision, ())

    def has(self, precision: str, size: int) -> bool:
        """Return whether a size was measured, or is known not to fit."""
        return size >= self.failed.get(precision, math.inf) or any(one.size == size for one in self.rows(precision))

    @property
    def seconds(self) -> float:
        """Total duration of all measurements."""
        return sum(one.seconds for rows in self.measured.values() for one in rows)


@dataclass(frozen=True)
class Probe:
    """One size to measure, in one precision or alternately in several."""

    size: int
    precisions: tuple[str, ...]
    alone: bool = False
    """Whether its memory must be exact: no other network, and no larger size, was in the process before."""


def next_probe(search: Search, known: Known) -> Probe | None:
    """Return what to measure next, or None if the search has ended; call `settle_precision` first."""
    if known.precision is None:
        return _next_comparison(search, known)
    precision = known.precision[0]
    match search.goal:
        case "auto":
            return _climb(search, known, precision)
        case "knee":
            return _climb_while_rising(search, known, precision)
        case "max":
            return _fill_memory(search, known, precision)
        case "every":
            return _complete(search, known, precision)
        case "given":
            is_known = known.has(precision, search.start)
            return None if is_known else Probe(search.start, (precision,), alone=True)


def count_probes(search: Search) -> int:
    """Return about how many sizes a search measures at most: each doubling, and what compares precisions."""
    doublings, several = 1 + math.ceil(math.log2(max(1, search.most / search.start))), len(search.precisions)
    of_each = 1 if search.goal == "given" else 2
    comparisons = 1 + of_each * several if several > 1 else 0
    sizes = {"given": 1, "every": doublings * several + 1}.get(search.goal, doublings + 1)
    return sizes + comparisons


def settle_precision(search: Search, known: Known) -> Known:
    """Return the measurements with the precision chosen, if it can be chosen by now."""
    if known.precision is not None:
        return known
    if len(search.precisions) == 1:
        return replace(known, precision=(search.precisions[0], f"{search.precisions[0]} as given"))
    if _next_comparison(search, known) is not None:
        return known
    able = {name: known.rows(name) for name in search.precisions if known.rows(name)}
    if not able:
        return replace(known, precision=(search.precisions[0], "nothing fits"))
    chosen = choose_precision(able, known.losses)
    if len(able) == 1 and not known.failed:
        exact = search.precisions[0]
        chosen = (exact, f"{exact}: the run is too short to measure others")
    return replace(known, precision=chosen)


def _next_comparison(search: Search, known: Known) -> Probe | None:
    """Return what to measure before a precision can be chosen: each alternately at two sizes, unless it is excluded."""
    exact, *others = search.precisions
    first = _first_size(search, known)
    if first is None:
        return None
    if not known.has(exact, first):
        return Probe(first, (exact,))
    sizes = _compared_sizes(search, first)
    for size in sizes:
        able = [name for name in (exact, *others) if not _is_out(known, name, exact)]
        if able in ([], [exact]) or all(known.has(name, size) for name in able):
            continue
        # Alternately with the others, so what was measured at another time is measured again.
        probe = Probe(size, tuple(name for name in able if size < known.failed.get(name, math.inf)))
        # At both sizes or not at all: one size does not decide.
        return probe if size != first or _is_affordable(search, known, probe, times=len(sizes)) else None
    return None


def _first_size(search: Search, known: Known) -> int | None:
    """Return the first size: a quarter of one that ran out of memory, or None if not even one image fits."""
    first = search.start
    died = max((known.failed.get(name, math.inf) for name in search.precisions), default=math.inf)
    while first >= died:
        if first == 1 or search.goal == "given":
            return None
        first = max(1, first // 4)
    return first


def _compared_sizes(search: Search, first: int) -> tuple[int, ...]:
    if search.goal == "given" or search.most == 1:
        return (first,)
    return (first, 2 * first) if 2 * first <= search.most else (first, max(1, first // 2))


def _is_out(known: Known, precision: str, exact: str) -> bool:
    """Return whether a precision is excluded: it is emulated, or too large for the memory."""
    rows = known.rows(precision)
    if not rows:
        return precision in known.failed
    return any(is_far_slower(one, known.rows(exact)) for one in rows)


def _is_affordable(search: Search, known: Known, probe: Probe, times: int = 1) -> bool:
    """Return whether the budget, a share of the run, has room for a number of probes like this one."""
    if search.goal == "every":
        return True
    rows = [one for rows in known.measured.values() for one in rows]
    if not rows:
        return True
    fastest = max(one.images_per_second for one in rows)
    of_probe = [one for name in probe.precisions for one in known.rows(name)] or rows
    cost = max(one.seconds for one in of_probe) * len(probe.precisions) * times
    return known.seconds + cost <= BUDGET_SHARE * search.images / fastest


def _climb(search: Search, known: Known, precision: str) -> Probe | None:
    """Double the size while that shortens the time to a result; halve it if the first doubling does not."""
    first = _first_size(search, known)
    if first is None:
        return None
    rows = known.rows(precision)
    if not rows:
        return Probe(first, (precision,))
    fitting = _fitting(known, precision)
    if not fitting:
        return _first_below(known, precision, rows[0].size)
    best = min(fitting, key=lambda one: result_seconds(one, search.noise_scale))
    larger = [one for one in rows if one.size > best.size]
    probe = None
    if not larger and best.size < search.most:
        probe = _step_up(search, known, precision, best)
    if probe is None and best == rows[0] and best.size > 1:
        probe = Probe(best.size // 2, (precision,))
    return probe if probe and _is_affordable(search, known, probe) else None


def _first_below(known: Known, precision: str, size: int) -> Probe | None:
    return Probe(max(1, size // 4), (precision,)) if size > 1 else None


def _step_up(search: Search, known: Known, precision: str, best: SizeMeasured) -> Probe | None:
    rows, failed = known.rows(precision), known.failed.get(precision)
    size = min(2 * best.size, search.most)
    needed = predict_gib(rows, size)
    target = usable_gib(rows, failed, known.memory_limit_gib)
    if size >= (failed or math.inf) or (needed is not None and needed > target):
        filling = next_size(rows, failed, min(size, search.most), known.memory_limit_gib)
        return Probe(filling, (precision,)) if filling and filling >= _WORTH_FILLING * best.size else None
    if best.seconds_per_step / best.size * size > _LONGEST_STEP_SECONDS:
        return None
    return Probe(size, (precision,))


def _climb_while_rising(search: Search, known: Known, precision: str) -> Probe | None:
    """Double the size until two in a row are no faster than an earlier one; then halve while that is no slower."""
    rows = known.rows(precision)
    if not rows:
        first = _first_size(search, known)
        return Probe(first, (precision,)) if first else None
    fitting = _fitting(known, precision)
    if not fitting:
        return _first_below(known, precision, rows[0].size)
    fastest = next(
        one for one in fitting if one.images_per_second * _RISING >= max(two.images_per_second for two in fitting)
    )
    if rows[-1] == fitting[-1] and fitting[-1].size < search.most and fastest in fitting[-2:]:
        return _step_up(search, known, precision, fitting[-1])
    if fastest == rows[0] and fastest.size > 1:
        return Probe(fastest.size // 2, (precision,))
    return None


def _fill_memory(search: Search, known: Known, precision: str) -> Probe | None:
    """Find the largest size that fits, starting with the largest useful one if two sizes predict that it fits."""
    limit, failed, rows = known.memory_limit_gib, known.failed.get(precision), known.rows(precision)
    largest = [one for one in rows if one.size == search.most]
    # A measurement next to another network is more than the size itself needs.
    if largest and largest[0].peak_memory_gib <= usable_gib(rows, failed, limit):
        return None
    promised = predict_gib(rows, search.most)
    if not largest and not failed and promised is not None and promised <= usable_gib(rows, failed, limit):
        return Probe(search.most, (precision,))
    exact = tuple(one for one in rows if one.alone)
    if len(exact) < 2 and not failed:
        first = min(_first_size(search, known) or 1, search.most)
        for size in (first, min(2 * first, search.most)):
            if all(one.size != size for one in exact):
                return Probe(size, (precision,), alone=True)
    filling = next_size(exact, failed, search.most, limit)
    return Probe(filling, (precision,), alone=True) if filling else None


def _complete(search: Search, known: Known, precision: str) -> Probe | None:
    """Measure all powers of two in each useful precision, then the largest that fits in the chosen one."""
    for name in search.precisions:
        if name != precision and _is_out(known, name, search.precisions[0]):
            continue
        exact = tuple(one for one in known.rows(name) if one.alone)
        target = usable_gib(exact, known.failed.get(name), known.memory_limit_gib)
        size = min(8, search.most)
        while size <= search.most and size < known.failed.get(name, math.inf):
            needed = predict_gib([one for one in exact if one.size < size], size)
            if needed is not None and needed > target:
                break
            if exact and exact[-1].seconds_per_step / exact[-1].size * size > _LONGEST_STEP_SECONDS:
                break
            if all(one.size != size for one in exact):
                return Probe(size, (name,), alone=True)
            size = min(2 * size, search.most) if size < search.most else size + 1
    return _fill_memory(search, known, precision)


def _fitting(known: Known, precision: str) -> list[SizeMeasured]:
    rows, failed = known.rows(precision), known.failed.get(precision)
    target = usable_gib(rows, failed, known.memory_limit_gib)
    return [one for one in rows if one.peak_memory_gib <= target]
