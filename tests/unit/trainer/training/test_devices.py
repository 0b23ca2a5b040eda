import math
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from trainer.runtime.errors import JobError
from trainer.training import devices

SIZE_GIB = 0.25


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    """What is tested is the memory of a worker without a GPU, on any machine."""
    monkeypatch.setattr(devices, "has_gpu", lambda: False)


def hold_memory() -> np.ndarray:
    return np.ones(int(SIZE_GIB * 2**30), np.uint8)


def test_the_peak_counts_memory_that_is_freed_again_until_it_is_reset():
    devices.reset_peak_memory()
    before = devices.peak_memory_gib()
    held = hold_memory()
    assert devices._resident_gib("VmRSS") >= before + 0.9 * SIZE_GIB
    del held
    peak = devices.peak_memory_gib()
    assert peak >= before + 0.9 * SIZE_GIB
    devices.reset_peak_memory()
    assert devices.peak_memory_gib() < peak - 0.5 * SIZE_GIB


def test_workers_on_one_node_share_its_memory():
    # What ran before the two calls counts too, and it changes.
    assert devices.memory_limit_gib(4) == pytest.approx(devices.memory_limit_gib(1) / 4, rel=0.2)


@pytest.mark.parametrize(
    ("seen", "given", "expected"),
    [
        (0, 1, r"Ray gave this worker 1 GPU and TensorFlow sees 0: cannot load libcudnn.so.9 \(cuDNN\); install"),
        (2, 1, "a worker sees 2 GPUs, and the strategy would make a replica of each"),
        (2, 0, "a worker sees 2 GPUs"),
    ],
)
def test_a_worker_with_other_gpus_than_its_own_one_does_not_start(monkeypatch, seen, given, expected):
    monkeypatch.setattr(devices.tf.config, "list_physical_devices", lambda kind: ["GPU"] * seen)
    monkeypatch.setattr(devices, "_count_given_gpus", lambda: given)
    monkeypatch.setattr(devices.gpu, "find_missing_libraries", lambda: ["libcudnn.so.9 (cuDNN)"])
    with pytest.raises(JobError, match=expected):
        devices.share_devices(1)


def test_what_the_runtime_takes_beside_the_allocator_is_not_counted_as_free(monkeypatch):
    assert devices.allocator_limit_gib() == math.inf
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    # Of a card of 8 GiB: what is free when CUDA has started, less what TensorFlow leaves to CUDA's libraries.
    monkeypatch.setattr(devices.compat, "memory_of_device", lambda kind: {"GPU": 6 * 2**30}[kind])
    assert devices.allocator_limit_gib() == 6.0


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("ResourceExhaustedError", "OOM when allocating tensor with shape[256,64,112,112]", True),
        ("NotFoundError", "No algorithm worked!  Error messages: Profiling failure on CUDNN engine", True),
        ("InternalError", "Failed to call ThenRnnForward: CUDNN_STATUS_ALLOC_FAILED", True),
        (
            "InternalError",
            "Attempting to perform BLAS operation using StreamExecutor: CUBLAS_STATUS_NOT_INITIALIZED",
            True,
        ),
        ("InternalError", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes", True),
        ("InternalError", "Failed copying input tensor from CPU:0 to GPU:0: Dst tensor is not initialized.", True),
        ("FailedPreconditionError", "DNN library initialization failed. Look at the errors above for details.", True),
        ("InternalError", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED in tensorflow/stream.cc", True),
        ("InternalError", "failed to allocate 2.00G (2147483648 bytes) from device", True),
        ("InternalError", "Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("InternalError", "cudaGetDevice() failed. Status: cudaErrorMemoryAllocation", True),
        ("UnknownError", "NCCL: unhandled cuda error (run with NCCL_DEBUG=INFO for details)", True),
        ("UnknownError", "NCCL operation ncclAllReduce failed:\nCuda failure 2 'out of memory'", True),
        ("InternalError", "ptxas exited with non-zero error code 65280", False),
        ("UnknownError", "NCCL: unhandled system error (run with NCCL_DEBUG=INFO for details)", False),
        ("UnimplementedError", "no room in this zoom", False),
        ("InvalidArgumentError", "Matrix size-incompatible", False),
    ],
)
def test_every_way_of_running_out_of_memory_counts(kind, message, expected):
    assert devices.ran_out_of_memory(getattr(devices.tf.errors, kind)(None, None, message)) is expected


@pytest.mark.parametrize(
    ("capability", "override", "expected"),
    [((9, 0), "", True), ((8, 0), "1", True), ((7, 5), "", False), ((9, 0), "0", False)],
)
def test_tf32_is_what_newer_gpus_use_unless_it_is_turned_off(monkeypatch, capability, override, expected):
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(devices.tf.config, "list_physical_devices", lambda kind: ["GPU"])
    details = {"compute_capability": capability}
    monkeypatch.setattr(devices.tf.config.experimental, "get_device_details", lambda device: details)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert devices.uses_tf32() is expected


def test_without_a_gpu_there_is_no_tf32():
    assert not devices.uses_tf32()


def test_a_field_that_the_kernel_does_not_have_is_named():
    with pytest.raises(RuntimeError, match="/proc/self/status has no VmNothing"):
        devices._resident_gib("VmNothing")


WORKER = """
import time
import numpy as np
import tensorflow as tf
from trainer.training import devices

devices.share_devices(10_000)
print(tf.config.threading.get_intra_op_parallelism_threads(), tf.config.threading.get_inter_op_parallelism_threads())
limit = devices.peak_memory_gib() + 0.25
with devices.killed_beyond(limit):
    print("below the limit", flush=True)
held = np.ones(2**29, np.uint8)
time.sleep(0.5)
print("not watched any more", flush=True)
with devices.killed_beyond(limit):
    time.sleep(60)
print("beyond the limit", flush=True)
"""


def test_a_worker_has_a_core_at_least_and_ends_by_sigkill_when_it_holds_too_much_memory():
    worker = subprocess.run([sys.executable, "-c", WORKER], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert worker.stdout.splitlines() == ["1 1", "below the limit", "not watched any more"]
    assert worker.returncode == -signal.SIGKILL
