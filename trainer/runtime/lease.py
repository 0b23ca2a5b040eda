"""Leases, which keep two jobs out of one folder: a small file names the holder, which renews it while it works.

A job and its workers compare the token of the file before they write (`Lease.check`): a job that was killed may have
workers that live on for seconds, and a job that was stopped does not know yet that another one has taken over.
"""

import contextlib
import json
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.runtime import storage
from trainer.runtime.errors import InputError, JobError, LeaseLostError
from trainer.runtime.processes import ProcessId, is_gone, this_process
from trainer.runtime.signals import interrupt_main

_RENEW_SECONDS = 15.0
# Longer than a renewal, the two minutes for which a storage may not answer, and the difference between two clocks.
_EXPIRE_SECONDS = 150.0
# Longer than another job takes between reading the holder and writing itself as the holder.
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Lease:
    """A lease that this job holds; its workers get a copy."""

    uri: str
    what: str
    """Name of what the lease protects, for messages."""
    token: str
    """Unique to this holder."""

    def check(self) -> None:
        """Check that this holder still has the lease.

        A check is not a lock: a write that began before another job took over may finish afterwards. Where that is not
        enough, write to a name that no other holder uses.

        Raises:
            LeaseLostError: another job has the lease, or none has.
        """
        holder = _read_holder(self.uri)
        if holder is None or holder["token"] != self.token:
            raise LeaseLostError(_describe_loss(self.what, holder))


@contextlib.contextmanager
def hold_lease(uri: str, what: str, *, wait: bool = False) -> Iterator[Lease]:
    """Hold the lease at ``uri`` during the context.

    A lease whose holder died is taken over: at once if the holder was a process of this machine, otherwise when it has
    not been renewed for two and a half minutes. If two jobs start at the same moment, a conditional write decides,
    where the storage supports it. Where it does not, and where two jobs take over at the same moment, each reads a
    second later which one wrote last, which decides unless the storage is slower than that.

    A job that was silent for so long that another one took over is interrupted as if by SIGTERM
    (`trainer.runtime.signals`). Partial files that a killed holder left in the folder are deleted.

    Args:
        uri: URI of the lease file.
        what: name of what the lease protects, for messages.
        wait: whether to wait until the lease expires, in case its holder is dead, instead of failing at once.

    Raises:
        InputError: another job holds it.
    """
    lease = Lease(uri, what, uuid.uuid4().hex)
    deadline = time.monotonic() + (_EXPIRE_SECONDS if wait else 0)
    while holder := _acquire(lease):
        if time.monotonic() > deadline:
            raise InputError(
                f"{what} is in use by process {holder['pid']} on {holder['host']}, last heard of "
                f"{time.time() - holder['renewed']:.0f} s ago; wait for its end, or {_EXPIRE_SECONDS:.0f} s if it died"
            )
        time.sleep(_SETTLE_SECONDS)
    storage.delete_partial_files(storage.parent(uri))
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(lease, released), daemon=True)
    renewer.start()
    try:
        yield lease
    finally:
        released.set()
        # If the storage does not answer, the lease expires.
        if not storage.is_local(uri):
            storage.ask_briefly()
        # On a slow storage, a renewal in flight could otherwise arrive after the deletion.
        renewer.join(_RENEW_SECONDS)
        with contextlib.suppress(InputError, JobError):
            lease.check()
            storage.delete_file(uri)


def _acquire(lease: Lease) -> dict[str, Any] | None:
    """Take the lease, or return its holder."""
    uri, content = lease.uri, _describe_holder(lease.token)
    if not storage.create_file(uri, content):
        holder = _read_holder(uri)
        # The holder is this job itself if the answer to its write was lost and the write was retried.
        if holder is not None and holder["token"] != lease.token and _is_alive(holder):
            return holder
        storage.write_bytes(uri, content)
        time.sleep(_SETTLE_SECONDS)
    elif not storage.refuses_to_create(uri, content):
        time.sleep(_SETTLE_SECONDS)
    try:
        lease.check()
    except LeaseLostError as error:
        raise InputError(
            f"{lease.what} was taken by another job that started at the same moment; wait for it to end"
        ) from error
    return None


def _describe_holder(token: str) -> bytes:
    process = this_process()
    holder = {
        "token": token,
        "host": platform.node(),
        "pid": process.pid,
        "namespace": process.namespace,
        "renewed": time.time(),
    }
    return json.dumps(holder).encode()


def _read_holder(uri: str) -> dict[str, Any] | None:
    """Return the holder of the lease, or None if there is none or the file cannot be read as one."""
    try:
        holder = json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, ValueError):
        # A power failure may leave an empty file, because it is not synced.
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= {"token", "host", "pid", "renewed"} else None


def _describe_loss(what: str, holder: dict[str, Any] | None) -> str:
    by = f"process {holder['pid']} on {holder['host']}" if holder else "nobody: its lease is gone"
    return f"{what} was taken over while nothing was heard of this job, by {by}"


def _is_alive(holder: dict[str, Any]) -> bool:
    if is_gone(ProcessId(holder["pid"], holder.get("namespace", ""))):
        return False
    # On this machine too: a restarted container has the host name and the process ids of the old one.
    return bool(time.time() - holder["renewed"] < _EXPIRE_SECONDS)


def _renew(lease: Lease, released: threading.Event) -> None:
    while not released.wait(_RENEW_SECONDS):
        try:
            lease.check()
            storage.write_bytes(lease.uri, _describe_holder(lease.token))
        except LeaseLostError as error:
            interrupt_main(str(error))
            return
        except (InputError, JobError):
            # The storage may answer again before the lease expires.
            continue
