"""The one door to files: local paths and ``s3://bucket/prefix`` URIs behave alike.

Nothing here relies on rename, append or listing order of an object store. A write is one object that appears whole or
not at all, so a small object written last can serve as a commit. A name is taken as it is: none of its characters is a
pattern. Credentials and endpoint are never arguments: s3fs reads the standard AWS variables and files on every node, so
no secret enters a config, a pickle or a log.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.runtime.errors import InputError, JobError, UnreachableError

if TYPE_CHECKING:
    from trainer.runtime.s3 import S3

# Set in the processes that a job starts: the job itself has had an answer of the storage by then.
ANSWERED_VARIABLE = "TRAINING_STORAGE_ANSWERED"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A storage that takes a connection and never answers would hold up all tries for minutes.
_FIRST_ANSWER_SECONDS = 25.0
# How what is not written to its end is called on a local disk; hidden, and no file to anybody.
_PARTIAL = re.compile(r"\..*\.[0-9a-f]{32}\.partial")
# What is no local path unless it begins as one: a scheme, a drive or a share of Windows; "://" anywhere.
_LIKE_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|\\\\|[^/.~].*://|:")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Requests at a time. One of its own deletes each object: the request for many at once wants a checksum that differs
# from store to store, and answers that it worked where it did not.
_DELETIONS = 16


def resolve_uri(location: str) -> str:
    """Returns an absolute form of a local path, or an ``s3://`` URI without a trailing slash.

    A relative path with a colon in its first part is written ``./PATH``, so that no misspelt URI is taken for a path.

    Raises:
        InputError: the location is a URI of another kind, or names no bucket, or has an odd part.
    """
    if not location.startswith("s3://"):
        if _LIKE_URI.match(location):
            raise InputError(
                f"{location!r} is no URI that is known; give s3://bucket/prefix or a local path, and ./PATH for one "
                "with a colon in its first part"
            )
        return os.path.abspath(os.path.expanduser(location))
    bucket, *parts = location.removeprefix("s3://").rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"{location!r} names no bucket: the name of one has letters, digits, '.', '_' and '-'; give s3://bucket/prefix"
        )
    if any(part in ("", ".", "..") or _CONTROL.search(part) for part in parts):
        raise InputError(
            f"{location!r} has a part that is empty, '.' or '..', or a control character, for which stores and "
            "programs differ; give s3://bucket/prefix without"
        )
    return location.rstrip("/")


def is_local(uri: str) -> bool:
    """Returns whether the URI is a path on this machine's file system."""
    return not uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Returns the URI of a file below ``uri``."""
    return "/".join([uri.rstrip("/"), *parts])


def basename(uri: str) -> str:
    """Returns the last component of a path or URI."""
    return uri.rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """Returns the folder of a path or URI."""
    return uri.rstrip("/").rpartition("/")[0]


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Returns the content of one file, or ``length`` bytes of it from ``start``.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the storage refused or could not be reached.
        JobError: it had answered before, and did not for two minutes.
    """
    with clear_errors(uri):
        if is_local(uri):
            with open(uri, "rb") as file:
                file.seek(start)
                return file.read() if length is None else file.read(length)
        return _s3().read(_path(uri), start, None if length is None else start + length)


@contextlib.contextmanager
def open_file(uri: str) -> Iterator[Any]:
    """Opens one file to read parts of it."""
    with clear_errors(uri), open(uri, "rb") if is_local(uri) else _s3().open(_path(uri), "rb") as file:
        yield file


def read_parquet_schema(uri: str) -> pa.Schema:
    """Returns the Arrow schema of one Parquet file, reading its footer only."""
    with open_file(uri) as file:
        return pq.read_schema(file)


def write_bytes(uri: str, content: bytes, *, sync: bool = True) -> None:
    """Writes one file that appears whole or not at all, making its parent folders.

    Args:
        uri: of the file.
        content: of the file.
        sync: wait until a local disk has it and its name, so that it survives a loss of power too. An object store
            always does.

    Raises:
        InputError: the storage refused or could not be reached.
        JobError: a disk is full, or the storage had answered before, and did not for two minutes.
    """
    with clear_errors(uri):
        if is_local(uri):
            _write_local(Path(uri), content, sync)
        else:
            _s3().write(_path(uri), content)


def create_file(uri: str, content: bytes) -> bool:
    """Writes one file unless it exists, and returns whether it did.

    The check and the write are one where the storage has conditional writes; Swift and old Ceph have none.

    Raises:
        InputError: the storage refused or could not be reached.
    """
    with clear_errors(uri):
        if not is_local(uri):
            return not _s3().has(_path(uri)) and _s3().write(_path(uri), content, create=True)
        # Linked, not opened exclusively: a file that exists is whole.
        with _partial_file(Path(uri), content, sync=False) as whole:
            try:
                os.link(whole, uri)
            except FileExistsError:
                return False
        return True


def refuses_to_create(uri: str, content: bytes) -> bool:
    """Tries to create a file that exists, and returns whether the storage refused: whether its writes are conditional.

    Args:
        uri: of the file.
        content: that it has; where the storage knows no conditions, it is written again.

    Raises:
        InputError: the storage refuses conditional writes altogether, or could not be reached.
    """
    with clear_errors(uri):
        return is_local(uri) or not _s3().write(_path(uri), content, create=True)


def parquet_bytes(table: pa.Table) -> bytes:
    """Returns a table as the content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="lz4")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def parquet_table(content: bytes) -> pa.Table:
    """Returns the table that the content of a Parquet file holds."""
    return pq.read_table(pa.BufferReader(content))


def exists(uri: str) -> bool:
    """Returns whether one file, or at least one file below a folder, exists."""
    with clear_errors(uri):
        return os.path.exists(uri) if is_local(uri) else _s3().has(_path(uri))


def find_files(uri: str) -> dict[str, int]:
    """Returns the size in bytes of every file below a folder by its path relative to it, sorted by path.

    Local symlinks to folders are followed unless they lead back to a folder above them, so a loop cannot trap the walk;
    one to a file that is not there has size 0. A folder that is not there is empty.

    Raises:
        InputError: the storage or one of the folders cannot be read.
    """
    with clear_errors(uri):
        sizes = _local_sizes(Path(uri)) if is_local(uri) else _object_sizes(uri)
    return dict(sorted(sizes.items()))


def find_folders(uri: str) -> list[str]:
    """Returns the names of the folders directly below a folder, sorted. A folder that is not there has none."""
    with contextlib.suppress(FileNotFoundError), clear_errors(uri), contextlib.suppress(NotADirectoryError):
        if is_local(uri):
            with os.scandir(uri) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        root = join(_path(uri), "")
        folders = [entry["name"] for entry in _s3().ls(_path(uri), detail=True) if entry["type"] == "directory"]
        # Of a name that begins with a slash there is only an empty part.
        return sorted(name.removeprefix(root) for name in folders if len(name) > len(root))
    return []


def delete_file(uri: str) -> None:
    """Deletes one file; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError), clear_errors(uri):
        if is_local(uri):
            os.remove(uri)
        else:
            _s3().rm_file(_path(uri))


def delete_folder(uri: str) -> None:
    """Deletes a folder and all below it; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError), clear_errors(uri):
        if is_local(uri):
            os.remove(uri) if os.path.islink(uri) else shutil.rmtree(uri)
            return
        root, s3 = _path(uri), _s3()
        with ThreadPoolExecutor(_DELETIONS) as threads:
            list(threads.map(s3.rm_file, [join(root, name) for name in _object_sizes(uri)]))


def delete_partial_files(uri: str) -> None:
    """Deletes what writers that were killed have left below a folder; only where nobody else writes."""
    if not is_local(uri):
        return
    with clear_errors(uri):
        for folder, _, names in os.walk(uri):
            for name in filter(_PARTIAL.fullmatch, names):
                Path(folder, name).unlink(missing_ok=True)


def check_access(uri: str) -> None:
    """Does below ``uri`` once all that a job will do there, to fail before any work is done, and leaves nothing.

    Raises:
        InputError: the storage refused; says what, by the name of the permission, and which variables to look at.
    """
    folder = join(uri, f".access-check-{uuid.uuid4().hex}")
    file = join(folder, "file")

    def write() -> bool:
        _answer_soon(uri, lambda: write_bytes(file, b"ok"))
        return True

    def write_in_parts() -> bool:
        if not is_local(uri):
            with clear_errors(file):
                _s3().write_in_parts(_path(file), b"ok")
        return True

    def create() -> bool:
        # Swift and old Ceph write in any case.
        refuses_to_create(file, b"ok")
        return not create_file(file, b"no")

    def delete() -> bool:
        delete_folder(folder)
        return not exists(file)

    for what, permission, works in (
        ("write a file", "s3:PutObject", write),
        # As checkpoints of 100 MiB and more are.
        ("write a file in parts", "s3:PutObject", write_in_parts),
        ("read a file", "s3:GetObject", lambda: (read_bytes(file), read_bytes(file, 1, 1)) == (b"ok", b"k")),
        ("list files", "s3:ListBucket", lambda: find_files(folder) == {"file": 2}),
        ("write a file unless it exists", "s3:PutObject, If-None-Match", create),
        ("delete a file", "s3:DeleteObject", delete),
    ):
        try:
            if works():
                continue
        except (InputError, FileNotFoundError) as error:
            # Where nothing was written, nobody waits for another answer.
            if what != "write a file":
                with contextlib.suppress(InputError, JobError):
                    delete_file(file)
            # Not the name of a file that nobody asked for.
            message = str(error).replace(file, uri).replace(folder, uri)
            if isinstance(error, UnreachableError):
                raise UnreachableError(message) from error
            needed = "" if is_local(uri) else f" ({permission})"
            raise InputError(f"{message}; a job must be able to {what} there{needed}") from error
        raise InputError(f"{uri}: tried to {what} and found something else than was written; use another storage")


def choose_output(output: str, default: str) -> str:
    """Return where a job writes what it finds, an option or else its default place, once it is known to be writable.

    Raises:
        InputError: it is not; names the lacking permission, and the option.
    """
    uri = resolve_uri(output) if output else default
    try:
        check_access(uri)
    except UnreachableError:
        raise
    except InputError as error:
        raise InputError(f"{error}; or give another place with --output") from error
    return uri


def _answer_soon(uri: str, call: Callable[[], None]) -> None:
    """Calls what is tried first of a storage, and gives up long before all tries have failed."""
    raised: list[BaseException] = []

    def catch() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    # Not of a pool, which Python would wait for at its end.
    thread = threading.Thread(target=catch, daemon=True)
    thread.start()
    thread.join(_FIRST_ANSWER_SECONDS)
    if thread.is_alive() and not _s3().has_answered:
        raise UnreachableError(_s3().describe_silence(uri, f"nothing for {_FIRST_ANSWER_SECONDS:.0f} s"))
    thread.join()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def clear_errors(uri: str) -> Iterator[None]:
    """Turns what a storage or a disk can answer into one line with the place and what to set, never with a secret."""
    if not is_local(uri):
        with _s3().clear_errors(uri):
            yield
        return
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{uri}: not found") from error
    except OSError as error:
        if error.errno in _FULL:
            raise JobError(f"{uri}: {error.strerror}; make room, and the same command continues") from error
        raise InputError(f"{uri}: {error.strerror or error}; give a path that can be read and written") from error


@functools.cache
def _s3() -> "S3":
    # Not at the top: most of a second, and most work is on local files.
    from trainer.runtime.s3 import S3

    return S3(has_answered=bool(os.environ.get(ANSWERED_VARIABLE)))


def _path(uri: str) -> str:
    """Returns bucket and key."""
    return uri.removeprefix("s3://")


def ask_briefly() -> None:
    """Lets this process try for seconds where it would for minutes, until it has an answer: for what ends a job."""
    _s3().try_briefly()


def _object_sizes(uri: str) -> dict[str, int]:
    root = join(_path(uri), "")
    found = _s3().find(_path(uri), detail=True)
    # Some tools leave empty "folder/" marker objects.
    return {
        name.removeprefix(root): entry["size"]
        for name, entry in found.items()
        if name.startswith(root) and not name.endswith("/")
    }


def _write_local(path: Path, content: bytes, sync: bool) -> None:
    with _partial_file(path, content, sync) as partial:
        partial.replace(path)
    if sync:
        _sync_folder(path.parent)


@contextlib.contextmanager
def _partial_file(path: Path, content: bytes, sync: bool) -> Iterator[Path]:
    """Yields a file of this content beside ``path``, which is gone afterwards unless it got another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Some network file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _local_sizes(root: Path) -> dict[str, int]:
    sizes = {}
    for folder, folders, names in os.walk(root, onerror=_raise_unless_missing, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(Path(folder, name))]
        for name in names:
            path = Path(folder, name)
            if _PARTIAL.fullmatch(name):
                continue
            if path.is_file():
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            elif path.is_symlink() and not path.exists():
                # Listed, for its reader to find out that it is broken.
                sizes[path.relative_to(root).as_posix()] = 0
    return sizes


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        with clear_errors(error.filename):
            raise error


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.resolve() in [above.resolve() for above in folder.parents]
