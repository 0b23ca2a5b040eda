"""The one door to files: local paths and ``s3://bucket/prefix`` URIs behave alike.

Nothing here relies on rename, append or listing order of an object store. A write is one object that appears whole or
not at all, so a small object written last can serve as a commit. Credentials and endpoint are never arguments: s3fs
reads the standard AWS variables and files on every node, so no secret enters a config, a pickle or a log.
"""

import contextlib
import errno
import functools
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from trainer.errors import InputError, JobError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# s3fs tries each request again, waiting 0.1 x 1.7**n seconds, at most 15; botocore's one retry below it adds jitter. A
# storage that has never answered is likely misnamed: 3 s of waiting. One that has is worth two minutes.
_TRIES_BEFORE_FIRST_ANSWER = 6
_TRIES = 16
# Set in the processes that a job starts: the job itself has had an answer by then.
ANSWERED_VARIABLE = "TRAINING_STORAGE_ANSWERED"
_has_answered = False
# One that takes a connection and never answers would hold up the tries above for minutes.
_FIRST_ANSWER_SECONDS = 25.0
# How what is not written to its end is called on a local disk; hidden, and no file to anybody.
_PARTIAL = re.compile(r"\..*\.[0-9a-f]{32}\.partial")
_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 2}, "connect_timeout": 5, "read_timeout": 60},
}


def resolve_uri(location: str) -> str:
    """Returns an absolute form of a local path, or an ``s3://`` URI without a trailing slash.

    Raises:
        InputError: the location has another scheme, or names no bucket.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return os.path.abspath(os.path.expanduser(location))
    if scheme != "s3":
        raise InputError(f"{location!r}: unknown scheme {scheme!r}; give a local path or s3://bucket/prefix")
    if not rest.strip("/"):
        raise InputError(f"{location!r} names no bucket; give s3://bucket/prefix")
    return location.rstrip("/")


def is_local(uri: str) -> bool:
    """Returns whether the URI is a path on this machine's file system."""
    return "://" not in uri


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
        filesystem, path = _open_filesystem(uri)
        content: bytes = filesystem.cat_file(path, start, None if length is None else start + length)
        return content


@contextlib.contextmanager
def open_file(uri: str) -> Iterator[Any]:
    """Opens one file to read parts of it."""
    with clear_errors(uri):
        filesystem, path = _open_filesystem(uri)
        with filesystem.open(path, "rb") as file:
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
        filesystem, path = _open_filesystem(uri)
        if isinstance(filesystem, LocalFileSystem):
            _write_local(Path(path), content, sync)
            return
        try:
            filesystem.pipe_file(path, content)
        except FileNotFoundError as error:
            raise InputError(_s3_message(uri, "no such bucket")) from error


def create_file(uri: str, content: bytes) -> bool:
    """Writes one file unless it exists, and returns whether it did.

    The check and the write are one where the storage has conditional writes; Swift and old Ceph have none.

    Raises:
        InputError: the storage refused or could not be reached.
    """
    with clear_errors(uri):
        filesystem, path = _open_filesystem(uri)
        if isinstance(filesystem, LocalFileSystem):
            # Linked, not opened exclusively: a file that exists is whole.
            with _partial_file(Path(path), content, sync=False) as whole:
                try:
                    os.link(whole, path)
                except FileExistsError:
                    return False
            return True
        return not filesystem.exists(path) and _create_object(uri, content)


def refuses_to_create(uri: str, content: bytes) -> bool:
    """Tries to create a file that exists, and returns whether the storage refused: whether its writes are conditional.

    Args:
        uri: of the file.
        content: that it has; where the storage knows no conditions, it is written again.

    Raises:
        InputError: the storage refuses conditional writes altogether, or could not be reached.
    """
    with clear_errors(uri):
        return is_local(uri) or not _create_object(uri, content)


def _create_object(uri: str, content: bytes) -> bool:
    filesystem, path = _open_filesystem(uri)
    try:
        filesystem.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise InputError(_s3_message(uri, "no such bucket")) from error
    except OSError as error:
        # Of Ceph, whose answer has no message, s3fs makes a plain OSError.
        if _error_code(error) == "PreconditionFailed":
            return False
        raise
    return True


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
        filesystem, path = _open_filesystem(uri)
        return bool(filesystem.exists(path))


def find_files(uri: str) -> dict[str, int]:
    """Returns the size in bytes of every file below a folder by its path relative to it, sorted by path.

    Local symlinks to folders are followed unless they lead back to a folder above them, so a loop cannot trap the walk;
    one to a file that is not there has size 0. A folder that is not there is empty.

    Raises:
        InputError: the storage or one of the folders cannot be read.
    """
    with clear_errors(uri):
        filesystem, path = _open_filesystem(uri)
        if isinstance(filesystem, LocalFileSystem):
            sizes = _local_sizes(Path(path))
        else:
            root = path.rstrip("/") + "/"
            try:
                entries = filesystem.find(path, detail=True)
            except FileNotFoundError as error:
                raise InputError(_s3_message(uri, "no such bucket")) from error
            # Some tools leave empty "folder/" marker objects.
            sizes = {
                name.removeprefix(root): entry["size"]
                for name, entry in entries.items()
                if name.startswith(root) and not name.endswith("/")
            }
    return dict(sorted(sizes.items()))


def find_folders(uri: str) -> list[str]:
    """Returns the names of the folders directly below a folder, sorted. A folder that is not there has none."""
    with clear_errors(uri):
        filesystem, path = _open_filesystem(uri)
        try:
            entries = filesystem.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(basename(entry["name"]) for entry in entries if entry["type"] == "directory")


def delete_file(uri: str) -> None:
    """Deletes one file; one that is not there is no error."""
    with clear_errors(uri):
        filesystem, path = _open_filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(path)


def delete_folder(uri: str) -> None:
    """Deletes a folder and all below it; one that is not there is no error."""
    with clear_errors(uri):
        filesystem, path = _open_filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(path, recursive=True)


def delete_partial_files(uri: str) -> None:
    """Deletes what writers that were killed have left below a folder; only where nobody else writes."""
    if not is_local(uri):
        return
    with clear_errors(uri):
        for path in Path(uri).rglob(".*.partial"):
            if _PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)


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

    def create() -> bool:
        # Swift and old Ceph write in any case.
        refuses_to_create(file, b"ok")
        return not create_file(file, b"no")

    def delete() -> bool:
        delete_file(file)
        return not exists(file)

    for what, permission, works in (
        ("write a file", "s3:PutObject", write),
        ("read a file", "s3:GetObject", lambda: read_bytes(file) == b"ok"),
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
            needed = "" if is_local(uri) else f" ({permission})"
            raise InputError(f"{error}; a job must be able to {what} there{needed}") from error
        raise InputError(f"{uri}: tried to {what} and found something else than was written; use another storage")
    delete_folder(folder)


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
    if thread.is_alive() and not _has_answered:
        raise InputError(_s3_message(uri, f"nothing for {_FIRST_ANSWER_SECONDS:.0f} s"))
    thread.join()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def clear_errors(uri: str) -> Iterator[None]:
    """Turns what a storage or a disk can answer into one line with the place and what to set, never with a secret."""
    try:
        yield
        _note_answer(uri)
    except FileNotFoundError as error:
        _note_answer(uri)
        raise FileNotFoundError(f"{uri}: not found") from error
    except OSError as error:
        if error.errno in _FULL:
            raise JobError(f"{uri}: {error.strerror}; make room, and the same command continues") from error
        if is_local(uri):
            raise InputError(f"{uri}: {error.strerror or error}; give a path that can be read and written") from error
        raise _explain_s3(uri, error) from error
    except Exception as error:
        if is_local(uri) or not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise
        raise _explain_s3(uri, error) from error


@functools.cache
def _open_filesystem_for(scheme: str) -> fsspec.AbstractFileSystem:
    if scheme != "s3":
        return fsspec.filesystem(scheme)
    from s3fs.core import set_custom_error_handler

    set_custom_error_handler(_is_transient)
    filesystem = fsspec.filesystem("s3", **_S3_OPTIONS)
    global _has_answered
    _has_answered = bool(os.environ.get(ANSWERED_VARIABLE))
    filesystem.retries = _TRIES if _has_answered else _TRIES_BEFORE_FIRST_ANSWER
    return filesystem


def _is_transient(error: BaseException) -> bool:
    """Returns whether s3fs, which knows some of these itself, shall try a failed request again."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as BotoConnectionError

    if isinstance(error, ClientError):
        return bool(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500)
    if isinstance(error, BotoCoreError):
        return isinstance(error, BotoConnectionError | HTTPClientError)
    return isinstance(error, TimeoutError | ConnectionError)


def ask_briefly() -> None:
    """Lets this process try for seconds where it would for minutes, until it has an answer: for what ends a job."""
    _open_filesystem_for("s3").retries = _TRIES_BEFORE_FIRST_ANSWER


def _note_answer(uri: str) -> None:
    global _has_answered
    if not is_local(uri):
        _has_answered = True
        _open_filesystem_for("s3").retries = _TRIES


def _open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    scheme, separator, path = uri.partition("://")
    return (_open_filesystem_for(scheme), path) if separator else (_open_filesystem_for("file"), uri)


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


def _explain_s3(uri: str, error: Exception) -> InputError | JobError:
    """Returns what a refusal is, or a storage that does not answer any more, for which nobody gave a wrong argument."""
    # s3fs raises errors of its own from those of botocore.
    if _has_answered and (_is_transient(error) or (error.__cause__ and _is_transient(error.__cause__))):
        # Waited for long enough.
        ask_briefly()
        return JobError(f"{_s3_message(uri, _first_line(error))}; when it is back, the same command continues")
    return InputError(_s3_message(uri, _first_line(error)))


def _first_line(error: Exception) -> str:
    # Ceph sends no message with its codes.
    if (code := _error_code(error)) and str(error).endswith("None"):
        return code
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _error_code(error: BaseException) -> str:
    """Returns the S3 code of an error of s3fs, such as AccessDenied; empty where it has none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _s3_message(uri: str, reason: str) -> str:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default AWS endpoint"
    return (
        f"{uri}: bucket {bucket!r} at {endpoint} answered {reason!r}; check AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and AWS_PROFILE on every node"
    )
