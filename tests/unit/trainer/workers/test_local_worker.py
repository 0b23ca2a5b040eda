"""How the end of a worker process is described; with a function that trains: tests/integration/test_local_worker.py."""

import multiprocessing
import os
import platform
import signal

import pytest

from trainer.workers.local_worker import _describe_end


@pytest.mark.parametrize(
    ("end", "argument", "described"),
    [(os._exit, 3, "ended with exit code 3"), (signal.raise_signal, signal.SIGABRT, "was killed by SIGABRT")],
)
def test_the_end_of_a_process_without_a_result_is_described(tmp_path, end, argument, described):
    process = multiprocessing.get_context("spawn").Process(target=end, args=(argument,))
    process.start()
    process.join()
    (tmp_path / "worker.log").write_bytes(b"double free or corruption (out)\n")
    died = _describe_end(process, None, str(tmp_path))
    assert str(died).startswith(f"worker 0 (process {process.pid}) {described}")
    assert died.log == f"{platform.node()}:{tmp_path}/worker.log"
    assert died.tail == b"double free or corruption (out)\n"
