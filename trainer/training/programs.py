"""The folder in which XLA keeps compiled programs, so that the next process does not compile them again."""

import contextlib
import os
from importlib.metadata import version
from pathlib import Path

from trainer.runtime.errors import InputError
from trainer.runtime.folders import cache_folder

_FLAG = "--tf_xla_persistent_cache_directory"
_MOST_BYTES = 4 * 2**30


def keep_programs(device: str) -> None:
    """Make XLA keep compiled programs in the cache folder, by version of TensorFlow and by device.

    It has no effect after TensorFlow has listed its devices, nor where TF_XLA_FLAGS names another folder or the cache
    folder cannot be written.

    Args:
        device: name of the kind of GPU or CPU.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if _FLAG in flags:
        return
    name = "".join(one if one.isalnum() else "-" for one in device)
    try:
        programs = cache_folder() / "xla"
        folder = programs / f"tensorflow-{version('tensorflow')}" / name
        folder.mkdir(parents=True, exist_ok=True)
        _delete_oldest(programs)
    except (InputError, OSError):
        return  # each process compiles for itself
    os.environ["TF_XLA_FLAGS"] = f"{flags} {_FLAG}='{folder}'".strip()


def _delete_oldest(folder: Path) -> None:
    """Delete programs until few enough bytes are left."""
    # Another process may delete them at the same time.
    with contextlib.suppress(FileNotFoundError):
        programs = [(path.stat().st_mtime, path.stat().st_size, path) for path in folder.rglob("*.pb")]
        excess = sum(size for _, size, _ in programs) - _MOST_BYTES
        for _, size, path in sorted(programs):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
