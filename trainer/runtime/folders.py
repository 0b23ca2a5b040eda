"""Where this machine keeps what is no result: one cache folder, and temporary folders that no job leaves for ever."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from trainer.runtime.errors import InputError

# What a library would write into the home folder, by the variable that says where.
_LIBRARY_FOLDERS = {"MPLCONFIGDIR": "matplotlib", "KERAS_HOME": "keras", "CUDA_CACHE_PATH": "cuda"}
_LOCK_NAME = "training-notes.lock"


def cache_folder() -> Path:
    """Make and return the folder where this machine keeps datasets: that of the user in XDG_CACHE_HOME.

    Raises:
        InputError: it cannot be made, or belongs to somebody else.
    """
    folder = _choose_cache_folder()
    advice = "set XDG_CACHE_HOME to a folder that can be written"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the cache folder {folder} cannot be made: {error.strerror}; {advice}") from error
    # Anybody may have made that one.
    if folder == _fallback_cache_folder() and not _is_own(folder.parent):
        raise InputError(f"the cache folder {folder} belongs to another user; {advice}")
    return folder


def keep_caches_together() -> None:
    """Tell this process and its children, and the libraries that they import, to write to the cache folder alone."""
    folder = _choose_cache_folder()
    # A child with another TMPDIR would choose another one.
    os.environ["XDG_CACHE_HOME"] = str(folder.parent)
    for variable, name in _LIBRARY_FOLDERS.items():
        os.environ.setdefault(variable, str(folder / name))


def _choose_cache_folder() -> Path:
    """Return the folder of XDG_CACHE_HOME, by default ~/.cache, or a temporary one of a user without a home."""
    try:
        folder = Path(platformdirs.user_cache_dir("training-notes"))
    except RuntimeError:
        # A number without a name, and no HOME.
        return _fallback_cache_folder()
    if os.environ.get("XDG_CACHE_HOME") or os.access(_find_existing(folder), os.W_OK | os.X_OK):
        return folder
    return _fallback_cache_folder()


def _fallback_cache_folder() -> Path:
    return Path(tempfile.gettempdir(), f"training-notes-{os.geteuid()}", "training-notes")


def _find_existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(one for one in (folder, *folder.parents) if os.path.exists(one))


@contextlib.contextmanager
def hold_folder(prefix: str, parent: str) -> Iterator[str]:
    """Yield a new folder for temporary files that is gone after the context.

    Those of processes that were killed are removed first. Such a folder has a file that its process has locked, which
    the system ends with the process; a lock holds in all containers that share the parent, and what another machine or
    another user made there is left alone.

    Args:
        prefix: of its name, the same for all that may be removed.
        parent: folder that it is made in.

    Raises:
        OSError: it cannot be made.
    """
    for lock_path in Path(parent).glob(f"{prefix}*/{_LOCK_NAME}"):
        _remove_abandoned(lock_path)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    lock_path = Path(folder, _LOCK_NAME)
    with lock_path.open("x") as lock:
        # A file system without locks: nobody else will remove it.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Until this is written, the folder is not taken for an abandoned one.
            lock.write(_machine())
            lock.flush()
        try:
            yield folder
        finally:
            if lock_path.exists():
                shutil.rmtree(folder, ignore_errors=True)


def keep_folder(folder: str) -> None:
    """Let a folder of `hold_folder` outlive its context."""
    Path(folder, _LOCK_NAME).unlink(missing_ok=True)


def _remove_abandoned(lock_path: Path) -> None:
    folder = lock_path.parent
    with contextlib.suppress(OSError):
        if not _is_own(folder):
            return
        with open(os.open(lock_path, os.O_RDWR | os.O_NOFOLLOW)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.read() != _machine():
                return
            for one in folder.iterdir():
                if one.is_dir() and not one.is_symlink():
                    shutil.rmtree(one, ignore_errors=True)
                elif one != lock_path:
                    one.unlink()
            # Last, so that what is interrupted here is finished by the next job.
            lock_path.unlink()
            folder.rmdir()


def _is_own(folder: Path) -> bool:
    return not folder.is_symlink() and folder.stat().st_uid == os.geteuid()


def _machine() -> str:
    """Return what tells one start of a machine from all others: locks hold no further."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()
