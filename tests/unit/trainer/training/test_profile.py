"""The time of a step from its trace."""

import time

import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from trainer.record.run_folder import RunFolder
from trainer.training.profile import StepProfiler, sum_op_seconds, summarise

MILLISECOND = 1_000_000_000


def make_trace(planes: dict[str, dict[str, list[tuple[str, int]]]]) -> bytes:
    """Return an XSpace: planes of lines of (name, milliseconds)."""
    space = xplane_pb2.XSpace()
    for plane_name, lines in planes.items():
        plane = space.planes.add(name=plane_name)
        for line_name, events in lines.items():
            line = plane.lines.add(name=line_name)
            for name, milliseconds in events:
                number = len(plane.event_metadata) + 1
                plane.event_metadata[number].name = name
                line.events.add(metadata_id=number, duration_ps=milliseconds * MILLISECOND)
    return space.SerializeToString()


HOST = {
    "tf_Compute/1": [
        ("dense/MatMul:MatMul", 8),
        ("Process", 99),
        ("a::b", 99),
        ("x/CollectiveReduceV2:CollectiveReduceV2", 4),
    ]
}


def test_operations_of_the_host_are_summed_by_type():
    seconds = sum_op_seconds(make_trace({"/host:CPU": HOST, "Task Environment": {"a": [("b:C", 5)]}}))
    assert dict(seconds) == pytest.approx({"MatMul": 0.008, "CollectiveReduceV2": 0.004})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("_MklMatMul", "MatMul"),
        ("_MklNativeConv2DBackpropFilter", "Conv2DBackpropFilter"),
        ("_MklNativeFusedConv2D", "FusedConv2D"),
        ("_FusedConv2D", "FusedConv2D"),
        ("_NcclReduceSend", "NcclReduceSend"),
        ("MklMatMul", "MklMatMul"),
    ],
)
def test_an_operation_has_its_plain_name_on_every_cpu(kind, name):
    seconds = sum_op_seconds(make_trace({"/host:CPU": {"a": [(f"x/{kind}:{kind}", 2), (f"y:{name}", 1)]}}))
    assert dict(seconds) == pytest.approx({name: 0.003})


def test_operations_of_a_gpu_count_where_there_is_one():
    # As a profiler on a GPU was documented to write it; none was at hand.
    space = xplane_pb2.XSpace.FromString(make_trace({"/host:CPU": HOST}))
    gpu = xplane_pb2.XSpace.FromString(make_trace({"/device:GPU:0": {"Stream #1": [("volta_sgemm", 7), ("copy", 9)]}}))
    (plane,) = gpu.planes
    plane.stat_metadata[1].name = "tf_op"
    plane.lines[0].events[0].stats.add(metadata_id=1, str_value="dense/MatMul:MatMul")
    space.planes.append(plane)
    assert dict(sum_op_seconds(space.SerializeToString())) == pytest.approx({"MatMul": 0.007})


def test_a_trace_that_names_no_operation_says_so():
    assert "names no operation" in str(summarise(10, 0.1, 0.0, {}))


@pytest.mark.parametrize(
    ("waited", "reduced", "expected"),
    [(0.03, 0.0, "the device waits for images"), (0.0, 0.08, "the workers wait"), (0.0, 0.01, "the device computes")],
)
def test_the_largest_part_has_its_advice(waited, reduced, expected):
    profiled = summarise(10, 0.1, waited, {"MatMul": 0.05, "Relu": 0.01, "CollectiveReduceV2": reduced})
    assert (profiled.step_ms, profiled.compute_ms) == pytest.approx((10, 6))
    assert profiled.slowest_ms[0] == pytest.approx(("MatMul", 5))
    assert expected in str(profiled)


def test_a_run_that_ends_before_all_steps_are_traced_has_its_measurement(tmp_path):
    profiler = StepProfiler(RunFolder(str(tmp_path)), 0, 10)
    step = tf.function(lambda matrix: matrix @ matrix)
    started = time.monotonic()
    for taken in range(1, 9):
        answer = step(tf.ones((64, 64)))
        assert not profiler.after_step(answer, wait_seconds=0.01 * taken, is_last=False)
    stepping_ms = 1000 * (time.monotonic() - started)
    # As validation does: no part of a step.
    time.sleep(max(0.5, stepping_ms / 1000))
    profiled = profiler.close()
    assert (profiled.steps, profiled.input_ms) == (3, pytest.approx(10))
    assert 0 < profiled.step_ms * profiled.steps < stepping_ms
    assert "MatMul" in dict(profiled.slowest_ms)
    assert profiler.close() is None
    # Once an attempt.
    assert not any(profiler.after_step(answer, wait_seconds=0.1, is_last=False) for _ in range(12))
    assert profiler.close() is None


def test_short_epochs_are_traced_within_one(tmp_path):
    profiler, profiled = StepProfiler(RunFolder(str(tmp_path)), 0, 10), []
    for _ in range(3):
        for taken in range(1, 4):
            if profiler.after_step(tf.zeros(()), wait_seconds=0.01 * taken, is_last=taken == 3):
                profiled.append(profiler.close())
    (only,) = profiled
    # The fifth step starts it, in the second epoch.
    assert (only.steps, only.input_ms) == (1, pytest.approx(10))


def test_all_workers_end_the_trace_after_the_same_step_and_only_the_first_has_one(tmp_path):
    ended = {}
    for rank in (0, 1):
        profiler = StepProfiler(RunFolder(str(tmp_path)), rank, 2)
        for taken in range(1, 10):
            if profiler.after_step(tf.zeros(()), wait_seconds=0.0, is_last=False):
                ended[rank] = (taken, profiler.close() is not None)
    assert ended == {0: (7, True), 1: (7, False)}
    assert [trace.name for trace in tmp_path.rglob("*.xplane.pb")] == ["worker-0.xplane.pb"]


def test_what_runs_after_the_traced_steps_is_no_part_of_them(tmp_path):
    profiler = StepProfiler(RunFolder(str(tmp_path)), 0, 2)
    step, validate = tf.function(lambda matrix: matrix @ matrix), tf.function(tf.linalg.cholesky)
    validate(tf.eye(8))
    is_due = False
    while not is_due:
        is_due = profiler.after_step(step(tf.ones((64, 64))), wait_seconds=0.0, is_last=False)
    validate(tf.eye(8))
    kinds = dict(profiler.close().slowest_ms)
    assert "MatMul" in kinds
    assert "Cholesky" not in kinds
