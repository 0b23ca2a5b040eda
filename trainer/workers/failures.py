"""Failures of a group of Ray Train workers: caught in its controller before a restart, reported by the driver."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.runtime.compat import cause_of_death, cause_of_failed_start, error_of_function
from trainer.runtime.errors import InputError, JobError, WorkerDiedError
from trainer.runtime.events import OnEvent, StartFailed, WorkersLost
from trainer.workers.pulse import Pulse, Traces, Watch, describe_death, keep_pulse, read_traces

# Longer than Ray takes to notice that a process has ended.
_NOTICE_SECONDS = 10.0
# Time to start a process on another node that reads the log of a dead worker.
_READ_SECONDS = 20.0


@dataclass(frozen=True)
class GroupFailed:
    """A failure as Ray Train reports it: messages by rank."""

    died: Mapping[int, str]
    raised: Mapping[int, str]
    is_preempted: bool
    """Whether a node was preempted, which Ray does not count as a failure."""


class FailureSender(ray.train.UserCallback):
    """Callback in Ray Train's controller, which calls it before it restarts the workers."""

    def __init__(self, send: Callable[[GroupFailed], None]) -> None:
        self._send = send

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send the failure to the driver, or end the group for an error that would come again.

        Raises:
            InputError, JobError: a worker raised it. What a callback raises ends the controller without a restart.
        """
        for error in map(error_of_function, worker_exceptions.values()):
            if isinstance(error, InputError | JobError):
                raise error
        died, raised, is_preempted = {}, {}, False
        for rank, error in worker_exceptions.items():
            if (cause := cause_of_death(error)) is not None:
                died[rank] = str(cause)
                is_preempted |= isinstance(cause, RayActorError) and cause.preempted
            else:
                raised[rank] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._send(GroupFailed(died, raised, is_preempted))


def send_failed_start(send: Callable[[StartFailed], None], error: Exception) -> None:
    """Send to the driver why workers did not start, unless they found no room."""
    if (cause := cause_of_failed_start(error)) is not None:
        send(StartFailed(describe_failed_start(str(cause))))


def describe_failed_start(error: str) -> str:
    """Describe the death of a worker that has not sent a pulse yet, from Ray's message."""
    pid, host = (re.search(rf"^\s*{name}: (\S+)$", error, re.MULTILINE) for name in ("pid", "ip"))
    process = f" (process {pid[1]} on {host[1]})" if pid and host else ""
    return f"a worker{process} {describe_death(error, None, Traces())} while it started"


def call_in_group(function: Callable[[OnEvent], Any], send_event: Callable[[Any], None]) -> Any:
    """Call a function in a worker of a group, while pulses are sent to the driver."""
    context = ray.train.get_context()
    keep_pulse(send_event, context.get_world_rank(), ray.get_runtime_context().get_node_id())
    try:
        return function(send_event)
    except Exception as error:
        if context.get_world_size() > 1 and _blames_another(error):
            # Wait until Ray has noticed the dead worker; otherwise the controller takes this one for the cause.
            time.sleep(_NOTICE_SECONDS)
        raise


def _blames_another(error: Exception) -> bool:
    """Return whether the death of another worker may have caused an error, as for errors of collective operations."""
    kind = type(error)
    return kind.__module__.startswith("tensorflow.") and kind.__name__ != "ResourceExhaustedError"


class Failures:
    """The failures of a group: counts them and finds their causes."""

    def __init__(self, watch: Watch, max_failures: int) -> None:
        self._watch, self._max_failures = watch, max_failures
        self._count = 0
        self._previous: GroupFailed | None = None
        self.death: WorkerDiedError | None = None
        """The last failure, if a worker died in it."""

    def describe(self, failed: GroupFailed) -> WorkersLost | None:
        """Return the event to report for a failure; None if the workers are not restarted or it was reported."""
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
    """Read what a worker has left behind on its node; nothing if the node is lost too."""
    if pulse.node_id == ray.get_runtime_context().get_node_id():
        return read_traces(pulse.log)
    there = NodeAffinitySchedulingStrategy(pulse.node_id, soft=False)
    reader = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(read_traces)
    try:
        traces: Traces = ray.get(reader.remote(pulse.log), timeout=_READ_SECONDS)
    except (RayError, GetTimeoutError):
        return Traces()
    return traces
