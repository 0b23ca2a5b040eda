"""SIGINT and SIGTERM raise KeyboardInterrupt in the main thread of a job, except in code that this would break.

KeyboardInterrupt is the only exception of a handler that Ray's C++ code passes on; it loses others or turns them into a
SystemError. Ray also replaces the handler of SIGTERM when it starts.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A process that is ended while Ray starts leaves Ray's processes behind, so Ray is given time on a busy machine.
_ENDING_SECONDS = 30.0

_received = signal.SIGINT
_reason = ""


def received_signal() -> signal.Signals:
    """Return the signal that raised the last KeyboardInterrupt."""
    return _received


def interrupt_main(reason: str) -> None:
    """Interrupt the main thread as if by SIGTERM, because the job has failed for the given reason."""
    global _reason
    _reason = reason
    os.kill(os.getpid(), signal.SIGTERM)


def failure_reason() -> str:
    """Return why this process interrupted itself; empty if it did not."""
    return _reason


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt in this context; only for the main thread.

    Further signals are ignored for some time, because they would interrupt the cleanup. After an interrupt they are
    ignored until the process has ended.
    """
    last = -math.inf

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal last
        global _received
        if time.monotonic() > last + _ENDING_SECONDS:
            last = time.monotonic()
            _received = signal.Signals(signal_number)
            raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {one: signal.signal(one, stop) for one in _STOP_SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        # A second signal may arrive while Python shuts down.
        before = dict.fromkeys(_STOP_SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the end of the context, for code that must not be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def keep(signal_number: int, frame: FrameType | None) -> None:
        arrived.append(signal_number)

    before = {one: signal.signal(one, keep) for one in _STOP_SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if arrived:
        signal.raise_signal(arrived[0])


@contextlib.contextmanager
def _end_at_last() -> Iterator[Callable[[], None]]:
    """End this process when a signal has arrived in this context and Ray then does nothing for 30 s.

    Python runs a handler only when C++ code returns, and Ray's code may wait for something that never answers. What Ray
    had started ends with this process. Only for the main thread.

    Yields:
        A function to call at each sign that Ray's code is at work, such as a call of a Python function.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    ended = threading.Event()
    heard = time.monotonic()

    def hear() -> None:
        nonlocal heard
        heard = time.monotonic()

    def is_silent() -> bool:
        """Wait until the context has ended, or Ray has done nothing for too long."""
        while (left := heard + _ENDING_SECONDS - time.monotonic()) > 0:
            if ended.wait(left):
                break
        return not ended.is_set()

    def watch() -> None:
        while number := os.read(receiver, 1):
            if number[0] not in _STOP_SIGNALS:
                continue
            hear()
            if is_silent():
                name = signal.Signals(number[0]).name
                with contextlib.suppress(OSError):
                    os.write(2, f"stopped by {name} while Ray did not answer; the same command continues\n".encode())
                os._exit(128 + number[0])
        os.close(receiver)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    try:
        yield hear
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(sender)
        watcher.join()


@contextlib.contextmanager
def defer_signals_of_ray() -> Iterator[None]:
    """Defer signals around ``ray.init``, which installs a handler of SIGTERM that exits with 15, or ``ray.shutdown``.

    Each function call within the context sets the handlers again. Only for the main thread.
    """

    def set_again(frame: FrameType, event: str, argument: Any) -> None:
        hear()
        if event == "call":
            for one, handler in handlers.items():
                signal.signal(one, handler)

    with defer_signals(), _end_at_last() as hear:
        handlers = {one: signal.getsignal(one) for one in _STOP_SIGNALS}
        before = sys.getprofile()
        sys.setprofile(set_again)
        try:
            yield
        finally:
            sys.setprofile(before)
