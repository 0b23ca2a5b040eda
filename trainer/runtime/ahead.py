"""Call a function in threads, ahead of the use of what it returns."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def call_ahead(
    function: Callable[[T], R], items: Iterable[T], *, ahead: int, threads: int = 1, name: str = ""
) -> Iterator[Future[R]]:
    """Yield the future of ``function(item)`` for each item in turn.

    Args:
        function: what to call.
        items: its arguments.
        ahead: how many calls are begun before the first of them is used.
        threads: how many calls run at once.
        name: prefix of the names of the threads.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == ahead:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            # The user may have stopped.
            for future in pending:
                future.cancel()
