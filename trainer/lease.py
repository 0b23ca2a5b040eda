"""Keeps two jobs out of one folder: a small file that says who works there, and is renewed as long as they do."""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.errors import InputError, JobError
from trainer.signals import interrupt_main

_RENEW_SECONDS = 15.0
# Longer than that, the two minutes for which a storage may be away, and what the clocks of two machines differ by.
_EXPIRE_SECONDS = 150.0
# Longer than another job takes from reading who held the lease to writing itself down.
_SETTLE_SECONDS = 1.0


@contextlib.contextmanager
def hold_lease(uri: str, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the file at ``uri`` for the time of the context.

    A lease whose holder died is taken over: at once if it was a process of this machine, else when it has not been
    renewed for two and a half minutes. Two jobs that start at the same moment are told apart by a conditional write
    where the storage has one. Where it has not, and where two take over at the same moment, each reads back a second
    later who wrote last, which tells them apart unless the storage is slower.

    A job that was silent for so long that another one took over is interrupted as by SIGTERM (`trainer.signals`). What
    a killed holder had begun to write in the folder of the file is deleted.

    Args:
        uri: of the file.
        what: is worked on, for the message.
        wait: for a holder of which nothing is heard any more, in place of an error at once.

    Raises:
        InputError: another job holds it.
    """
    token = uuid.uuid4().hex
    deadline = time.monotonic() + (_EXPIRE_SECONDS if wait else 0)
    while holder := _acquire(uri, what, token):
        if time.monotonic() > deadline:
            raise InputError(
                f"{what} is in use by process {holder['pid']} on {holder['host']}, last heard of "
                f"{time.time() - holder['renewed']:.0f} s ago; wait for its end, or {_EXPIRE_SECONDS:.0f} s if it died"
            )
        time.sleep(_SETTLE_SECONDS)
    storage.delete_partial_files(storage.parent(uri))
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(uri, what, token, released), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        released.set()
        # Where the storage is away, the lease expires.
        if not storage.is_local(uri):
            storage.ask_briefly()
        # A renewal on its way to a slow one would otherwise come after the deletion.
        renewer.join(_RENEW_SECONDS)
        with contextlib.suppress(InputError, JobError):
            if _holds(uri, token):
                storage.delete_file(uri)


def _acquire(uri: str, what: str, token: str) -> dict[str, Any] | None:
    """Takes the lease, or returns who holds it."""
    content = _describe_holder(token)
    if not storage.create_file(uri, content):
        holder = _read_holder(uri)
        # It is this job itself where the answer to its write was lost, and the write was tried again.
        if holder is not None and holder["token"] != token and _is_alive(holder):
            return holder
        storage.write_bytes(uri, content)
        time.sleep(_SETTLE_SECONDS)
    elif not storage.refuses_to_create(uri, content):
        time.sleep(_SETTLE_SECONDS)
    if not _holds(uri, token):
        raise InputError(f"{what} was taken by another job that started at the same moment; wait for it to end")
    return None


def _describe_holder(token: str) -> bytes:
    holder = {
        "token": token,
        "host": platform.node(),
        "pid": os.getpid(),
        "namespace": _process_namespace(),
        "renewed": time.time(),
    }
    return json.dumps(holder).encode()


def _process_namespace() -> str:
    """Returns what two processes have in common of which one can tell whether the other is alive."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _read_holder(uri: str) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    return holder


def _holds(uri: str, token: str) -> bool:
    holder = _read_holder(uri)
    return holder is not None and holder["token"] == token


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder.get("namespace") == _process_namespace() and not os.path.exists(f"/proc/{holder['pid']}"):
        return False
    # Of this machine too: a container that was started again has the host name and the process numbers of the old one.
    return bool(time.time() - holder["renewed"] < _EXPIRE_SECONDS)


def _renew(uri: str, what: str, token: str, released: threading.Event) -> None:
    while not released.wait(_RENEW_SECONDS):
        # A storage that does not answer now may do so before the lease expires.
        with contextlib.suppress(InputError, JobError):
            holder = _read_holder(uri)
            if holder is None or holder["token"] != token:
                by = f"process {holder['pid']} on {holder['host']}" if holder else "nobody: its lease was deleted"
                interrupt_main(f"{what} was taken over while nothing was heard of this job, by {by}")
                return
            storage.write_bytes(uri, _describe_holder(token))
