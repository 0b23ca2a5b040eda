"""Profiles a few training steps on every worker: a trace for TensorBoard, and a table of where a step's time goes."""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from trainer import storage
from trainer.events import StepProfiled
from trainer.run_folder import RunFolder

# Compilation, and whatever is done once.
_SKIPPED_STEPS = 5
_PICOSECONDS = 1e-12
# What adds up the gradients, by the beginning of its type.
_ALL_REDUCE = ("Collective", "Nccl")


class StepProfiler:
    """Watches the steps of one worker; traces the wanted ones, once an attempt."""

    def __init__(self, run: RunFolder, rank: int, steps: int) -> None:
        self._run, self._rank, self._steps = run, rank, steps
        self._taken = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._started = self._ended = 0.0
        self._waited_before = self._waited = 0.0

    def after_step(self, wait_seconds: float) -> StepProfiled | None:
        """Is told of each step that was taken; returns what was measured when the last of the wanted ones was.

        Args:
            wait_seconds: for batches, since the epoch began.
        """
        if not self._steps:
            return None
        self._taken += 1
        if self._taken == _SKIPPED_STEPS:
            self._folder = tempfile.TemporaryDirectory()
            tf.profiler.experimental.start(self._folder.name)
            self._started, self._waited_before = time.perf_counter(), wait_seconds
        elif self._folder is not None:
            self._ended, self._waited = time.perf_counter(), wait_seconds
            if self._taken == _SKIPPED_STEPS + self._steps:
                return self.close()
        return None

    def close(self) -> StepProfiled | None:
        """Ends the trace, also before all wanted steps were taken; returns what was measured of those that were."""
        if self._folder is None:
            return None
        tf.profiler.experimental.stop()
        traces = list(Path(self._folder.name).rglob("*.xplane.pb"))
        contents = [trace.read_bytes() for trace in traces]
        for content in contents:
            # The layout that TensorBoard's profile plugin reads, one host a worker.
            place = ("profile", "plugins", "profile", "steps", f"worker-{self._rank}.xplane.pb")
            storage.write_bytes(self._run.path(*place), content)
        self._folder.cleanup()
        self._folder = None
        steps = self._taken - _SKIPPED_STEPS
        if not steps:
            return None
        of_types: Counter[str] = Counter()
        for content in contents:
            of_types.update(sum_op_seconds(content))
        # An epoch that began meanwhile began its waiting anew.
        waited = max(0.0, self._waited - self._waited_before)
        return summarise(steps, self._ended - self._started, waited, of_types)


def sum_op_seconds(trace: bytes) -> Counter[str]:
    """Returns the seconds of each type of TensorFlow operation in a trace, on GPUs where there are some.

    Args:
        trace: an XSpace.
    """
    space = xplane_pb2.XSpace.FromString(trace)
    devices = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    host = [plane for plane in space.planes if plane.name.startswith("/host:CPU")]
    seconds: Counter[str] = Counter()
    for plane in devices or host:
        for line in plane.lines:
            if devices and line.name != "TensorFlow Ops":
                continue
            for event in line.events:
                # An operation is called "name:Type".
                name, separator, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if separator and kind.isidentifier() and not name.endswith(":"):
                    seconds[kind] += event.duration_ps * _PICOSECONDS
    return seconds


def summarise(steps: int, seconds: float, waited: float, op_seconds: Mapping[str, float]) -> StepProfiled:
    """Returns the table of a profile.

    Args:
        steps: that were traced.
        seconds: that they took.
        waited: of these, for batches.
        op_seconds: of all steps, by type of operation; operations run beside each other.
    """
    all_reduce = sum(spent for kind, spent in op_seconds.items() if kind.startswith(_ALL_REDUCE))
    compute = {kind: spent for kind, spent in op_seconds.items() if not kind.startswith(_ALL_REDUCE)}
    slowest = sorted(compute.items(), key=lambda item: -item[1])[:5]
    per_step = 1000 / steps
    return StepProfiled(
        steps=steps,
        step_ms=seconds * per_step,
        input_ms=waited * per_step,
        all_reduce_ms=all_reduce * per_step,
        compute_ms=sum(compute.values()) * per_step,
        slowest_ms=tuple((kind, spent * per_step) for kind, spent in slowest),
    )
