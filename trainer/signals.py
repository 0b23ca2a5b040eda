"""SIGINT and SIGTERM end a job by KeyboardInterrupt in its main thread, and not in the middle of what would break.

Of all that a handler may raise, Ray's C++ code passes on only this one: anything else it loses or turns into a
SystemError.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDING_SECONDS = 20.0

_received = signal.SIGINT


def received_signal() -> signal.Signals:
    """Returns which signal the last KeyboardInterrupt stands for."""
    return _received


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise KeyboardInterrupt in this context; only for the main thread.

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
    """Keeps SIGINT and SIGTERM until the end of the context: for code that an exception in its middle would break."""
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
