"""An image that makes the decoder crash or hang costs that image, not the run.

Images are decoded in the task's own process, which is fast. Where it dies or hangs, Ray starts the task again, and a
marker that the first attempt left behind tells the second one to decode in a process apart.
"""

import faulthandler
import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from data_prep.decode import ImageOptions, Pixels, decode_image
from data_prep.formats import RejectedImageError, RejectReason
from data_prep.values import ValueRange

# Images that share a call and its time; one bad image costs these a second try.
_IMAGES_PER_CALL = 16
_CALL_TIMEOUT_SECONDS = 60

Decode = Callable[[bytes, ImageOptions], Pixels | ValueRange]
Outcome = Pixels | ValueRange | RejectReason


def decode_guarded(
    contents: Sequence[bytes], options: ImageOptions, marker: Path, decode: Decode = decode_image
) -> list[Outcome]:
    """Return what the decoder makes of each image, or the reason why it cannot be used.

    Ends this process if an image takes longer than a minute.

    Args:
        contents: the bytes of each file.
        options: of `decode_image`.
        marker: a file on this machine that stands for these contents; there while they are being decoded.
        decode: what decodes one image.
    """
    if marker.exists():
        outcomes = decode_isolated(contents, options, decode)
    else:
        marker.touch()
        outcomes = []
        try:
            for call in _calls(contents):
                faulthandler.dump_traceback_later(_CALL_TIMEOUT_SECONDS, exit=True)
                outcomes += _decode_all(call, options, decode)
        finally:
            faulthandler.cancel_dump_traceback_later()
    # Another preparation of the same source on this machine may have been the first to end.
    marker.unlink(missing_ok=True)
    return outcomes


def decode_isolated(contents: Sequence[bytes], options: ImageOptions, decode: Decode = decode_image) -> list[Outcome]:
    """Does the same in a process apart, which may crash or hang.

    Args:
        contents: the bytes of each file.
        options: of `decode_image`.
        decode: what decodes one image; importable in the other process by name.
    """
    calls = _calls(contents)
    futures = [_submit(call, options, decode) for call in calls]
    outcomes: list[Outcome] = []
    for call, future in zip(calls, futures, strict=True):
        try:
            outcomes += future.result()
        except (FutureTimeoutError, ProcessExpired):
            outcomes += [_decode_alone(content, options, decode) for content in call]
    return outcomes


def _calls(contents: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [contents[start : start + _IMAGES_PER_CALL] for start in range(0, len(contents), _IMAGES_PER_CALL)]


def _decode_alone(content: bytes, options: ImageOptions, decode: Decode) -> Outcome:
    try:
        outcomes: list[Outcome] = _submit([content], options, decode).result()
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


def _decode_all(contents: Sequence[bytes], options: ImageOptions, decode: Decode) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for content in contents:
        try:
            outcomes.append(decode(content, options))
        except RejectedImageError as error:
            outcomes.append(error.reason)
    return outcomes
