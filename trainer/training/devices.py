"""A worker's share of its node: cores, GPU and memory, how much memory it uses, and how much it may use."""

import contextlib
import math
import os
import platform
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import ray
import tensorflow as tf

from trainer.runtime import compat, gpu
from trainer.runtime.cluster import read_machine
from trainer.runtime.errors import JobError
from trainer.training.programs import keep_programs

_GIB = 2**30
_GUARD_INTERVAL_SECONDS = 0.02
# cuDNN's search for an algorithm fails where none gets its scratch; its handles, cuBLAS' and NCCL's buffers take memory
# of their own; a copy to the GPU finds no place ("Dst tensor"). Some of these have other causes, too: in a trial, where
# smaller sizes worked or follow, this is the likely one.
_NO_MEMORY = re.compile(
    "out of memory|OOM when allocating|RESOURCE.EXHAUSTED|failed to alloc|cannot allocate memory"
    "|cudaErrorMemoryAllocation|resource allocation failed|Dst tensor is not initialized"
    "|No algorithm worked|DNN library initialization failed|could not create cudnn handle"
    "|CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)"
    "|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)|NCCL.*unhandled cuda error",
    re.IGNORECASE | re.DOTALL,
)


def share_devices(workers_on_node: int) -> None:
    """Give each worker its share of the node's cores; Ray has already given it its one GPU, if any.

    Must be called before anything makes TensorFlow list its devices.

    Raises:
        JobError: TensorFlow does not see that one GPU, or sees more.
    """
    keep_programs(gpu.read_name() if _count_given_gpus() else _read_cpu_name())
    check_gpu()
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    # Ray counts what a container may use, which the kernel's affinity does not show.
    cores = min(len(os.sched_getaffinity(0)), compat.count_cores())
    threads = max(1, cores // workers_on_node)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    if workers_on_node > 1:
        # The same number of operations at once: with two per core the workers were slower (docs/performance.md).
        tf.config.threading.set_inter_op_parallelism_threads(threads)


def check_gpu() -> None:
    """Check that TensorFlow sees the one GPU that Ray gave to this process, if any.

    Raises:
        JobError: it does not: it would compute on the CPU, and only say so in its log. Or it sees several.
    """
    seen, given = len(tf.config.list_physical_devices("GPU")), _count_given_gpus()
    if seen < given:
        raise JobError(gpu.explain_unseen(seen, given))
    if seen > 1:
        raise JobError(
            f"a worker sees {seen} GPUs, and the strategy would make a replica of each: a worker has one; unset "
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES, and let Ray count the GPUs (no --num-gpus 0)"
        )


def _count_given_gpus() -> int:
    if not ray.is_initialized():
        return read_machine().num_gpus
    return len(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def _read_cpu_name() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def has_gpu() -> bool:
    """Return whether this worker uses a GPU."""
    # Not the logical devices: listing them would initialize TensorFlow before the strategy can.
    return bool(tf.config.list_physical_devices("GPU"))


def uses_tf32() -> bool:
    """Return whether this worker's GPU computes products of float32 as TF32: with the 10 bits of float16."""
    if not has_gpu() or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    is_able = details.get("compute_capability", (0, 0)) >= (8, 0)
    return is_able and bool(tf.config.experimental.tensor_float_32_execution_enabled())


def memory_limit_gib(workers_on_node: int) -> float:
    """Return the memory in GiB that this worker may use: what is free on its GPU, else its share of the node's memory.

    Ray says what the node's is: it accounts for a container's limit, the object store and what was running before;
    `ray start --memory` changes it.
    """
    if has_gpu():
        return gpu.read_free_gib()
    if not ray.is_initialized():
        return read_machine().node_memory_gib / workers_on_node
    own_node = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == own_node)
    return float(resources["memory"]) / workers_on_node / _GIB


def allocator_limit_gib() -> float:
    """Return how much of this worker's GPU TensorFlow's allocator takes at most, in GiB; infinite without a GPU.

    That is what is free when CUDA has started, less one or two GiB that TensorFlow leaves to cuDNN, cuBLAS and NCCL, on
    a small card too. The strategy must have been made.
    """
    return compat.memory_of_device("GPU") / _GIB if has_gpu() else math.inf


def ran_out_of_memory(error: tf.errors.OpError) -> bool:
    """Return whether an operation failed for want of memory, which each of CUDA's libraries says in its own way."""
    return isinstance(error, tf.errors.ResourceExhaustedError) or bool(_NO_MEMORY.search(error.message))


def peak_memory_gib() -> float:
    """Return the peak memory in GiB that this worker has used since the last reset: of its GPU, or resident."""
    if has_gpu():
        return float(tf.config.experimental.get_memory_info("GPU:0")["peak"]) / _GIB
    return _resident_gib("VmHWM")


def reset_peak_memory() -> None:
    """Reset what `peak_memory_gib` returns."""
    if has_gpu():
        tf.config.experimental.reset_memory_stats("GPU:0")
    else:
        # proc(5): 5 resets the peak resident set size.
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def killed_beyond(limit_gib: float) -> Iterator[None]:
    """Kill this process by SIGKILL, as the kernel would, when it holds more memory than its limit within the context.

    That is before it takes memory from others: without a container the kernel acts only when the machine has none left.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_GUARD_INTERVAL_SECONDS):
            if _resident_gib("VmRSS") > limit_gib:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="memory guard", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _resident_gib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024 / _GIB
