"""GPUs as the environment names them, and CUDA's libraries as folders on a machine without any."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import REPOSITORY
from trainer.runtime import gpu

LIBRARIES = [
    *("libcuda.so.1", "libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libcufft.so.11", "libcusolver.so.11"),
    *("libcusparse.so.12", "libcudnn.so.9", "libnccl.so.2"),
]
FIND = "from trainer.runtime import gpu; print(*gpu.find_missing_libraries(), *gpu.find_missing_tools(), sep='; ')"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", ["1"]),
        ("0,-1,1", ["0"]),
        ("GPU-4f1, MIG-2", ["GPU-4f1", "MIG-2"]),
    ],
)
def test_cuda_shows_what_stands_before_the_first_name_that_is_none(monkeypatch, value, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert gpu.visible_devices() == expected


def test_without_the_variable_all_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.visible_devices() is None


@pytest.mark.parametrize(
    ("value", "free_gib"), [(None, 10), ("1", 11), ("1,0", 11), ("GPU-b", 11), ("GPU-a2", 10), ("MIG-c", 12)]
)
def test_the_free_memory_is_that_of_the_first_visible_gpu(monkeypatch, value, free_gib):
    uuids = ["GPU-a2f9", "GPU-b3c1", "MIG-c"]
    driver = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetHandleByUUID=uuids.index,
        nvmlDeviceGetUUID=lambda handle: uuids[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=(80 + handle) * 2**30, free=(10 + handle) * 2**30),
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert (gpu.read_free_gib(), gpu.read_total_gib()) == (free_gib, free_gib + 70)


def test_without_a_way_to_ask_the_memory_of_a_gpu_is_not_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.read_total_gib() is None


@pytest.fixture
def cuda(tmp_path):
    """A folder with a library under each name that TensorFlow looks for, and the tools in its subfolder toolkit."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    libc = next(line.split()[-1] for line in mapped if "/libc.so" in line)
    for name in LIBRARIES:
        (tmp_path / name).symlink_to(libc)
    toolkit = tmp_path / "toolkit"
    (toolkit / "nvvm/libdevice").mkdir(parents=True)
    (toolkit / "nvvm/libdevice/libdevice.10.bc").touch()
    (toolkit / "bin").mkdir()
    (toolkit / "bin/ptxas").touch(mode=0o755)
    return tmp_path


@pytest.fixture
def find_missing(cuda):
    def find() -> str:
        """What is missing for a process that looks for libraries and tools in that folder."""
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(cuda),
            "XLA_FLAGS": f"--xla_some_flag --xla_gpu_cuda_data_dir={cuda / 'toolkit'}",
        }
        found = subprocess.run(
            [sys.executable, "-c", FIND], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    return find


def test_nothing_is_missing_where_all_is_there(find_missing):
    assert find_missing() == ""


def test_what_is_missing_or_no_library_is_named(cuda, find_missing):
    (cuda / "libcudnn.so.9").unlink()
    (cuda / "libnccl.so.2").unlink()
    (cuda / "libnccl.so.2").write_text("not a library")
    (cuda / "libcublasLt.so.12").rename(cuda / "libcublasLt.so.13")
    assert find_missing() == "libcublasLt.so.12 (cuBLASLt); libcudnn.so.9 (cuDNN); libnccl.so.2 (NCCL)"


def test_the_libraries_of_nvidias_packages_are_found_beside_tensorflow(cuda, monkeypatch):
    package = cuda / "nvidia/cublas/lib"
    package.mkdir(parents=True)
    (cuda / "libcublas.so.12").rename(package / "libcublas.so.12")
    monkeypatch.setattr(gpu, "_packages", lambda: cuda)
    assert not any("libcublas.so.12" in one for one in gpu.find_missing_libraries())


def test_missing_tools_are_named(cuda, monkeypatch):
    monkeypatch.setattr(gpu, "_packages", lambda: cuda)
    monkeypatch.setattr(gpu, "_TOOLKIT", cuda / "toolkit")
    monkeypatch.setenv("PATH", "")
    assert gpu.find_missing_tools() == []
    (cuda / "toolkit/nvvm/libdevice/libdevice.10.bc").unlink()
    (cuda / "toolkit/bin/ptxas").chmod(0o644)
    assert gpu.find_missing_tools() == ["libdevice.10.bc (libdevice)", "ptxas"]


def test_a_gpu_that_tensorflow_does_not_see_is_explained(monkeypatch):
    monkeypatch.setattr(gpu, "find_missing_libraries", lambda: ["libcudnn.so.9 (cuDNN)"])
    assert "cannot load libcudnn.so.9 (cuDNN); install the driver" in gpu.explain_unseen(0, 1)
    monkeypatch.setattr(gpu, "find_missing_libraries", lambda: [])
    assert "no library is missing, so the driver may be too old" in gpu.explain_unseen(0, 1)
