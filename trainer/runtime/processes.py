"""What processes of one machine know of each other's life."""

import contextlib
import os
import select
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process, as other processes of its machine can tell it from all others that live."""

    pid: int
    namespace: str
    """What two processes have in common of which one can look for the other."""


def this_process() -> ProcessId:
    """Return the identity of the calling process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ProcessId(os.getpid(), f"{boot} {os.readlink('/proc/self/ns/pid')}")


def is_gone(process: ProcessId) -> bool:
    """Return whether a process is known to have ended; one that cannot be looked for from here is not.

    A zombie has ended, though nobody has asked for its exit code yet.
    """
    if process.namespace != this_process().namespace:
        return False
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(b") ")[2][:1] in (b"Z", b"X")


def end_with(process: ProcessId) -> None:
    """Make the calling process exit with 1 as soon as another one has ended, if that can be looked for from here."""
    if process.namespace != this_process().namespace:
        return
    if is_gone(process):
        os._exit(1)
    # A sandbox may refuse it.
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(process.pid)
        threading.Thread(target=_exit_when_readable, args=(descriptor,), name="driver", daemon=True).start()


def _exit_when_readable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os._exit(1)
