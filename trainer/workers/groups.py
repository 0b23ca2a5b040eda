"""Runs a function on Ray Train workers that are one MultiWorkerMirroredStrategy, and hears of their progress.

One worker on a machine of its own is no group: it is a process of that machine (`trainer.workers.local_worker`).

How many there are, and whether the cluster has room for them, is decided here too.
"""

import contextlib
import io
import itertools
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from trainer.runtime.cluster import Resources, read_resources, request_nodes
from trainer.runtime.errors import InputError, JobError, WorkerDiedError, WorkersFailedError
from trainer.runtime.events import OnEvent, StageProgressed, WorkersAwaited, WorkersLost, ignore_event
from trainer.runtime.folders import hold_folder
from trainer.runtime.markdown import format_count
from trainer.runtime.processes import end_with, this_process
from trainer.workers.local_worker import run_process
from trainer.workers.pulse import Pulse, Watch

if TYPE_CHECKING:
    from ray.train import ScalingConfig, TrainingFailedError

_POLL_SECONDS = 0.2
# What a job that has just ended held is free this much later at the latest.
_RELEASE_SECONDS = 5.0
# Ray looks for room for the workers for a minute at a time. A node that was lost may need some until it is replaced.
# Ray counts over the whole run, so there are as many again for each loss that is allowed.
_ROOM_TRIES = 15
# Without a word from any worker, before the user is told what they wait for.
_SILENCE_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerCount:
    """How many workers a job has: those that fit now, as few as ``least`` after a loss, up to ``most``."""

    least: int
    now: int
    most: int


def parse_num_workers(num_workers: str, resources: Resources) -> WorkerCount:
    """Returns how many workers a job has.

    Args:
        num_workers: a number, "MIN:MAX", or "auto" for one a GPU, or one where there is none.
        resources: of the cluster.

    Raises:
        InputError: it is none of these, or the cluster has fewer GPUs.
    """
    gpus = resources.num_gpus
    if num_workers == "auto":
        return WorkerCount(max(1, gpus), max(1, gpus), max(1, gpus))
    least, most = _parse_range(num_workers)
    # What other jobs hold now joins later: a measurement of the batch starts all at once.
    free = max(least, resources.free_gpus)
    if gpus and least > gpus:
        raise InputError(
            f"--num-workers {num_workers} needs {format_count(least, 'GPU')}, the cluster has {gpus}; give {gpus} or "
            "less, or auto, or --wait SECONDS for more"
        )
    return WorkerCount(least, min(most, free) if gpus else most, most)


def needs_cluster(num_workers: str) -> bool:
    """Returns whether a job with this ``--num-workers`` needs one on a machine with at most one GPU.

    Raises:
        InputError: it is not one of what `parse_num_workers` takes.
    """
    return num_workers != "auto" and _parse_range(num_workers)[1] > 1


def _parse_range(num_workers: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", num_workers)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise InputError(
            f"--num-workers {num_workers!r}: give a number from 1, MIN:MAX such as 2:8, or auto (one a GPU, else one)"
        )
    return least, most


def wait_for_workers(num_workers: str, resources: Resources, wait_seconds: float, on_event: OnEvent) -> Resources:
    """Returns what the cluster has as soon as the least number of workers can start at once.

    A cluster that grows by itself is asked for the nodes that it lacks.

    Args:
        num_workers: as in `parse_num_workers`.
        resources: of the cluster, which is connected.
        wait_seconds: how long to wait.
        on_event: told of the waiting.

    Raises:
        InputError: they could not start in that time; with the arithmetic.
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
    """Returns what an autoscaler is asked for: a GPU where there are some, or where no node works yet."""
    return {"GPU": 1} if resources.num_gpus or not resources.num_cpus else {"CPU": 1}


def _find_shortage(num_workers: str, resources: Resources) -> InputError | None:
    """Returns what keeps the least number of workers from starting now."""
    try:
        least = parse_num_workers(num_workers, resources).least
    except InputError as error:
        return error
    if not resources.num_cpus:
        return InputError(
            f"--num-workers {num_workers}: no node of the cluster works yet; start one, or give a number and --wait "
            "SECONDS where the cluster grows by itself"
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
    on_event: OnEvent,
) -> Any:
    """Calls a function on every worker at once, each in a fresh process, and returns what the first one returned.

    Args:
        function: gets a function that sends an event to the driver and never waits. It imports TensorFlow itself: the
            driver must not (3 s of one core).
        name: of the group in Ray's logs.
        workers: each gets a GPU where the cluster has GPUs.
        resources: of the cluster, which is connected.
        max_failures: how often lost workers are started again, all together.
        on_event: told of the events that workers sent, until the workers have ended.

    Raises:
        InputError, JobError: that of the function on one of the workers.
        JobError: the cluster had no room for them, at the start or after losses: for a quarter of an hour in all, and
            as much again for each of ``max_failures``.
        WorkersFailedError: the workers failed otherwise, more often than allowed.
    """
    if workers.most == 1 and resources.is_one_machine:
        return _run_alone(function, resources, max_failures, on_event)
    # Not at the top: a job without a cluster spares itself the second.
    from ray.train import FailureConfig, RunConfig, TrainingFailedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.util.queue import Empty, Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from trainer.workers.backend import TensorFlowConfig
    from trainer.workers.failures import Failures, FailureSender, GroupFailed, call_in_group

    # With the driver, like Ray Train's controller: any other node may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def send_event(event: Any) -> None:
        queue.actor.put_nowait.remote(event)

    driver = this_process()

    def work() -> Any:
        # Ray ends it 2 to 3 seconds after the driver was killed.
        end_with(driver)
        # TensorFlow leaves files when a worker is killed, as Ray ends it.
        with hold_folder("training-notes-", tempfile.gettempdir()) as folder:
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            return call_in_group(function, send_event)

    # Ray's own bookkeeping: the state of a run is in the run folder (docs/decisions/0003).
    folders = contextlib.ExitStack()
    bookkeeping = folders.enter_context(hold_folder("ray-train-", resources.folder or tempfile.gettempdir()))
    trainer = DataParallelTrainer(
        work,
        backend_config=TensorFlowConfig(),
        scaling_config=_scaling(workers, resources),
        run_config=RunConfig(
            name=name,
            storage_path=bookkeeping,
            # Ray's own limit of tries to find room is none: a run that lost a node would wait for ever.
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=_ROOM_TRIES * (max_failures + 1)
            ),
            callbacks=[FailureSender(send_event)],
        ),
    )
    fitted: Future[Any] = Future()

    def fit() -> None:
        try:
            # Ray prints a paragraph for each worker that dies; what it means is told by whoever asked for the workers.
            with contextlib.redirect_stdout(io.StringIO()):
                fitted.set_result(trainer.fit().return_value)
        except BaseException as error:
            fitted.set_exception(error)

    # In a thread of its own Ray leaves the handler of SIGINT alone: a signal interrupts the loop below, and the workers
    # end with the connection to Ray.
    threading.Thread(target=fit, daemon=True).start()
    heard = told = time.monotonic()
    watch = Watch(on_event)
    failures = Failures(watch, max_failures)
    try:
        while True:
            # Before the look into the queue: an event may arrive just after the workers have ended.
            ended = fitted.done()
            try:
                event = queue.get(timeout=_POLL_SECONDS)
                heard = time.monotonic()
                if isinstance(event, Pulse):
                    watch.hear(event)
                elif isinstance(event, GroupFailed):
                    if (lost := failures.describe(event)) is not None:
                        on_event(lost)
                else:
                    on_event(event)
                watch.look()
            except Empty:
                watch.look()
                if ended:
                    return fitted.result()
                now = time.monotonic()
                if min(now - heard, now - told) > _SILENCE_SECONDS:
                    told = now
                    if _waits_for_room(workers, resources):
                        on_event(WorkersAwaited(workers.least, now - heard))
    except TrainingFailedError as error:
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            raise JobError(
                f"{format_count(workers.least, 'worker')} found no room: {read_resources().hardware}; start nodes or "
                "wait for other jobs to end, or give a smaller --num-workers or a range, MIN:MAX"
            ) from error
        causes = _find_causes(error)
        for cause in causes:
            if isinstance(cause, InputError | JobError):
                raise cause from error
        if failures.death is not None:
            causes = [failures.death, *(one for one in causes if not isinstance(one, WorkerDiedError))]
        raise WorkersFailedError(causes) from error
    finally:
        queue.shutdown()
        folders.close()


def _waits_for_room(workers: WorkerCount, resources: Resources) -> bool:
    """Returns whether workers such as these wait for a place; another job's that are alike count, too."""
    bundle = _worker_resources(workers.most, resources)
    return any(
        group["state"] in ("PENDING", "RESCHEDULING") and bundle in group["bundles"].values()
        for group in ray.util.placement_group_table().values()
    )


def _run_alone(function: Callable[[OnEvent], Any], resources: Resources, max_failures: int, on_event: OnEvent) -> Any:
    for failures in itertools.count():
        try:
            return run_process(function, resources.folder, on_event)
        except WorkerDiedError as error:
            if failures == max_failures:
                raise WorkersFailedError([error]) from error
            on_event(WorkersLost(str(error), error.log, error.tail, failures + 1, max_failures))
        except (InputError, JobError):
            raise
        except Exception as error:
            # It would fail again.
            raise WorkersFailedError([error]) from error


def _find_causes(error: "TrainingFailedError") -> list[Exception]:
    """Returns what ended each worker of the last attempt, or Ray Train itself."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    causes = [getattr(one, "_base_exc", one) for one in getattr(error, "worker_failures", {}).values()]
    return [WorkerDiedError(str(one)) if isinstance(one, WorkerHealthCheckFailedError) else one for one in causes] or [
        error
    ]


def call_in_worker(function: Callable[..., Any], *arguments: Any, resources: Resources) -> Any:
    """Returns what a function returns in a process of its own, with a GPU where the cluster has some.

    The driver must not import TensorFlow, whose messages no variable keeps from a user's terminal.

    Raises:
        InputError: that of the function.
        JobError: the function failed otherwise.
    """
    if resources.is_one_machine:
        try:
            return run_process(lambda _: function(*arguments), resources.folder, ignore_event)
        except InputError:
            raise
        except Exception as error:
            raise JobError(f"the worker failed: {error}") from error
    remote = ray.remote(num_gpus=min(1, resources.num_gpus))(function)
    try:
        return ray.get(remote.remote(*arguments))
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
    """Gives each worker a GPU where there are GPUs, and never the last CPU: Ray Data needs one."""
    cpus = resources.num_cpus
    of_worker = min(1.0, (cpus - 1) / num_workers) if cpus > 1 else 0.5 / num_workers
    return {"CPU": of_worker} | ({"GPU": 1} if resources.num_gpus else {})
