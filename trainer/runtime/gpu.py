"""The GPUs that a process may use, and what TensorFlow needs to use them; nothing here imports TensorFlow."""

import contextlib
import ctypes
import os
import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_GIB = 2**30
_TOOLKIT = Path("/usr/local/cuda")
# Under the names that TensorFlow 2.21 looks for. With one but NCCL missing it computes on the CPU, and logs no error.
_LIBRARIES = {
    "libcuda.so.1": "the driver",
    "libcudart.so.12": "the CUDA runtime",
    "libcublas.so.12": "cuBLAS",
    "libcublasLt.so.12": "cuBLASLt",
    "libcufft.so.11": "cuFFT",
    "libcusolver.so.11": "cuSOLVER",
    "libcusparse.so.12": "cuSPARSE",
    "libcudnn.so.9": "cuDNN",
    "libnccl.so.2": "NCCL",
}
# How to make them found.
FIX = "install the driver of the GPU, and pip install -e '.[gpu]'"


def visible_devices() -> list[str] | None:
    """Return the numbers or UUIDs of the GPUs that CUDA_VISIBLE_DEVICES leaves; None if it is not set: all of them."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    devices = []
    for device in map(str.strip, value.split(",")):
        # CUDA ignores what follows the first name that is none, such as -1.
        if not (device.isdecimal() or device.startswith(("GPU-", "MIG-"))):
            break
        devices.append(device)
    return devices


def read_free_gib() -> float:
    """Return the free memory in GiB of the first visible GPU, which is TensorFlow's GPU:0."""
    import pynvml

    return float(pynvml.nvmlDeviceGetMemoryInfo(_find_first(pynvml)).free) / _GIB


def read_total_gib() -> float | None:
    """Return the memory in GiB of the first visible GPU; None where that cannot be known."""
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            return float(pynvml.nvmlDeviceGetMemoryInfo(_find_first(pynvml)).total) / _GIB
    return None


def read_name() -> str:
    """Return the kind of the first visible GPU, such as "NVIDIA H200"; "GPU" where that cannot be known."""
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            return str(pynvml.nvmlDeviceGetName(_find_first(pynvml)))
    return "GPU"


def _find_first(pynvml: Any) -> Any:
    """Return the handle of the first visible GPU."""
    pynvml.nvmlInit()
    device = (visible_devices() or ["0"])[0]
    if device.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device))
    # CUDA takes the beginning of a UUID, too.
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        if pynvml.nvmlDeviceGetUUID(handle).startswith(device):
            return handle
    # Instances of a GPU are not counted.
    return pynvml.nvmlDeviceGetHandleByUUID(device)


def find_missing_libraries() -> list[str]:
    """Return which libraries TensorFlow would not find for a GPU, such as "libcudnn.so.9 (cuDNN)"."""
    return [f"{name} ({what})" for name, what in _LIBRARIES.items() if not _loads(name)]


def find_missing_tools() -> list[str]:
    """Return what XLA would not find to compile for a GPU: libdevice and ptxas."""
    roots = list(_cuda_roots())
    missing = []
    if not any((root / "nvvm/libdevice/libdevice.10.bc").is_file() for root in roots):
        missing.append("libdevice.10.bc (libdevice)")
    if not any(os.access(root / "bin/ptxas", os.X_OK) for root in roots) and shutil.which("ptxas") is None:
        missing.append("ptxas")
    return missing


def explain_unseen(seen: int, given: int) -> str:
    """Explain why TensorFlow sees fewer GPUs than Ray, which asks the driver, has given to this process."""
    missing = find_missing_libraries()
    why = f"cannot load {', '.join(missing)}" if missing else "no library is missing, so the driver may be too old"
    return (
        f"Ray gave this worker {given} GPU and TensorFlow sees {seen}: {why}; {FIX}, or set CUDA_VISIBLE_DEVICES=-1 "
        "to train on CPUs"
    )


def _loads(library: str) -> bool:
    # First as the linker finds it (LD_LIBRARY_PATH), then where TensorFlow also looks: in NVIDIA's packages.
    for path in (library, *(str(path) for path in _packages().glob(f"nvidia/*/lib/{library}"))):
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return True
    return False


def _cuda_roots() -> Iterator[Path]:
    """Yield where XLA looks for the CUDA toolkit."""
    for flag in shlex.split(os.environ.get("XLA_FLAGS", "")):
        name, _, value = flag.partition("=")
        if name == "--xla_gpu_cuda_data_dir":
            yield Path(value)
    yield _packages() / "nvidia/cuda_nvcc"
    yield _TOOLKIT


def _packages() -> Path:
    """Return the folder that TensorFlow is installed in, beside which NVIDIA's packages are."""
    spec = find_spec("tensorflow")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("tensorflow is not installed")
    return Path(spec.origin).parents[1]
