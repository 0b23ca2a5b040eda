"""SIGINT and SIGTERM end a job by KeyboardInterrupt in its main thread, and not in the middle of what would break.

Of all that a handler may raise, Ray's C++ code passes on only this one: anything else it loses or turns into a
SystemError. When it starts and ends it also takes SIGTERM for itself.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDING_SECONDS = 20.0
_SETTING_SECONDS = 0.0002

_received = signal.SIGINT
_reason = ""


def received_signal() -> signal.Signals:
    """Return which signal the last KeyboardInterrupt stands for."""
    return _received


def interrupt_main(reason: str) -> None:
    """Make the main thread end as by SIGTERM, though nobody sent one; the job has failed for this reason."""
    global _reason
    _reason = reason
    os.kill(os.getpid(), signal.SIGTERM)


def failure_reason() -> str:
    """Return why this process interrupted itself; empty where it did not."""
    return _reason


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt in this context; only for the main thread.

    Further ones are ignored for a while, or they would cut short the ending of what was started; also Python's own
    ending, when the context has ended.
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
        # Python is still ending when the second signal comes.
        before = dict.fromkeys(_STOP_SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Keep SIGINT and SIGTERM until the end of the context: for code that an exception in its middle would break."""
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
def _end_at_last() -> Iterator[None]:
    """End this process 20 s after a signal that came in this context, unless the context has ended.

    A handler of Python runs when C++ code returns, and Ray's may wait for what never answers. What Ray had started ends
    with this process. Only for the main thread.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    ended = threading.Event()

    def watch() -> None:
        while number := os.read(receiver, 1):
            if number[0] in _STOP_SIGNALS and not ended.wait(_ENDING_SECONDS):
                name = signal.Signals(number[0]).name
                with contextlib.suppress(OSError):
                    os.write(2, f"stopped by {name} while Ray did not answer; the same command continues\n".encode())
                os._exit(128 + number[0])
        os.close(receiver)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(sender)
        watcher.join()


@contextlib.contextmanager
def defer_signals_of_start() -> Iterator[None]:
    """As `defer_signals`, around ``ray.init``, which puts handlers of SIGTERM in place that exit with 15.

    Each call of a function within sets the handlers again. Only for the main thread.
    """

    def set_again(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            for one, handler in handlers.items():
                signal.signal(one, handler)

    with defer_signals(), _end_at_last():
        handlers = {one: signal.getsignal(one) for one in _STOP_SIGNALS}
        before = sys.getprofile()
        sys.setprofile(set_again)
        try:
            yield
        finally:
            sys.setprofile(before)


def call_deferring_signals(function: Callable[[], None]) -> None:
    """Call ``ray.shutdown``, whose C++ code gives SIGTERM the system's action: that ends a process without a word.

    It does so a tenth of a second and more before it returns, so it is called in a thread of its own, while this one
    sets the handlers again and again. Signals are deferred to its end. Only for the main thread.
    """
    with defer_signals(), _end_at_last(), ThreadPoolExecutor(1) as pool:
        future = pool.submit(function)
        while not future.done():
            for one in _STOP_SIGNALS:
                signal.signal(one, signal.getsignal(one))
            time.sleep(_SETTING_SECONDS)
    future.result()
