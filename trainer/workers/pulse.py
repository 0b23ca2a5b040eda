"""Pulses that each worker sends every few seconds, and how the driver explains a silent or a dead worker."""

import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime.compat import total_memory, used_memory, used_memory_of_group
from trainer.runtime.events import OnEvent, WorkerHeardAgain, WorkerSilent

_GIB = 2**30
_PULSE_SECONDS = 3.0
_SILENCE_SECONDS = 10.0
# Length of the end of a log; the stack of a crash fits.
_TAIL_BYTES = 65_536
# A process that ends while less than this share of memory is left was probably killed for lack of memory.
_SCARCE_SHARE = 0.1
# Root, usage, limit and caches of files, by the controllers on a line of /proc/self/cgroup (versions 1 and 2).
_MEMORY_FILES = {
    "memory": (
        "/sys/fs/cgroup/memory",
        *("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file", "total_active_file"),
    ),
    "": ("/sys/fs/cgroup", "memory.current", "memory.max", "inactive_file", "active_file"),
}


@dataclass(frozen=True)
class Pulse:
    """A sign of life of one worker; the last one is what is known of a dead worker."""

    rank: int
    host: str
    node_id: str
    """Ray's id of the node; empty without a cluster."""
    pid: int
    log: str
    """Path, on its host, of the file with its output."""
    used_gib: float
    """Used memory of its container or machine, by all processes."""
    limit_gib: float
    oom_kills: int
    """Number of processes of the machine that the kernel has killed for lack of memory so far."""

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.host})"

    @property
    def log_place(self) -> str:
        """Host and path of the file with its output."""
        return f"{self.host}:{self.log}"


def keep_pulse(send: Callable[[Pulse], None], rank: int, node_id: str = "") -> None:
    """Send a pulse of this process now and every few seconds, from a thread, until the process ends."""

    def beat() -> None:
        while True:
            send(_take_pulse(rank, node_id))
            time.sleep(_PULSE_SECONDS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


def _take_pulse(rank: int, node_id: str) -> Pulse:
    used, limit = _read_memory()
    return Pulse(
        rank=rank,
        host=platform.node(),
        node_id=node_id,
        pid=os.getpid(),
        log=os.readlink("/proc/self/fd/2"),
        used_gib=used / _GIB,
        limit_gib=limit / _GIB,
        oom_kills=count_oom_kills(),
    )


def _read_memory() -> tuple[int, int]:
    """Return the used memory and the limit of the control group of this process, in bytes.

    Ray counts in the same way, without the cache of files, but looks only at the group of the container, not at groups
    within it.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _MEMORY_FILES:
            continue
        root, usage, limit, inactive, active = _MEMORY_FILES[controllers]
        folder = Path(root, path.lstrip("/"))
        try:
            most = int((folder / limit).read_text())
            used = used_memory_of_group(str(folder / "memory.stat"), str(folder / usage), inactive, active)
        except (OSError, ValueError):
            continue  # "max" is not a number: there is no limit
        if used is not None and most < total_memory():
            return used, most
    return used_memory(), total_memory()


def count_oom_kills() -> int:
    """Return how many processes of this machine, including its containers, the kernel has killed for lack of memory."""
    found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


class Watch:
    """The pulses of a group of workers; reports a worker that becomes silent, and that it responds again."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._heard: dict[int, tuple[Pulse, float]] = {}
        self._silent: set[int] = set()
        self._gone: set[tuple[str, int]] = set()
        self._looked = time.monotonic()

    def hear(self, pulse: Pulse) -> None:
        """Record a pulse, unless it was in flight when its worker was given up."""
        if (pulse.host, pulse.pid) in self._gone:
            return
        known = self.last_of(pulse.rank)
        if known is not None and known.pid != pulse.pid:
            self.forget()  # a new group has started
        if pulse.rank in self._silent:
            self._silent.remove(pulse.rank)
            self._on_event(WorkerHeardAgain(str(pulse), time.monotonic() - self._heard[pulse.rank][1]))
        self._heard[pulse.rank] = pulse, time.monotonic()

    def look(self) -> None:
        """Report each worker that has become silent; must be called more often than workers send pulses."""
        now = time.monotonic()
        pause, self._looked = now - self._looked, now
        if pause > _PULSE_SECONDS:
            # The driver itself was busy or stopped: the pulses of that time are still to be read.
            self._heard = {rank: (pulse, heard + pause) for rank, (pulse, heard) in self._heard.items()}
        for rank, (pulse, heard) in self._heard.items():
            seconds = time.monotonic() - heard
            if seconds > _SILENCE_SECONDS and rank not in self._silent:
                self._silent.add(rank)
                self._on_event(WorkerSilent(str(pulse), seconds))

    def forget(self) -> None:
        """Record that the workers have ended: no more pulses are expected from them."""
        self._gone |= {(pulse.host, pulse.pid) for pulse, _ in self._heard.values()}
        self._heard.clear()
        self._silent.clear()

    def last_of(self, rank: int) -> Pulse | None:
        """Return the last pulse of a worker, or None before its first."""
        return self._heard[rank][0] if rank in self._heard else None


@dataclass(frozen=True)
class Traces:
    """What a dead process has left behind on its node."""

    tail: bytes = b""
    """The end of its log."""
    oom_kills: int = 0
    """As in `Pulse`, read after its death."""


def read_traces(log: str) -> Traces:
    """Read what a process has left behind that wrote its output to a file of this machine."""
    try:
        tail = Path(log).read_bytes()[-_TAIL_BYTES:]
    except OSError:
        tail = b""
    return Traces(tail, count_oom_kills())


def describe_signal(name: str, pulse: Pulse | None, traces: Traces) -> str:
    """Describe the end of a process by a signal, with the memory of its node where that may be the cause.

    Args:
        name: name of the signal.
        pulse: the last pulse of the process.
        traces: what the process has left behind.
    """
    ended = f"was killed by {name}"
    if name != "SIGKILL" or pulse is None:
        return ended
    if _lacked_memory(pulse, traces):
        return f"{ended}, probably out of memory: {_describe_memory(pulse)}"
    return f"{ended} ({_describe_memory(pulse)} shortly before)"


def _lacked_memory(pulse: Pulse, traces: Traces) -> bool:
    return traces.oom_kills > pulse.oom_kills or pulse.used_gib > (1 - _SCARCE_SHARE) * pulse.limit_gib


def _describe_memory(pulse: Pulse) -> str:
    return f"{pulse.used_gib:.1f} of {pulse.limit_gib:.1f} GiB used"


def describe_death(error: str, pulse: Pulse | None, traces: Traces) -> str:
    """Describe the end of a worker that Ray reports as dead.

    Ray's message lists possible causes of all kinds. Its workers log the signal that kills them, except for SIGKILL.

    Args:
        error: Ray's message.
        pulse: the last pulse of the worker.
        traces: what the worker has left behind.
    """
    if "low on memory" in error:
        used = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB limit", error)
        how_much = f": {used[1]} of {used[2]} GiB used" if used else ""
        return f"was killed by Ray's memory monitor, out of memory{how_much}"
    if "node has died" in error:
        return "was lost with its node"
    if "receives a SIGTERM" in error:
        return describe_signal("SIGTERM", pulse, traces)
    if code := re.search(r"exits with an exit code (\d+)", error):
        return f"ended with exit code {code[1]}"
    if printed := re.findall(rb"^\*\*\* (SIG[A-Z]+) received", traces.tail, re.MULTILINE):
        return describe_signal(printed[-1].decode(), pulse, traces)
    if pulse is not None and _lacked_memory(pulse, traces):
        return describe_signal("SIGKILL", pulse, traces)
    # Ray's message is the same for os._exit, and nobody else on the node may ask how the process ended.
    memory = f" ({_describe_memory(pulse)} shortly before)" if pulse else ""
    return f"was killed by SIGKILL or exited without a message{memory}"
