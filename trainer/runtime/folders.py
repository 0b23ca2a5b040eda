"""Folders of this machine for what is not a result: one cache folder, and temporary folders that are cleaned up."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from trainer.runtime.errors import InputError

# Variables of libraries that would write to the home folder, with the subfolder of the cache folder for each.
_LIBRARY_FOLDERS = {"MPLCONFIGDIR": "matplotlib", "KERAS_HOME": "keras", "CUDA_CACHE_PATH": "cuda"}
_LOCK_NAME = "training-notes.lock"


def cache_folder() -> Path:
    """Create and return the folder where this machine caches datasets, a folder of the user in XDG_CACHE_HOME.

    Raises:
        InputError: the folder cannot be created, or belongs to another user.
    """
    folder = _choose_cache_folder()
    advice = "set XDG_CACHE_HOME to a folder that can be written"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the cache folder {folder} cannot be made: {error.strerror}; {advice}") from error
    # Any user can create this folder.
    if folder == _fallback_cache_folder() and not _is_own(folder.parent):
        raise InputError(f"the cache folder {folder} belongs to another user; {advice}")
    return folder


def keep_caches_together() -> None:
    """Make this process, its children and the libraries that they import write to the cache folder only."""
    folder = _choose_cache_folder()
    # A child process with another TMPDIR would choose another folder.
    os.environ["XDG_CACHE_HOME"] = str(folder.parent)
    for variable, name in _LIBRARY_FOLDERS.items():
        os.environ.setdefault(variable, str(folder / name))


def _choose_cache_folder() -> Path:
    """Return the folder in XDG_CACHE_HOME (default ~/.cache), or a temporary one for a user without a home folder."""
    try:
        folder = Path(platformdirs.user_cache_dir("training-notes"))
    except RuntimeError:
        # The user id has no name, and HOME is not set.
        return _fallback_cache_folder()
    if os.environ.get("XDG_CACHE_HOME") or os.access(_find_existing(folder), os.W_OK | os.X_OK):
        return folder
    return _fallback_cache_folder()


def _fallback_cache_folder() -> Path:
    return Path(tempfile.gettempdir(), f"training-notes-{os.geteuid()}", "training-notes")


def _find_existing(folder: Path) -> Path:
    """Return the folder, or the nearest parent that exists."""
    return next(one for one in (folder, *folder.parents) if os.path.exists(one))


@contextlib.contextmanager
def hold_folder(prefix: str, parent: str) -> Iterator[str]:
    """Yield a new folder for temporary files, and delete it at the end of the context.

    Folders of processes that were killed are deleted first. Each folder has a file that its process has locked; the
    system releases the lock when the process ends. Locks hold across all containers that share the parent. Folders of
    other machines and other users are not touched.

    Args:
        prefix: prefix of the name; only folders with the same prefix are deleted.
        parent: folder in which it is created.

    Raises:
        OSError: the folder cannot be created.
    """
    for lock_path in Path(parent).glob(f"{prefix}*/{_LOCK_NAME}"):
        _remove_abandoned(lock_path)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    lock_path = Path(folder, _LOCK_NAME)
    with lock_path.open("x") as lock:
        # On a file system without locks no other process will delete the folder.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Until this is written, the folder does not count as abandoned.
            lock.write(_machine())
            lock.flush()
        try:
            yield folder
        finally:
            if lock_path.exists():
                shutil.rmtree(folder, ignore_errors=True)


def keep_folder(folder: str) -> None:
    """Keep a folder of `hold_folder` after its context."""
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
            # Last, so that the next job finishes a deletion that is interrupted.
            lock_path.unlink()
            folder.rmdir()


def _is_own(folder: Path) -> bool:
    return not folder.is_symlink() and folder.stat().st_uid == os.geteuid()


def _machine() -> str:
    """Return the id of the current boot of this machine: locks do not hold beyond it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()
