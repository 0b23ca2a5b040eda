"""Metrics of a run for Prometheus: each node of a Ray cluster serves those of its processes beside its own."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

# Ray serves a gauge for twice the interval of its reports, 10 s by default, after it was set.
_AGAIN_SECONDS = 5.0


@contextlib.contextmanager
def serve_metrics(run_name: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that takes the metrics of an epoch, to serve them until the next ones or the end of the context.

    Each that is a finite number is a gauge, ``ray_training_notes_NAME{run="..."}`` to Prometheus. Without a cluster
    nothing is served.
    """
    if not ray.is_initialized():
        yield lambda metrics: None
        return
    # Not at the top: a job without a cluster does not need it.
    from ray.util.metrics import Gauge

    served: dict[str, tuple[Gauge, float]] = {}
    ended = threading.Event()

    def serve(metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                known = served.get(name)
                gauge = known[0] if known else Gauge(f"training_notes_{name}", "As in metrics.parquet.", ("run",))
                served[name] = gauge, value
            else:
                served.pop(name, None)
        set_gauges()

    def set_gauges() -> None:
        for gauge, value in list(served.values()):
            gauge.set(value, {"run": run_name})

    def set_again() -> None:
        while not ended.wait(_AGAIN_SECONDS):
            set_gauges()

    threading.Thread(target=set_again, name="gauges", daemon=True).start()
    try:
        yield serve
    finally:
        ended.set()
