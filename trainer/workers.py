"""Runs a function on Ray Train workers that are one MultiWorkerMirroredStrategy, and hears of their progress."""

import contextlib
import io
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.queue import Empty, Queue

from trainer.backend import TensorFlowConfig
from trainer.cluster import Resources
from trainer.events import OnEvent

_POLL_SECONDS = 0.2


def run_workers(
    function: Callable[[OnEvent], Any],
    name: str,
    num_workers: int,
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
        num_workers: each gets a GPU where the cluster has GPUs.
        resources: of the cluster, which is connected.
        max_failures: how often lost workers are started again, all together.
        on_event: told of the events that workers sent, until the workers have ended.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than allowed.
    """
    queue = Queue(actor_options={"num_cpus": 0})

    def send_event(event: Any) -> None:
        queue.actor.put_nowait.remote(event)

    # Ray's own bookkeeping: the state of a run is in the run folder (docs/decisions/0003).
    bookkeeping = tempfile.TemporaryDirectory(prefix="ray-train-")
    trainer = DataParallelTrainer(
        lambda: function(send_event),
        backend_config=TensorFlowConfig(),
        scaling_config=_scaling(num_workers, resources),
        run_config=RunConfig(
            name=name, storage_path=bookkeeping.name, failure_config=FailureConfig(max_failures=max_failures)
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
    try:
        while True:
            # Before the look into the queue: an event may arrive just after the workers have ended.
            ended = fitted.done()
            try:
                on_event(queue.get(timeout=_POLL_SECONDS))
            except Empty:
                if ended:
                    return fitted.result()
    finally:
        queue.shutdown()
        bookkeeping.cleanup()


def _scaling(num_workers: int, resources: Resources) -> ScalingConfig:
    """Gives each worker a GPU where there are GPUs, and never the last CPU: Ray Data needs one."""
    cpus = min(1.0, (resources.num_cpus - 1) / num_workers) if resources.num_cpus > 1 else 0.5 / num_workers
    wanted = {"CPU": cpus} | ({"GPU": 1} if resources.num_gpus else {})
    return ScalingConfig(num_workers=num_workers, use_gpu=bool(resources.num_gpus), resources_per_worker=wanted)
