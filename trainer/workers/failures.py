"""Failures of a group of Ray Train workers: noticed in its controller before a new start, told by the driver."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.runtime.compat import cause_of_death
from trainer.runtime.errors import WorkerDiedError
from trainer.runtime.events import OnEvent, WorkersLost
from trainer.workers.pulse import Pulse, Traces, Watch, describe_death, keep_pulse, read_traces

# Longer than Ray takes to notice that a process is gone.
_NOTICE_SECONDS = 10.0
# To start a process on another node that reads what a worker left behind.
_READ_SECONDS = 20.0


@dataclass(frozen=True)
class GroupFailed:
    """What Ray Train says of a failure, by rank."""

    died: Mapping[int, str]
    raised: Mapping[int, str]
    is_preempted: bool
    """A node was taken away, which Ray does not count as a failure."""


class FailureSender(ray.train.UserCallback):
    """Runs in Ray Train's controller, which calls it before it starts the workers again."""

    def __init__(self, send: Callable[[GroupFailed], None]) -> None:
        self._send = send

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send what happened to the driver."""
        died, raised, is_preempted = {}, {}, False
        for rank, error in worker_exceptions.items():
            if (cause := cause_of_death(error)) is not None:
                died[rank] = str(cause)
                is_preempted |= isinstance(cause, RayActorError) and cause.preempted
            else:
                raised[rank] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._send(GroupFailed(died, raised, is_preempted))


def call_in_group(function: Callable[[OnEvent], Any], send_event: Callable[[Any], None]) -> Any:
    """Call a function in a worker of a group, with signs of life for the driver."""
    context = ray.train.get_context()
    keep_pulse(send_event, context.get_world_rank(), ray.get_runtime_context().get_node_id())
    try:
        return function(send_event)
    except Exception as error:
        if context.get_world_size() > 1 and _blames_another(error):
            # Until Ray has noticed who died: the controller would take this worker for the cause.
            time.sleep(_NOTICE_SECONDS)
        raise


def _blames_another(error: Exception) -> bool:
    """Return whether an error may come of the death of another worker, as those of collectives do."""
    kind = type(error)
    return kind.__module__.startswith("tensorflow.") and kind.__name__ != "ResourceExhaustedError"


class Failures:
    """Counts the failures of a group and finds out what is behind each."""

    def __init__(self, watch: Watch, max_failures: int) -> None:
        self._watch, self._max_failures = watch, max_failures
        self._count = 0
        self._previous: GroupFailed | None = None
        self.death: WorkerDiedError | None = None
        """Of the last failure, where a worker died."""

    def describe(self, failed: GroupFailed) -> WorkersLost | None:
        """Return what is to be told of a failure; None where the workers are not started again, or it was told."""
        if failed == self._previous:
            return None
        self._previous = failed
        self._count += not failed.is_preempted
        pulses = {rank: self._watch.last_of(rank) for rank in failed.died or failed.raised}
        self._watch.forget()
        traces = {rank: _read_traces_there(pulse) if pulse else Traces() for rank, pulse in pulses.items()}
        if failed.died:
            ends = {rank: describe_death(error, pulses[rank], traces[rank]) for rank, error in failed.died.items()}
        else:
            ends = {rank: f"failed: {error}" for rank, error in failed.raised.items()}
        reason = "; ".join(f"{pulses[rank] or f'worker {rank}'} {end}" for rank, end in sorted(ends.items()))
        first = min(ends)
        log, tail = next((pulse.log_place for pulse in [pulses[first]] if pulse), ""), traces[first].tail
        self.death = WorkerDiedError(reason, log, tail) if failed.died else None
        if self._count > self._max_failures:
            return None
        return WorkersLost(reason, log, tail, self._count, self._max_failures)


def _read_traces_there(pulse: Pulse) -> Traces:
    """Return what a worker has left behind on its node; nothing where the node is gone, too."""
    if pulse.node_id == ray.get_runtime_context().get_node_id():
        return read_traces(pulse.log)
    there = NodeAffinitySchedulingStrategy(pulse.node_id, soft=False)
    reader = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(read_traces)
    try:
        traces: Traces = ray.get(reader.remote(pulse.log), timeout=_READ_SECONDS)
    except (RayError, GetTimeoutError):
        return Traces()
    return traces
