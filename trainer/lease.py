"""Keeps two jobs out of one folder: a small file that says who works there, and is renewed as long as they do."""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from trainer import storage
from trainer.errors import InputError, JobError

_RENEW_SECONDS = 15.0
# Longer than the clocks of two machines and a slow object store can differ from that.
_EXPIRE_SECONDS = 90.0
# Longer than another job takes from reading who held the lease to writing itself down.
_SETTLE_SECONDS = 1.0


@contextlib.contextmanager
def hold_lease(uri: str, what: str) -> Iterator[None]:
    """Holds the file at ``uri`` for the time of the context.

    A lease whose holder died is taken over: at once if it was a process of this machine, else when it has not been
    renewed for a minute and a half. Two jobs that start at the same moment are told apart by a conditional write where
    the storage has one; where it has not, by reading back who wrote last. Two that take over at the same moment read
    that back a second later, which tells them apart unless the storage is slower.

    Args:
        uri: of the file.
        what: is worked on, for the message.

    Raises:
        InputError: another job holds it.
    """
    token = uuid.uuid4().hex
    _acquire(uri, what, token)
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(uri, token, released), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        released.set()
        renewer.join()
        if _holds(uri, token):
            storage.delete_file(uri)


def _acquire(uri: str, what: str, token: str) -> None:
    if not storage.create_file(uri, _describe_holder(token)):
        holder = _read_holder(uri)
        if holder is not None and _is_alive(holder):
            raise InputError(
                f"{what} is in use by process {holder['pid']} on {holder['host']}, last heard of "
                f"{time.time() - holder['renewed']:.0f} s ago; wait for its end, or {_EXPIRE_SECONDS:.0f} s if it died"
            )
        storage.write_bytes(uri, _describe_holder(token))
        time.sleep(_SETTLE_SECONDS)
    if not _holds(uri, token):
        raise InputError(f"{what} was taken by another job that started at the same moment; wait for it to end")


def _describe_holder(token: str) -> bytes:
    holder = {"token": token, "host": platform.node(), "pid": os.getpid(), "renewed": time.time()}
    return json.dumps(holder).encode()


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
    if holder["host"] == platform.node() and not os.path.exists(f"/proc/{holder['pid']}"):
        return False
    # Of this machine too: a container that was started again has the host name and the process numbers of the old one.
    return bool(time.time() - holder["renewed"] < _EXPIRE_SECONDS)


def _renew(uri: str, token: str, released: threading.Event) -> None:
    while not released.wait(_RENEW_SECONDS):
        # A storage that does not answer now may do so before the lease expires.
        with contextlib.suppress(InputError, JobError):
            # A job that was stopped for so long that another one took over must not take the lease back.
            if not _holds(uri, token):
                return
            storage.write_bytes(uri, _describe_holder(token))
