"""Profiles a few training steps on every worker: a trace for TensorBoard, and a table of where a step's time goes."""

import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
# What TensorFlow puts before the type of an operation that it has rewritten, for oneDNN on some CPUs: a MatMul is a
# _MklMatMul there, a _FusedConv2D a _MklNativeFusedConv2D.
_REWRITTEN = re.compile(r"_(Mkl(Native)?)?")


class StepProfiler:
    """Watches the steps of one worker; traces the wanted ones, once an attempt and within one epoch."""

    def __init__(self, run: RunFolder, rank: int, steps: int) -> None:
        self._run, self._rank, self._steps = run, rank, steps
        self._taken = self._traced = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._started = self._ended = 0.0
        self._waited_before = self._waited = 0.0

    def after_step(self, wait_seconds: float) -> StepProfiled | None:
        """Is told of each step that was taken; returns what was measured when the last of the wanted ones was.

        Args:
            wait_seconds: for batches, since the epoch began.
        """
        if not self._steps or (self._traced and self._folder is None):
            return None
        self._taken += 1
        if self._folder is not None:
            self._ended, self._waited = time.perf_counter(), wait_seconds
            self._traced += 1
            if self._traced == self._steps:
                return self.close()
        elif self._taken >= _SKIPPED_STEPS:
            self._folder = tempfile.TemporaryDirectory()
            tf.profiler.experimental.start(self._folder.name)
            self._started, self._waited_before = time.perf_counter(), wait_seconds
        return None

    def close(self) -> StepProfiled | None:
        """Ends the trace, as an epoch does, and returns what was measured of the steps that were taken, if any."""
        if self._folder is None:
            return None
        tf.profiler.experimental.stop()
        contents = [trace.read_bytes() for trace in Path(self._folder.name).rglob("*.xplane.pb")]
        self._folder.cleanup()
        self._folder = None
        if not self._traced:
            return None
        of_types: Counter[str] = Counter()
        for content in contents:
            # The layout that TensorBoard's profile plugin reads, one host a worker.
            place = ("profile", "plugins", "profile", "steps", f"worker-{self._rank}.xplane.pb")
            storage.write_bytes(self._run.path(*place), content)
            of_types.update(sum_op_seconds(content))
        return summarise(self._traced, self._ended - self._started, self._waited - self._waited_before, of_types)


def sum_op_seconds(trace: bytes) -> Counter[str]:
    """Sum the seconds of each type of TensorFlow operation in a trace, on GPUs where there are some.

    A type has the same name on every CPU.

    Args:
        trace: an XSpace.
    """
    space = xplane_pb2.XSpace.FromString(trace)
    devices = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    host = [plane for plane in space.planes if plane.name.startswith("/host:CPU")]
    seconds: Counter[str] = Counter()
    for plane in devices or host:
        for line in plane.lines:
            # A GPU has a line for each stream, of kernels; a viewer derives others from them.
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = _name_of_kernel(plane, event) if devices else plane.event_metadata[event.metadata_id].name
                # An operation is called "name:Type".
                path, separator, kind = name.rpartition(":")
                if separator and kind.isidentifier() and not path.endswith(":"):
                    if prefix := _REWRITTEN.match(kind):
                        kind = kind[prefix.end() :]
                    seconds[kind] += event.duration_ps * _PICOSECONDS
    return seconds


def _name_of_kernel(plane: Any, event: Any) -> str:
    """Returns the operation that a kernel is part of, by its XStat ``tf_op``; empty where it has none."""
    for stat in event.stats:
        if plane.stat_metadata[stat.metadata_id].name == "tf_op":
            return str(stat.str_value or plane.stat_metadata[stat.ref_value].name)
    return ""


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
