"""Every use of a name that Ray keeps private, in one place: what to look at when its version changes.

Each function says which lines of Ray 2.60.0 it relies on, and which test fails first where they have changed.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def mute_worker_messages() -> Iterator[None]:
    """Keep Ray from printing in this process, during the context, a paragraph for each worker that dies."""
    # ray/_private/worker.py, line 2311: the listener of the driver prints nothing while this is False.
    # tests/unit/trainer/runtime/test_compat.py: test_ray_prints_nothing_about_workers_while_it_is_muted
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
