"""The cluster that RAY_ADDRESS names, checked before Ray connects: Ray would retry for minutes and ignore signals."""

import os
import re
import time
from typing import Any

from trainer.runtime import compat
from trainer.runtime.errors import InputError

_ALONE = "or unset RAY_ADDRESS to work on this machine alone"
_FORM = "give the address of the head, HOST:PORT (Ray's default port is 6379)"
_TOKEN = "set RAY_AUTH_MODE=token and give the cluster's ~/.ray/auth_token"
_POLL_SECONDS = 0.2


def find_cluster(*, timeout_seconds: float = 5.0) -> str | None:
    """Return the address of the cluster that RAY_ADDRESS names, HOST:PORT, or None for this machine alone.

    RAY_ADDRESS has one of Ray's forms: HOST:PORT with a name, an IPv4 address or an IPv6 address in brackets; ``auto``
    for the cluster that ``ray start`` started last on this machine; ``local`` or empty for none.

    Args:
        timeout_seconds: how long to wait for an answer.

    Raises:
        InputError: a job cannot work there: the form is invalid, no head of a cluster answers, it runs another version
            of Ray or refuses the token, or this machine is not part of the cluster.
    """
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given in ("", "local"):
        return None
    address = _find_running() if given == "auto" else _parse(given)
    try:
        _look_at(address, timeout_seconds)
        if (known := compat.replace_local_name(address)) != address:
            _look_at(known, timeout_seconds)
    except _UnusableError as error:
        named = f"auto ({address})" if given == "auto" else given
        raise InputError(f"RAY_ADDRESS {named}: {error}") from error
    return address


class _UnusableError(Exception):
    """A cluster cannot be used; the message says why and what to do."""


def _parse(given: str) -> str:
    """Check that an address has the form HOST:PORT, and return it."""
    scheme, separator, rest = given.partition("://")
    if separator and scheme in ("http", "https"):
        raise InputError(
            f"RAY_ADDRESS {given} is the address of a job server: send the job there "
            f"(RAY_API_SERVER_ADDRESS={given} ray job submit -- python jobs/...), {_ALONE}"
        )
    if separator and scheme == "ray":
        raise InputError(
            f"RAY_ADDRESS {given} is the address of a Ray Client server, but a job runs inside its cluster: send it "
            f"there (RAY_API_SERVER_ADDRESS=http://{rest.rpartition(':')[0] or rest}:8265 ray job submit -- python "
            f"jobs/...), {_ALONE}"
        )
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/@\[\]]+):(\d{1,5})", given)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise InputError(
            f"RAY_ADDRESS {given!r} is not an address: {_FORM}, an IPv6 address in brackets, or auto; {_ALONE}"
        )
    return given


def _find_running() -> str:
    # Not any cluster that runs on this machine, as ray.init would take: it may be that of another job.
    address = compat.find_running_cluster()
    if address is None:
        raise InputError(
            f"RAY_ADDRESS auto: no cluster was started on this machine; start one (ray start --head), {_FORM}, {_ALONE}"
        )
    # ray.init does this for the form "auto" only.
    compat.use_token_if_available()
    return address


def _look_at(address: str, timeout_seconds: float) -> None:
    """Check that `ray.init` can connect to a cluster; raise _UnusableError otherwise."""
    # Not at the top: a job without a cluster saves the time.
    import grpc
    import ray

    with compat.open_head(address) as head:
        try:
            version = head.read_version(timeout_seconds)
            if version != ray.__version__:
                raise _UnusableError(f"it has Ray {version}, this program {ray.__version__}; install the same version")
            _wait_for_node_here(head, timeout_seconds)
        except grpc.RpcError as error:
            raise _UnusableError(_explain(error.code(), error.details() or "", timeout_seconds)) from error


def _wait_for_node_here(head: compat.Head, timeout_seconds: float) -> None:
    """Wait for a node of the cluster on this machine, which a job needs; `ray.init` itself would wait a minute."""
    deadline = time.monotonic() + timeout_seconds
    while not head.has_living_node(compat.find_local_nodes(), timeout_seconds):
        if time.monotonic() > deadline:
            raise _UnusableError(
                "no node of that cluster runs on this machine; start one here (ray start --address HOST:PORT), send "
                f"the job to the cluster (ray job submit), {_ALONE}"
            )
        time.sleep(_POLL_SECONDS)


def _explain(code: Any, details: str, timeout_seconds: float) -> str:
    """Return why there was no answer, or not the answer of a cluster, and what to do.

    Args:
        code: status code of gRPC.
        details: message of gRPC, which ends with the cause.
        timeout_seconds: how long the request waited.
    """
    import grpc

    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"it refuses the token; {_TOKEN}"
    if code == grpc.StatusCode.UNIMPLEMENTED or "parsing HTTP/2" in details:
        return (
            f"what answers there is not the head of a cluster, but a server such as Ray's dashboard; {_FORM}, {_ALONE}"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        reason = f"no answer within {timeout_seconds:g} s"
    else:
        reason = details.rpartition(": ")[2].rstrip("]") or code.name
    return f"{reason}; start Ray there, {_ALONE}"
