"""A worker that is one process of this machine, for jobs that need no cluster.

Ray Train runs in local mode in it, so the function sees the same interface as on a cluster with one worker.
"""

import contextlib
import multiprocessing
import os
import platform
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from ray import cloudpickle

from trainer.runtime.cluster import WORKER_ENVIRONMENT
from trainer.runtime.errors import InputError, JobError, WorkerDiedError
from trainer.runtime.events import OnEvent
from trainer.workers.pulse import Pulse, Watch, describe_signal, keep_pulse, read_traces

_LOG_NAME = "worker.log"
_POLL_SECONDS = 1.0
# A process that waits for its next function gives its memory back after this time.
_IDLE_SECONDS = 60.0


_kept: dict[str, "_Worker"] = {}
"""Processes that have called a function and wait for the next one, by their folder."""


def run_process(function: Callable[[OnEvent], Any], folder: str, on_event: OnEvent, *, keep: bool = False) -> Any:
    """Call a function in a process of its own and return its result.

    It is a new process, or the one that an earlier call with ``keep`` left in the same folder: the next function then
    finds TensorFlow imported.

    Args:
        function: takes a function that sends an event to this process. It may be a closure.
        folder: folder for the output of the process, ``worker.log``, and its temporary files.
        on_event: called with each event until the function has returned.
        keep: leave the process to the next call, for which it waits a minute.

    Raises:
        InputError, JobError, MemoryError: the function raised it.
        RuntimeError: the function raised another error, which the message names.
        WorkerDiedError: the process ended without a result.
    """
    worker = _kept.pop(folder, None)
    if worker is None or not worker.is_alive:
        worker = _Worker(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(worker.end)
        result = worker.call(function, on_event)
        if keep:
            _kept[folder] = worker
            stack.pop_all()
    return result


def discard_kept(folder: str) -> None:
    """End the process that an earlier call left in a folder, if there is one."""
    if worker := _kept.pop(folder, None):
        worker.end()


class _Worker:
    """A process that calls one function after the other."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_main, args=(folder, other), daemon=True)
        with _without_main_module():
            self._process.start()
        # Only the process holds the other end now, so its death closes the pipe.
        other.close()

    @property
    def is_alive(self) -> bool:
        """Whether the process can call another function."""
        return self._process.is_alive()

    def call(self, function: Callable[[OnEvent], Any], on_event: OnEvent) -> Any:
        """Call a function in the process; see `run_process`."""
        watch = Watch(on_event)
        try:
            self._connection.send_bytes(cloudpickle.dumps(function))
            while True:
                if not self._connection.poll(_POLL_SECONDS):
                    watch.look()
                    continue
                kind, value = cloudpickle.loads(self._connection.recv_bytes())
                if kind == "pulse":
                    watch.hear(value)
                elif kind == "event":
                    on_event(value)
                elif kind == "error":
                    raise value
                else:
                    return value
        except (EOFError, ConnectionError):
            self._process.join()
            raise _describe_end(self._process, watch.last_of(0), self._folder) from None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep a process that starts in this context from running the script of this process once more.

    Python does that for functions that are pickled by name, and a script that trains without looking at ``__name__``
    would train again there. Functions come as cloudpickle's, by value.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _describe_end(process: SpawnProcess, pulse: Pulse | None, folder: str) -> WorkerDiedError:
    log = str(Path(folder, _LOG_NAME))
    traces, code = read_traces(log), process.exitcode or 0
    how = f"ended with exit code {code}" if code >= 0 else describe_signal(signal.Signals(-code).name, pulse, traces)
    worker = pulse or f"worker 0 (process {process.pid})"
    return WorkerDiedError(f"{worker} {how}", f"{platform.node()}:{log}", traces.tail)


def _main(folder: str, connection: Connection) -> None:
    """Entry point of the worker process."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    # Let the kernel kill this process first when memory runs out, as Ray does for its workers.
    Path("/proc/self/oom_score_adj").write_text("1000")
    # A terminal sends SIGINT to both processes; the driver ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No setting keeps all of TensorFlow's messages off a user's terminal.
    log = os.open(Path(folder, _LOG_NAME), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    # As a line is printed, it is in the log, however the process ends; stderr is so by itself.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(WORKER_ENVIRONMENT, TMPDIR=folder)
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        message = cloudpickle.dumps((kind, value))
        with lock:
            connection.send_bytes(message)

    keep_pulse(lambda pulse: send("pulse", pulse), rank=0)
    while connection.poll(_IDLE_SECONDS):
        try:
            send("result", _train(cloudpickle.loads(connection.recv_bytes()), lambda event: send("event", event)))
        except (InputError, JobError, MemoryError) as error:
            send("error", type(error)(*error.args))
        except Exception as error:
            traceback.print_exc()
            # The driver may lack its class, or would have to import TensorFlow for it.
            send("error", RuntimeError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(function: Callable[[OnEvent], Any], send_event: OnEvent) -> Any:
    from ray.train import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    # No workers: the function runs in this process.
    trainer = DataParallelTrainer(lambda: function(send_event), scaling_config=ScalingConfig(num_workers=0))
    return trainer.fit().return_value
