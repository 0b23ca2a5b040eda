"""Identity and end of processes, as other processes on the same machine see them."""

import contextlib
import multiprocessing
import os
import select
import sys
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process, identified among all living processes of its machine."""

    pid: int
    namespace: str
    """Identity of the boot and the process namespace; processes can look up each other only within one."""


def this_process() -> ProcessId:
    """Return the identity of the calling process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ProcessId(os.getpid(), f"{boot} {os.readlink('/proc/self/ns/pid')}")


def is_worker() -> bool:
    """Return whether a job started this process: by Ray, or as its single worker."""
    # A worker of Ray has imported it. Without a connection, the context would start a cluster.
    ray = sys.modules.get("ray")
    is_of_ray = ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return multiprocessing.parent_process() is not None or is_of_ray


def is_gone(process: ProcessId) -> bool:
    """Return whether a process is known to have ended; False for one that cannot be looked up from here.

    A zombie has ended, although its exit code has not been read yet.
    """
    if process.namespace != this_process().namespace:
        return False
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(b") ")[2][:1] in (b"Z", b"X")


def end_with(process: ProcessId) -> None:
    """Make the calling process exit with 1 as soon as another one ends, if that one can be looked up from here."""
    if process.namespace != this_process().namespace:
        return
    if is_gone(process):
        os._exit(1)
    # A sandbox may not permit it.
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(process.pid)
        threading.Thread(target=_exit_when_readable, args=(descriptor,), name="driver", daemon=True).start()


def _exit_when_readable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os._exit(1)
