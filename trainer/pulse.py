"""What each worker tells of itself every few seconds, and what the driver makes of its silence and of its death."""

import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from trainer.events import OnEvent, WorkerHeardAgain, WorkerSilent

_GIB = 2**30
_PULSE_SECONDS = 3.0
_SILENCE_SECONDS = 10.0
# The last that a worker printed: the stack of a crash fits.
_TAIL_BYTES = 65_536
# A process that vanishes when its node has less memory left than this share was probably killed for that.
_SCARCE_SHARE = 0.1


@dataclass(frozen=True)
class Pulse:
    """A sign of life of one worker, and all that can be known of it when it is gone."""

    rank: int
    host: str
    node_id: str
    """Ray's; empty without a cluster."""
    pid: int
    log: str
    """The file on its host that holds what it prints."""
    used_gib: float
    """Memory of its container or machine, by whatever runs there."""
    limit_gib: float
    oom_kills: int
    """How many processes of the machine the kernel has killed for lack of memory so far."""

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.host})"

    @property
    def log_place(self) -> str:
        """Host and path of what it prints."""
        return f"{self.host}:{self.log}"


def keep_pulse(send: Callable[[Pulse], None], rank: int, node_id: str = "") -> None:
    """Send a pulse of this process now and every few seconds, from a thread, as long as the process lives."""

    def beat() -> None:
        while True:
            send(_take_pulse(rank, node_id))
            time.sleep(_PULSE_SECONDS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


def _take_pulse(rank: int, node_id: str) -> Pulse:
    return Pulse(
        rank=rank,
        host=platform.node(),
        node_id=node_id,
        pid=os.getpid(),
        log=os.readlink("/proc/self/fd/2"),
        used_gib=get_used_memory() / _GIB,
        limit_gib=get_system_memory() / _GIB,
        oom_kills=count_oom_kills(),
    )


def count_oom_kills() -> int:
    """Return how many processes of this machine, those of containers included, the kernel has killed for memory."""
    found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


class Watch:
    """Hears the pulses of a group of workers, and tells of one that is silent and of its return."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._heard: dict[int, tuple[Pulse, float]] = {}
        self._silent: set[int] = set()

    def hear(self, pulse: Pulse) -> None:
        """Take note of a pulse."""
        known = self.last_of(pulse.rank)
        if known is not None and known.pid != pulse.pid:
            self.forget()  # another group has started
        if pulse.rank in self._silent:
            self._silent.remove(pulse.rank)
            self._on_event(WorkerHeardAgain(str(pulse), time.monotonic() - self._heard[pulse.rank][1]))
        self._heard[pulse.rank] = pulse, time.monotonic()

    def look(self) -> None:
        """Tell of each worker that has become silent."""
        for rank, (pulse, heard) in self._heard.items():
            seconds = time.monotonic() - heard
            if seconds > _SILENCE_SECONDS and rank not in self._silent:
                self._silent.add(rank)
                self._on_event(WorkerSilent(str(pulse), seconds))

    def forget(self) -> None:
        """Take note that the workers have ended: nothing more is heard of them."""
        self._heard.clear()
        self._silent.clear()

    def last_of(self, rank: int) -> Pulse | None:
        """Return the last pulse of a worker, or None before its first."""
        return self._heard[rank][0] if rank in self._heard else None


@dataclass(frozen=True)
class Traces:
    """What a process has left behind on its node."""

    tail: bytes = b""
    """Of what it printed."""
    oom_kills: int = 0
    """As in `Pulse`, after its death."""


def read_traces(log: str) -> Traces:
    """Return what a process that printed into a file of this machine has left behind."""
    try:
        tail = Path(log).read_bytes()[-_TAIL_BYTES:]
    except OSError:
        tail = b""
    return Traces(tail, count_oom_kills())


def describe_signal(name: str, pulse: Pulse | None, traces: Traces) -> str:
    """Return how a process ended that a signal has killed, with its node's memory where that may be the cause.

    Args:
        name: of the signal.
        pulse: its last one.
        traces: of the process.
    """
    ended = f"was killed by {name}"
    if name != "SIGKILL" or pulse is None:
        return ended
    used = f"{pulse.used_gib:.1f} of {pulse.limit_gib:.1f} GiB used"
    if traces.oom_kills > pulse.oom_kills or pulse.used_gib > (1 - _SCARCE_SHARE) * pulse.limit_gib:
        return f"{ended}, probably out of memory: {used}"
    return f"{ended} ({used} shortly before)"


def describe_death(error: str, pulse: Pulse | None, traces: Traces) -> str:
    """Return how a worker ended of which Ray says that it died.

    Ray's own words name possible causes of all kinds. Its workers print which signal they die of, but for SIGKILL.

    Args:
        error: Ray's words.
        pulse: the last one of the worker.
        traces: of the worker.
    """
    if "low on memory" in error:
        used = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB limit", error)
        how_much = f": {used[1]} of {used[2]} GiB used" if used else ""
        return f"was killed by Ray's memory monitor, out of memory{how_much}"
    if "node has died" in error:
        return "was lost with its node"
    if "receives a SIGTERM" in error:
        return describe_signal("SIGTERM", pulse, traces)
    printed = re.findall(rb"^\*\*\* (SIG[A-Z]+) received", traces.tail, re.MULTILINE)
    return describe_signal(printed[-1].decode() if printed else "SIGKILL", pulse, traces)
