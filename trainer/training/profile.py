"""Profile a few training steps: a trace for TensorBoard, and a table of where the time of a step goes."""

import contextlib
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from trainer.record.run_folder import RunFolder
from trainer.runtime.events import StepProfiled

# Steps before the trace starts: they include compilation and other one-time work.
_SKIPPED_STEPS = 5
_PICOSECONDS = 1e-12
# The span of the traced steps in a trace; events after it do not belong to a step.
_SPAN_NAME = "traced steps"
# Prefixes of the types of the operations that sum up the gradients.
_ALL_REDUCE = ("Collective", "Nccl")
# The prefix of the type of an operation that TensorFlow has rewritten, for oneDNN on some CPUs: MatMul becomes
# _MklMatMul, and _FusedConv2D becomes _MklNativeFusedConv2D.
_REWRITTEN = re.compile(r"_(Mkl(Native)?)?")


class StepProfiler:
    """Watch the steps of one worker and trace some of them, once per attempt and within one epoch.

    Only the first worker traces. On any other worker TensorFlow 2.21 corrupts its memory when it collects the trace,
    and sometimes crashes: it keeps pointers to events that start on one thread and end on another, and then moves
    these events (docs/decisions/0011). Only a worker that asks the first one about a collective has such events.
    """

    def __init__(self, run: RunFolder, rank: int, steps: int) -> None:
        self._run, self._rank, self._steps = run, rank, steps
        self._taken = self._traced = 0
        self._is_tracing = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._span = contextlib.ExitStack()
        self._started = self._ended = 0.0
        self._waited_before = self._waited = 0.0

    def after_step(self, answer: Any, wait_seconds: float, *, is_last: bool) -> bool:
        """Count a step, and return whether `close` is due, which is after the same step on every worker.

        Args:
            answer: the tensor that the step returned.
            wait_seconds: seconds waited for batches since the epoch began.
            is_last: whether it is the last step of its epoch.
        """
        if not self._steps or (self._traced and not self._is_tracing):
            return False
        self._taken += 1
        if self._is_tracing:
            self._traced += 1
            is_done = is_last or self._traced == self._steps
            if is_done:
                np.asarray(answer)  # wait for the GPU
                self._span.close()
            self._ended, self._waited = time.perf_counter(), wait_seconds
            return is_done
        if self._taken >= _SKIPPED_STEPS and not is_last:
            np.asarray(answer)
            self._start(wait_seconds)
        return False

    def _start(self, wait_seconds: float) -> None:
        self._is_tracing = True
        if self._rank == 0:
            self._folder = tempfile.TemporaryDirectory()
            tf.profiler.experimental.start(self._folder.name)
            self._span.enter_context(tf.profiler.experimental.Trace(_SPAN_NAME))
        self._started, self._waited_before = time.perf_counter(), wait_seconds

    def close(self) -> StepProfiled | None:
        """End the trace and return its measurements; None on other workers, or if no step was traced."""
        self._is_tracing = False
        if self._folder is None:
            return None
        self._span.close()
        tf.profiler.experimental.stop()
        contents = [trace.read_bytes() for trace in Path(self._folder.name).rglob("*.xplane.pb")]
        self._folder.cleanup()
        self._folder = None
        if not self._traced:
            return None
        of_types: Counter[str] = Counter()
        for content in contents:
            # The layout that TensorBoard's profile plugin reads: one host per worker.
            place = ("profile", "plugins", "profile", "steps", f"worker-{self._rank}.xplane.pb")
            self._run.write(content, *place)
            of_types.update(sum_op_seconds(content))
        return summarise(self._traced, self._ended - self._started, self._waited - self._waited_before, of_types)


def sum_op_seconds(trace: bytes) -> Counter[str]:
    """Sum the seconds of each type of TensorFlow operation in a trace, on the GPUs if there are any.

    A type has the same name on every CPU. Only operations within the span of the traced steps count, if the trace
    has one.

    Args:
        trace: a serialized XSpace.
    """
    space = xplane_pb2.XSpace.FromString(trace)
    devices = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    host = [plane for plane in space.planes if plane.name.startswith("/host:CPU")]
    first, last = _find_span(host)
    seconds: Counter[str] = Counter()
    for plane in devices or host:
        for line in plane.lines:
            # A GPU has one line per stream, of kernels; viewers derive other lines from these.
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if not first <= _start_of(line, event) <= last:
                    continue
                name = _name_of_kernel(plane, event) if devices else plane.event_metadata[event.metadata_id].name
                # An operation is called "name:Type".
                path, separator, kind = name.rpartition(":")
                if separator and kind.isidentifier() and not path.endswith(":"):
                    if prefix := _REWRITTEN.match(kind):
                        kind = kind[prefix.end() :]
                    seconds[kind] += event.duration_ps * _PICOSECONDS
    return seconds


def _start_of(line: Any, event: Any) -> float:
    """Return when an event began, in picoseconds since the trace began."""
    return float(line.timestamp_ns * 1000 + event.offset_ps)


def _find_span(host: list[Any]) -> tuple[float, float]:
    """Return when the traced steps began and ended, in picoseconds since the trace began; without a span, all times."""
    for plane in host:
        for line in plane.lines:
            for event in line.events:
                if plane.event_metadata[event.metadata_id].name == _SPAN_NAME:
                    started = _start_of(line, event)
                    return started, started + event.duration_ps
    return -math.inf, math.inf


def _name_of_kernel(plane: Any, event: Any) -> str:
    """Return the operation that a kernel belongs to, by its XStat ``tf_op``; empty if it has none."""
    for stat in event.stats:
        if plane.stat_metadata[stat.metadata_id].name == "tf_op":
            return str(stat.str_value or plane.stat_metadata[stat.ref_value].name)
    return ""


def summarise(steps: int, seconds: float, waited: float, op_seconds: Mapping[str, float]) -> StepProfiled:
    """Return the table of a profile.

    Args:
        steps: number of traced steps.
        seconds: duration of all of them.
        waited: seconds of these that were spent waiting for batches.
        op_seconds: seconds of all steps, by type of operation; operations run in parallel.
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
