"""Access to files: local paths and ``s3://bucket/prefix`` URIs behave alike.

Nothing here relies on rename, append or listing order of an object store. A write is one object that appears whole or
not at all, so a small object written last can serve as a commit. Names are literal: no character of a name is a
pattern. Credentials and endpoint are never arguments: s3fs reads the standard AWS variables and files on every node, so
that no secret gets into a config, a pickle or a log.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.runtime.errors import InputError, JobError, UnreachableError
from trainer.runtime.processes import is_worker

if TYPE_CHECKING:
    from trainer.runtime.s3 import S3

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of a symlink that is broken, or a file that was deleted meanwhile.
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# A storage that accepts connections but never answers would delay all retries for minutes.
_FIRST_ANSWER_SECONDS = 25.0
# Name of an unfinished file on a local disk: hidden, and ignored by listings.
_PARTIAL = re.compile(r"\..*\.[0-9a-f]{32}\.partial")
# What looks like a URI rather than a local path: a scheme, a Windows drive or share, or "://" anywhere.
_LIKE_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|\\\\|[^/.~].*://|:")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Parallel requests, each of which deletes one object: the request that deletes many needs a checksum that differs
# between stores, and may report success where it failed.
_DELETIONS = 16


def resolve_uri(location: str) -> str:
    """Return the absolute form of a local path, or an ``s3://`` URI without a trailing slash.

    A relative path with a colon in its first part must be written ``./PATH``, so that a misspelled URI is not taken for
    a path.

    Raises:
        InputError: the location is a URI of another scheme, lacks a valid bucket, or has a part that is not portable.
    """
    if not location.startswith("s3://"):
        if _LIKE_URI.match(location):
            raise InputError(
                f"{location!r} is not a known kind of URI; give s3://bucket/prefix or a local path, and ./PATH for one "
                "with a colon in its first part"
            )
        return os.path.abspath(os.path.expanduser(location))
    bucket, *parts = location.removeprefix("s3://").rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"{location!r} names no bucket: bucket names have letters, digits, '.', '_' and '-'; give s3://bucket/prefix"
        )
    if any(part in ("", ".", "..") or _CONTROL.search(part) for part in parts):
        raise InputError(
            f"{location!r} has a part that is empty, '.' or '..', or a control character, which stores and programs "
            "handle differently; give s3://bucket/prefix without it"
        )
    return location.rstrip("/")


def is_local(uri: str) -> bool:
    """Return whether the URI is a path on this machine's file system."""
    return not uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Return the URI of a file below ``uri``."""
    return "/".join([uri.rstrip("/"), *parts])


def basename(uri: str) -> str:
    """Return the last component of a path or URI."""
    return uri.rstrip("/").rpartition("/")[2]


def keyed_uri(storage_uri: str, folder: str, key: Mapping[str, Any]) -> str:
    """Return the URI of a file in a folder of a storage that is named by a key, which JSON can hold."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return join(resolve_uri(storage_uri), folder, f"{name}.json")


def parent(uri: str) -> str:
    """Return the folder of a path or URI."""
    return uri.rstrip("/").rpartition("/")[0]


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Return the content of one file, or ``length`` bytes of it from ``start``.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the storage refused or could not be reached.
        JobError: the storage answered before, but not for the last two minutes.
    """
    with clear_errors(uri):
        if is_local(uri):
            with open(uri, "rb") as file:
                file.seek(start)
                return file.read() if length is None else file.read(length)
        return _s3().read(_path(uri), start, None if length is None else start + length)


def map_file(uri: str) -> pa.Buffer:
    """Return the content of one file; a local one is mapped, so that it is read only where it is looked at.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the storage refused or could not be reached.
    """
    if not is_local(uri):
        return pa.py_buffer(read_bytes(uri))
    with clear_errors(uri):
        return pa.memory_map(uri).read_buffer()


@contextlib.contextmanager
def open_file(uri: str) -> Iterator[Any]:
    """Open one file to read parts of it."""
    with clear_errors(uri), open(uri, "rb") if is_local(uri) else _s3().open(_path(uri), "rb") as file:
        yield file


def read_parquet_schema(uri: str) -> pa.Schema:
    """Return the Arrow schema of a Parquet file; only its footer is read."""
    with open_file(uri) as file:
        return pq.read_schema(file)


def write_bytes(uri: str, content: bytes, *, sync: bool = True) -> None:
    """Write one file, which appears whole or not at all, and create its parent folders.

    Args:
        uri: URI of the file.
        content: content of the file.
        sync: wait until a local disk has stored the file and its name, so that it survives a power failure. An object
            store always does.

    Raises:
        InputError: the storage refused or could not be reached.
        JobError: a disk is full, or the storage answered before, but not for the last two minutes.
    """
    if is_local(uri):
        with create_whole(uri, sync=sync) as file:
            file.write(content)
        return
    with clear_errors(uri):
        _s3().write(_path(uri), content)


@contextlib.contextmanager
def create_whole(uri: str, *, sync: bool = True) -> Iterator[Any]:
    """Yield a file to write to, which appears whole at the end of the context, or not at all after an error.

    A local file is written piece by piece; an object is collected in memory and sent at the end.

    Raises:
        InputError: the storage refused or could not be reached.
        JobError: a disk is full, or the storage answered before, but not for the last two minutes.
    """
    if is_local(uri):
        with clear_errors(uri), _whole_local(Path(uri), sync) as file:
            yield file
        return
    sink = io.BytesIO()
    yield sink
    write_bytes(uri, sink.getvalue())


def create_file(uri: str, content: bytes) -> bool:
    """Write one file unless it exists, and return whether it was written.

    The check and the write are atomic if the storage has conditional writes; Swift and old versions of Ceph do not.

    Raises:
        InputError: the storage refused or could not be reached.
    """
    with clear_errors(uri):
        if not is_local(uri):
            return not _s3().has(_path(uri)) and _s3().write(_path(uri), content, create=True)
        # A link, not an exclusive open: a file that exists must be complete.
        with _partial_file(Path(uri)) as whole:
            whole.write_bytes(content)
            try:
                os.link(whole, uri)
            except FileExistsError:
                return False
        return True


def refuses_to_create(uri: str, content: bytes) -> bool:
    """Try to create a file that exists, and return whether the storage refused, that is, has conditional writes.

    Args:
        uri: URI of the file.
        content: content of the file, which is written again if the storage ignores conditions.

    Raises:
        InputError: the storage refuses conditional writes altogether, or could not be reached.
    """
    with clear_errors(uri):
        return is_local(uri) or not _s3().write(_path(uri), content, create=True)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as the content of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="lz4")
    return sink.getvalue()


def parquet_table(content: bytes) -> pa.Table:
    """Return the table that the content of a Parquet file holds."""
    return pq.read_table(pa.BufferReader(content))


def exists(uri: str) -> bool:
    """Return whether one file, or at least one file below a folder, exists."""
    with clear_errors(uri):
        return os.path.exists(uri) if is_local(uri) else _s3().has(_path(uri))


def find_files(uri: str) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by path, as `walk_files` finds them, sorted by path.

    Raises:
        InputError: the storage or one of the folders cannot be read.
    """
    return dict(sorted(walk_files(uri)))


def walk_files(uri: str) -> Iterator[tuple[str, int]]:
    """Yield path, relative to a folder, and size in bytes of every file below it, in no order; none are kept in memory.

    Local symlinks to folders are followed unless they lead to a folder above them, so that loops end; a symlink to a
    missing file has size 0. A missing folder is empty.

    Raises:
        InputError: the storage or one of the folders cannot be read.
    """
    return _walk_local(uri) if is_local(uri) else _walk_objects(uri)


def find_folders(uri: str) -> list[str]:
    """Return the names of the folders directly below a folder, sorted; none for a missing folder."""
    with contextlib.suppress(FileNotFoundError), clear_errors(uri), contextlib.suppress(NotADirectoryError):
        if is_local(uri):
            with os.scandir(uri) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        root = join(_path(uri), "")
        folders = [entry["name"] for entry in _s3().ls(_path(uri), detail=True) if entry["type"] == "directory"]
        # A key that begins with a slash has an empty first part.
        return sorted(name.removeprefix(root) for name in folders if len(name) > len(root))
    return []


def delete_file(uri: str) -> None:
    """Delete one file; a missing file is not an error."""
    with contextlib.suppress(FileNotFoundError), clear_errors(uri):
        if is_local(uri):
            os.remove(uri)
        else:
            _s3().rm_file(_path(uri))


def delete_folder(uri: str) -> None:
    """Delete a folder and everything below it; a missing folder is not an error."""
    with contextlib.suppress(FileNotFoundError), clear_errors(uri):
        if is_local(uri):
            os.remove(uri) if os.path.islink(uri) else shutil.rmtree(uri)
            return
        root, s3 = _path(uri), _s3()
        with ThreadPoolExecutor(_DELETIONS) as threads:
            list(threads.map(s3.rm_file, [join(root, name) for name, _ in _walk_objects(uri)]))


def delete_partial_files(uri: str) -> None:
    """Delete the partial files of killed writers below a folder; no other process may be writing there."""
    if not is_local(uri):
        return
    with clear_errors(uri):
        for folder, _, names in os.walk(uri):
            for name in filter(_PARTIAL.fullmatch, names):
                Path(folder, name).unlink(missing_ok=True)


def check_access(uri: str) -> None:
    """Try below ``uri`` everything that a job will do there, to fail before any work is done; nothing is left behind.

    Raises:
        InputError: the storage refused; the message names the operation, the permission and the variables to check.
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
        # Swift and old versions of Ceph write in any case.
        refuses_to_create(file, b"ok")
        return not create_file(file, b"no")

    def delete() -> bool:
        delete_folder(folder)
        return not exists(file)

    for what, permission, works in (
        ("write a file", "s3:PutObject", write),
        # Checkpoints of 100 MiB and more are written in parts.
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
            # If nothing was written, there is nothing to wait for.
            if what != "write a file":
                with contextlib.suppress(InputError, JobError):
                    delete_file(file)
            # Do not name a file that the user does not know.
            message = str(error).replace(file, uri).replace(folder, uri)
            if isinstance(error, UnreachableError):
                raise UnreachableError(message) from error
            needed = "" if is_local(uri) else f" ({permission})"
            raise InputError(f"{message}; a job must be able to {what} there{needed}") from error
        raise InputError(f"{uri}: tried to {what}, but the result differs from what was written; use another storage")


def choose_output(output: str, default: str) -> str:
    """Return the place where a job writes its results, from an option or its default, and check that it is writable.

    Raises:
        InputError: the place is not writable; the message names the missing permission and the option.
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
    """Call the first request to a storage, and give up long before all retries have failed."""
    raised: list[BaseException] = []

    def catch() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    # Not a thread of a pool, for which Python would wait when it exits.
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
    """Turn errors of a storage or a disk into one line with the URI and what to check, without secrets."""
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
    # Not at the top: the import takes most of a second, and most work is on local files.
    from trainer.runtime.s3 import S3

    # A job uses the storage itself before it starts a worker, so a worker retries for minutes from its first request.
    return S3(has_answered=is_worker())


def _path(uri: str) -> str:
    """Return bucket and key of an S3 URI."""
    return uri.removeprefix("s3://")


def ask_briefly() -> None:
    """Make this process retry for seconds instead of minutes until the storage answers again: for the end of a job."""
    _s3().try_briefly()


def forget_answers() -> None:
    """Make this process treat the storage as one that has never answered, and is probably misspelled."""
    _s3().forget_answers()


def _walk_objects(uri: str) -> Iterator[tuple[str, int]]:
    after: str | None = ""
    while after is not None:
        with clear_errors(uri):
            objects, after = _s3().list_page(_path(uri), after)
        # Some tools create empty "folder/" marker objects.
        yield from ((name, size) for name, size in objects if name and not name.endswith("/"))


@contextlib.contextmanager
def _whole_local(path: Path, sync: bool) -> Iterator[Any]:
    """Yield a temporary file next to ``path``, and rename it at the end."""
    with _partial_file(path) as partial:
        with partial.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    if sync:
        _sync_folder(path.parent)


@contextlib.contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file next to ``path``; it is deleted at the end unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
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


def _walk_local(root: str) -> Iterator[tuple[str, int]]:
    # Paths are text here: for millions of files, pathlib takes longer than the file system.
    folders, start = [root], len(os.path.join(root, ""))
    while folders:
        folder = folders.pop()
        with contextlib.suppress(FileNotFoundError), clear_errors(folder), os.scandir(folder) as entries:
            for entry in entries:
                status = _follow(entry)
                if status is None:
                    # Listed if it is a symlink, so that its reader reports that it is broken.
                    if entry.is_symlink():
                        yield entry.path[start:], 0
                elif stat.S_ISREG(status.st_mode):
                    if not _PARTIAL.fullmatch(entry.name):
                        yield entry.path[start:], status.st_size
                elif stat.S_ISDIR(status.st_mode) and not (entry.is_symlink() and _leads_back(Path(entry.path))):
                    folders.append(entry.path)


def _follow(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return the status of an entry of a folder, or of what it leads to; None if that is nothing."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            raise
        return None


def _leads_back(folder: Path) -> bool:
    return folder.resolve() in [above.resolve() for above in folder.parents]
