"""Keeps two jobs out of one folder: a small file that says who works there, and is renewed as long as they do.

Its token is what a job and its workers look at before they write (`Lease.check`): a job that was killed may have
workers that live on for seconds, and one that stood still does not know yet that another one has taken over.
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
# Longer than that, the two minutes for which a storage may be away, and what the clocks of two machines differ by.
_EXPIRE_SECONDS = 150.0
# Longer than another job takes from reading who held the lease to writing itself down.
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Lease:
    """A lease as its holder has it, and as the holder's workers are told of it."""

    uri: str
    what: str
    """What is worked on, for the message."""
    token: str
    """Of this holder alone."""

    def check(self) -> None:
        """Raise unless the lease is still this holder's.

        A check is no lock: a write that was begun before another job took over may end afterwards. Whoever needs more
        gives what it writes a name that no other holder uses.

        Raises:
            LeaseLostError: another job has it, or nobody.
        """
        holder = _read_holder(self.uri)
        if holder is None or holder["token"] != self.token:
            raise LeaseLostError(_describe_loss(self.what, holder))


@contextlib.contextmanager
def hold_lease(uri: str, what: str, *, wait: bool = False) -> Iterator[Lease]:
    """Hold the file at ``uri`` for the time of the context.

    A lease whose holder died is taken over: at once if it was a process of this machine, else when it has not been
    renewed for two and a half minutes. Two jobs that start at the same moment are told apart by a conditional write
    where the storage has one. Where it has not, and where two take over at the same moment, each reads back a second
    later who wrote last, which tells them apart unless the storage is slower.

    A job that was silent for so long that another one took over is interrupted as by SIGTERM
    (`trainer.runtime.signals`). What a killed holder had begun to write in the folder of the file is deleted.

    Args:
        uri: of the file.
        what: is worked on, for the message.
        wait: for a holder of which nothing is heard any more, in place of an error at once.

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
        # Where the storage is away, the lease expires.
        if not storage.is_local(uri):
            storage.ask_briefly()
        # A renewal on its way to a slow one would otherwise come after the deletion.
        renewer.join(_RENEW_SECONDS)
        with contextlib.suppress(InputError, JobError):
            lease.check()
            storage.delete_file(uri)


def _acquire(lease: Lease) -> dict[str, Any] | None:
    """Take the lease, or return who holds it."""
    uri, content = lease.uri, _describe_holder(lease.token)
    if not storage.create_file(uri, content):
        holder = _read_holder(uri)
        # It is this job itself where the answer to its write was lost, and the write was tried again.
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
    """Return who holds the lease, or None where nobody does or nobody can be made out."""
    try:
        holder = json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, ValueError):
        # A loss of power may leave an empty file: it is not synced.
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= {"token", "host", "pid", "renewed"} else None


def _describe_loss(what: str, holder: dict[str, Any] | None) -> str:
    by = f"process {holder['pid']} on {holder['host']}" if holder else "nobody: its lease is gone"
    return f"{what} was taken over while nothing was heard of this job, by {by}"


def _is_alive(holder: dict[str, Any]) -> bool:
    if is_gone(ProcessId(holder["pid"], holder.get("namespace", ""))):
        return False
    # Of this machine too: a container that was started again has the host name and the process numbers of the old one.
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
            # A storage that does not answer now may do so before the lease expires.
            continue
