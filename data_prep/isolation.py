"""Decodes in a process of its own: an image that makes the decoder crash or hang costs that image, not the run."""

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from data_prep.decode import ImageOptions, Pixels, RejectedImageError, RejectReason, decode_image

# Images that share a call, so that what a call costs is little to each; one bad image costs these a second try.
_IMAGES_PER_CALL = 16
_CALL_TIMEOUT_SECONDS = 60

Decode = Callable[[bytes, ImageOptions], Pixels]


def decode_isolated(
    contents: Sequence[bytes], options: ImageOptions, decode: Decode = decode_image
) -> list[Pixels | RejectReason]:
    """Returns the pixels of each image, or the reason why it cannot be used.

    Args:
        contents: the bytes of each file.
        options: of `decode_image`.
        decode: what runs in the other process; importable there by name.
    """
    calls = [contents[start : start + _IMAGES_PER_CALL] for start in range(0, len(contents), _IMAGES_PER_CALL)]
    futures = [_submit(call, options, decode) for call in calls]
    outcomes: list[Pixels | RejectReason] = []
    for call, future in zip(calls, futures, strict=True):
        try:
            outcomes += future.result()
        except (FutureTimeoutError, ProcessExpired):
            outcomes += [_decode_alone(content, options, decode) for content in call]
    return outcomes


def _decode_alone(content: bytes, options: ImageOptions, decode: Decode) -> Pixels | RejectReason:
    try:
        outcomes: list[Pixels | RejectReason] = _submit([content], options, decode).result()
    except FutureTimeoutError:
        return "decoder_hung"
    except ProcessExpired:
        return "decoder_crashed"
    return outcomes[0]


def _submit(contents: Sequence[bytes], options: ImageOptions, decode: Decode) -> Any:
    return _decoder_process().schedule(_decode_all, args=(contents, options, decode), timeout=_CALL_TIMEOUT_SECONDS)


@functools.cache
def _decoder_process() -> ProcessPool:
    """Returns this process's one decoder; it is started again whenever it dies or has to be stopped.

    Spawned, not forked: a fork of a process with threads, such as a Ray worker, can hang.
    """
    return ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn"))


def _decode_all(contents: Sequence[bytes], options: ImageOptions, decode: Decode) -> list[Pixels | RejectReason]:
    outcomes: list[Pixels | RejectReason] = []
    for content in contents:
        try:
            outcomes.append(decode(content, options))
        except RejectedImageError as error:
            outcomes.append(error.reason)
    return outcomes
