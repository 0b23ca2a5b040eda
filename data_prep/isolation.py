"""Guard against images that make the decoder crash or hang: only such an image is lost, not the job.

Images are decoded in the task's own process, which is fast. If it crashes or hangs, Ray starts the task again. A marker
file that the first attempt left behind tells the second attempt to decode in a separate process.
"""

import faulthandler
import functools
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from data_prep.decode import ImageOptions, Pixels, decode_image
from data_prep.formats import RejectedImageError, RejectReason
from data_prep.values import ValueRange

# Images decoded in one call, with one timeout; after a bad image, the others of its call are decoded again.
IMAGES_PER_CALL = 16
_CALL_TIMEOUT_SECONDS = 60

Decode = Callable[[bytes, ImageOptions], Pixels | ValueRange]
Outcome = Pixels | ValueRange | RejectReason


def decode_guarded(
    calls: Iterable[Sequence[bytes]], options: ImageOptions, marker: Path, decode: Decode = decode_image
) -> Generator[list[Outcome]]:
    """Yield what the images of each call decode to, or the reasons why they cannot be used.

    Exit this process if a call takes longer than a minute.

    Args:
        calls: the bytes of each file of each call, IMAGES_PER_CALL of them at most.
        options: how to decode.
        marker: path of a file on this machine that exists while these calls are being decoded.
        decode: function that decodes one image.
    """
    decode_call = decode_isolated if marker.exists() else _decode_watched
    marker.touch()
    try:
        for call in calls:
            yield decode_call(call, options, decode)
    finally:
        # Only a process that died leaves it. Another preparation of the source on this machine may have deleted it.
        marker.unlink(missing_ok=True)


def _decode_watched(contents: Sequence[bytes], options: ImageOptions, decode: Decode) -> list[Outcome]:
    faulthandler.dump_traceback_later(_CALL_TIMEOUT_SECONDS, exit=True)
    try:
        return _decode_all(contents, options, decode)
    finally:
        faulthandler.cancel_dump_traceback_later()


def decode_isolated(contents: Sequence[bytes], options: ImageOptions, decode: Decode = decode_image) -> list[Outcome]:
    """Do the same for one call in a separate process, which may crash or hang.

    Args:
        contents: the bytes of each file.
        options: how to decode.
        decode: function that decodes one image; the other process must be able to import it.
    """
    try:
        outcomes: list[Outcome] = _submit(contents, options, decode).result()
    except (FutureTimeoutError, ProcessExpired):
        return [_decode_alone(content, options, decode) for content in contents]
    return outcomes


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
    """Return the one decoder process of this process; it is restarted whenever it crashes or times out.

    It is spawned, not forked: a fork of a process with threads, such as a Ray worker, can hang.
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
