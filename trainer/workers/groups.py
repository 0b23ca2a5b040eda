"""Groups of Ray Train workers that run one function under MultiWorkerMirroredStrategy and report to the driver.

A single worker on this machine is not a group but a process (`trainer.workers.local_worker`).

This module also decides how many workers there are, and whether the cluster has room for them.
"""

import contextlib
import itertools
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from trainer.runtime.cluster import Resources, read_resources, request_nodes
from trainer.runtime.compat import cause_of_death, error_of_function, found_no_room, mute_worker_messages, watch_starts
from trainer.runtime.errors import InputError, JobError, WorkerDiedError, WorkersFailedError
from trainer.runtime.events import OnEvent, StageProgressed, WorkersAwaited, WorkersLost, ignore_event
from trainer.runtime.folders import hold_folder
from trainer.runtime.markdown import format_count
from trainer.runtime.processes import end_with, this_process
from trainer.workers.local_worker import discard_kept, run_process
from trainer.workers.pulse import Pulse, Watch

if TYPE_CHECKING:
    from ray.train import ScalingConfig, TrainingFailedError
    from ray.util.queue import Queue

    from trainer.workers.failures import Failures

_POLL_SECONDS = 0.2
# Resources of a job that has just ended are free after at most this time.
_RELEASE_SECONDS = 5.0
# Ray looks for room for the workers for a minute per try. It may take several until a lost node is replaced. Ray counts
# the tries of the whole run, so each allowed failure adds as many again.
_ROOM_TRIES = 15
# Time without a message from any worker before the log says what they wait for.
_SILENCE_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerCount:
    """Number of workers of a job: ``now`` at the start, at least ``least`` after a loss, and up to ``most``."""

    least: int
    now: int
    most: int


def parse_num_workers(num_workers: str, resources: Resources) -> WorkerCount:
    """Return the number of workers of a job.

    Args:
        num_workers: a number, "MIN:MAX", or "auto" for one worker per GPU, or one worker without GPUs.
        resources: resources of the cluster.

    Raises:
        InputError: the value has another form, or the cluster has fewer GPUs.
    """
    gpus = resources.num_gpus
    if num_workers == "auto":
        return WorkerCount(max(1, gpus), max(1, gpus), max(1, gpus))
    least, most = _parse_range(num_workers)
    # GPUs that other jobs hold now can join later: a batch size measurement starts all of its workers at once.
    free = max(least, resources.free_gpus)
    if gpus and least > gpus:
        raise InputError(
            f"--num-workers {num_workers} needs {format_count(least, 'GPU')}, the cluster has {gpus}; give {gpus} or "
            "less, or auto, or --wait SECONDS for more"
        )
    return WorkerCount(least, min(most, free) if gpus else most, most)


def needs_cluster(num_workers: str) -> bool:
    """Return whether a job with this ``--num-workers`` needs a cluster on a machine with at most one GPU.

    Raises:
        InputError: the value has none of the forms that `parse_num_workers` takes.
    """
    return num_workers != "auto" and _parse_range(num_workers)[1] > 1


def _parse_range(num_workers: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", num_workers)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise InputError(
            f"--num-workers {num_workers!r}: give a number from 1, MIN:MAX such as 2:8, or auto (one per GPU, or one)"
        )
    return least, most


def wait_for_workers(num_workers: str, resources: Resources, wait_seconds: float, on_event: OnEvent) -> Resources:
    """Wait until the smallest number of workers can start at once, and return the resources of the cluster then.

    A cluster that scales automatically is asked for the nodes that it lacks.

    Args:
        num_workers: as in `parse_num_workers`.
        resources: resources of the connected cluster.
        wait_seconds: how long to wait.
        on_event: called with the progress of the wait.

    Raises:
        InputError: they could not start in that time; the message says what they need and what is free.
    """
    missing = [] if num_workers == "auto" else [_worker_bundle(resources)] * _parse_range(num_workers)[0]
    started = time.monotonic()
    try:
        while shortage := _find_shortage(num_workers, resources):
            waited = time.monotonic() - started
            if waited > max(wait_seconds, _RELEASE_SECONDS):
                raise shortage
            if wait_seconds:
                on_event(StageProgressed("waiting for free workers", int(waited), int(wait_seconds)))
                request_nodes(missing)
            time.sleep(_POLL_SECONDS)
            resources = read_resources(resources.folder)
    finally:
        if wait_seconds:
            request_nodes([])
    return resources


def _worker_bundle(resources: Resources) -> dict[str, float]:
    """Return what to ask an autoscaler for, per worker: a GPU if there are any or no node works yet, else a CPU."""
    return {"GPU": 1} if resources.num_gpus or not resources.num_cpus else {"CPU": 1}


def _find_shortage(num_workers: str, resources: Resources) -> InputError | None:
    """Return what keeps the smallest number of workers from starting now, or None."""
    try:
        least = parse_num_workers(num_workers, resources).least
    except InputError as error:
        return error
    if not resources.num_cpus:
        return InputError(
            f"--num-workers {num_workers}: the cluster has no working node yet; start one, or give a number and "
            "--wait SECONDS if the cluster scales automatically"
        )
    if not ray.is_initialized():
        return None
    free, total = ray.available_resources(), {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    for name, of_worker in _worker_resources(least, resources).items():
        needed, has = least * of_worker, free.get(name, 0.0)
        # Ray rounds fractions of a core.
        if needed > has + 0.001:
            return InputError(
                f"--num-workers {num_workers} needs {format_count(needed, name)}, {has:g} of {total[name]:g} are free; "
                "wait for the jobs that use them, or give --wait SECONDS"
            )
    return None


def run_workers(
    function: Callable[[OnEvent], Any],
    name: str,
    workers: WorkerCount,
    resources: Resources,
    *,
    max_failures: int = 0,
    keep: bool = False,
    shown: Mapping[str, Any] | None = None,
    on_event: OnEvent,
) -> Any:
    """Call a function on all workers at once and return what the first one returns.

    Each is a new process, except for a single worker on this machine after a call with ``keep``.

    Args:
        function: takes a function that sends an event to the driver without waiting. It must import TensorFlow itself,
            because the driver must not (3 s of one core).
        name: name of the group in Ray's logs and in the Train tab of the cluster's dashboard.
        workers: number of workers; each gets a GPU if the cluster has GPUs.
        resources: resources of the connected cluster.
        max_failures: how often the workers are restarted, all together, after a failure.
        keep: leave the process of a single worker on this machine to the next call.
        shown: options of the function that the Train tab shows beside the name.
        on_event: called with the events of the workers until they have ended.

    Raises:
        InputError, JobError: the function raised it on one of the workers.
        JobError: the cluster had no room for the workers, at the start or after failures, for a quarter of an hour in
            all, and as much again for each of ``max_failures``.
        WorkersFailedError: the workers failed in another way, more often than allowed.
    """
    if workers.most == 1 and resources.is_one_machine:
        return _run_alone(function, resources, max_failures, keep, on_event)
    # Not at the top: a job without a cluster saves the second that it takes.
    from ray.train import TrainingFailedError

    from trainer.workers.failures import Failures

    watch = Watch(on_event)
    failures = Failures(watch, max_failures)
    try:
        with _start_group(function, name, workers, resources, max_failures, shown or {}) as group:
            return _follow_group(group, watch, failures, _Silence(workers, resources, on_event), on_event)
    except TrainingFailedError as error:
        raise _explain_failure(error, workers, failures.death) from error


@dataclass(frozen=True)
class _Group:
    """Workers that Ray Train has been asked for."""

    events: "Queue"
    """What the workers, and Ray Train's controller, send to the driver."""
    result: Future[Any]
    """What the first worker returns."""


@contextlib.contextmanager
def _start_group(
    function: Callable[[OnEvent], Any],
    name: str,
    workers: WorkerCount,
    resources: Resources,
    max_failures: int,
    shown: Mapping[str, Any],
) -> Iterator[_Group]:
    """Start the workers, and remove the queue and the folders of the group at the end of the context."""
    from ray.train import FailureConfig, RunConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from trainer.workers.backend import TensorFlowConfig
    from trainer.workers.failures import FailureSender, call_in_group, send_failed_start

    # On the node of the driver, like Ray Train's controller: any other node may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def send_event(event: Any) -> None:
        queue.actor.put_nowait.remote(event)

    driver = this_process()

    def work() -> Any:
        # Ray would take 2 to 3 seconds to end this process after the driver was killed.
        end_with(driver)
        # TensorFlow leaves files behind when a worker is killed, which is how Ray ends it.
        with hold_folder("training-notes-", tempfile.gettempdir()) as folder:
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            return call_in_group(function, send_event)

    # Ray Train's own records: the state of a run is in the run folder (docs/decisions/0003).
    with hold_folder("ray-train-", resources.folder or tempfile.gettempdir()) as records:
        run_config = RunConfig(
            name=name,
            storage_path=records,
            # By default Ray looks for room without a limit: a run that lost a node would wait forever.
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=_ROOM_TRIES * (max_failures + 1)
            ),
            callbacks=[
                FailureSender(send_event),
                watch_starts(lambda error: send_failed_start(send_event, error)),
            ],
        )
        trainer = DataParallelTrainer(
            work,
            train_loop_config=dict(shown),
            backend_config=TensorFlowConfig(),
            scaling_config=_scaling(workers, resources),
            run_config=run_config,
        )
        try:
            yield _Group(queue, _call_in_thread(lambda: trainer.fit().return_value))
        finally:
            queue.shutdown()


def _call_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call a function of Ray Train that waits for workers in a thread.

    There Ray leaves the handler of SIGINT alone: a signal interrupts the main thread, and the workers end with the
    connection to Ray.
    """
    called: Future[Any] = Future()

    def call() -> None:
        try:
            # What the death of a worker means is said by the caller of `run_workers`.
            with mute_worker_messages():
                called.set_result(function())
        except BaseException as error:
            called.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return called


def _follow_group(group: _Group, watch: Watch, failures: "Failures", silence: "_Silence", on_event: OnEvent) -> Any:
    """Pass on what the workers send until they have ended, and return what the first one returned."""
    from ray.util.queue import Empty

    from trainer.workers.failures import GroupFailed

    while True:
        watch.look()
        # Before the queue is read: an event may arrive just after the workers have ended.
        ended = group.result.done()
        try:
            event = group.events.get(timeout=_POLL_SECONDS)
        except Empty:
            if ended:
                return group.result.result()
            silence.check()
            continue
        silence.end()
        if isinstance(event, Pulse):
            watch.hear(event)
        elif not isinstance(event, GroupFailed):
            on_event(event)
        elif (lost := failures.describe(event)) is not None:
            on_event(lost)


class _Silence:
    """The time without a message from any worker; reports every few seconds of it that they wait for room."""

    def __init__(self, workers: WorkerCount, resources: Resources, on_event: OnEvent) -> None:
        self._workers, self._resources, self._on_event = workers, resources, on_event
        self._heard = self._reported = time.monotonic()

    def end(self) -> None:
        """Record that a message has arrived."""
        self._heard = time.monotonic()

    def check(self) -> None:
        """Report that the workers wait for room, if they do and it is time to say so."""
        now = time.monotonic()
        if min(now - self._heard, now - self._reported) <= _SILENCE_SECONDS:
            return
        self._reported = now
        if _waits_for_room(self._workers, self._resources):
            self._on_event(WorkersAwaited(self._workers.least, now - self._heard))


def _explain_failure(error: "TrainingFailedError", workers: WorkerCount, death: WorkerDiedError | None) -> Exception:
    """Return the error of `run_workers` for one of Ray Train.

    Args:
        error: the error of Ray Train.
        workers: the workers that it was asked for.
        death: what is known of the last failure, if a worker died in it.
    """
    if found_no_room(error):
        return JobError(
            f"{format_count(workers.least, 'worker')} found no room: {read_resources().hardware}; start nodes or "
            "wait for other jobs to end, or give a smaller --num-workers or a range, MIN:MAX"
        )
    causes = _find_causes(error)
    for cause in causes:
        if isinstance(cause, InputError | JobError):
            return cause
    if death is not None:
        causes = [death, *(cause for cause in causes if not isinstance(cause, WorkerDiedError))]
    return WorkersFailedError(causes)


def _waits_for_room(workers: WorkerCount, resources: Resources) -> bool:
    """Return whether workers with these resources wait for room; those of other jobs count too."""
    bundle = _worker_resources(workers.most, resources)
    return any(
        group["state"] in ("PENDING", "RESCHEDULING") and bundle in group["bundles"].values()
        for group in ray.util.placement_group_table().values()
    )


def discard_kept_worker(resources: Resources) -> None:
    """End the process that a call with ``keep`` left, if there is one: the next call has a new one."""
    discard_kept(resources.folder)


def _run_alone(
    function: Callable[[OnEvent], Any], resources: Resources, max_failures: int, keep: bool, on_event: OnEvent
) -> Any:
    for failures in itertools.count():
        try:
            return run_process(function, resources.folder, on_event, keep=keep)
        except WorkerDiedError as error:
            if failures == max_failures:
                raise WorkersFailedError([error]) from error
            on_event(WorkersLost(str(error), error.log, error.tail, failures + 1, max_failures))
        except (InputError, JobError):
            raise
        except Exception as error:
            # A restart would fail in the same way.
            raise WorkersFailedError([error]) from error


def _find_causes(error: "TrainingFailedError") -> list[Exception]:
    """Return the error of each worker that failed in the last attempt, or else that of Ray Train's controller."""
    if isinstance(raised := getattr(error, "controller_failure", None), InputError | JobError):
        return [raised]  # by `FailureSender`
    causes = [error_of_function(one) for one in getattr(error, "worker_failures", {}).values()]
    return [WorkerDiedError(str(one)) if cause_of_death(one) else one for one in causes] or [error]


def call_in_worker(
    function: Callable[..., Any], *arguments: Any, resources: Resources, on_event: OnEvent | None = None
) -> Any:
    """Call a function in a process of its own, with a GPU if the cluster has one, and return its result.

    The driver must not import TensorFlow, because no setting keeps all of its messages off a user's terminal.

    Args:
        function: what to call. Where there is an ``on_event``, it takes a function that sends an event as its last
            argument.
        *arguments: of the function.
        resources: of the connected cluster.
        on_event: called with the events of a process on this machine. Those of another one are not sent.

    Raises:
        InputError: the function raised it.
        JobError: the function failed in another way.
    """
    if resources.is_one_machine:
        try:
            if on_event is None:
                return run_process(lambda _: function(*arguments), resources.folder, ignore_event)
            return run_process(lambda send: function(*arguments, send), resources.folder, on_event)
        except InputError:
            raise
        except Exception as error:
            raise JobError(f"the worker failed: {error}") from error
    remote = ray.remote(num_gpus=min(1, resources.num_gpus))(function)
    try:
        return ray.get(remote.remote(*arguments, *([ignore_event] if on_event else [])))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, InputError):
            raise cause from error
        raise JobError(f"the worker failed: {cause}") from error


def _scaling(workers: WorkerCount, resources: Resources) -> "ScalingConfig":
    from ray.train import ScalingConfig

    elastic = workers.least < workers.most
    return ScalingConfig(
        num_workers=(workers.least, workers.most) if elastic else workers.now,
        use_gpu=bool(resources.num_gpus),
        resources_per_worker=_worker_resources(workers.most, resources),
    )


def _worker_resources(num_workers: int, resources: Resources) -> dict[str, float]:
    """Return the resources of one worker: a GPU if there are any, and never the last CPU, which Ray Data needs."""
    cpus = resources.num_cpus
    of_worker = min(1.0, (cpus - 1) / num_workers) if cpus > 1 else 0.5 / num_workers
    return {"CPU": of_worker} | ({"GPU": 1} if resources.num_gpus else {})
