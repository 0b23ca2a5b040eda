"""Guard against images that make the decoder crash or hang: only such an image is lost, not the job.

Images are decoded in the task's own process, which is fast. If it crashes or hangs, Ray starts the task again. A marker
file that the first attempt left behind tells the second attempt to decode in a separate process.
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

# Images decoded in one call, with one timeout; after a bad image, the others of its call are decoded again.
_IMAGES_PER_CALL = 16
_CALL_TIMEOUT_SECONDS = 60

Decode = Callable[[bytes, ImageOptions], Pixels | ValueRange]
Outcome = Pixels | ValueRange | RejectReason


def decode_guarded(
    contents: Sequence[bytes], options: ImageOptions, marker: Path, decode: Decode = decode_image
) -> list[Outcome]:
    """Return what each image decodes to, or the reason why it cannot be used.

    Exit this process if a call takes longer than a minute.

    Args:
        contents: the bytes of each file.
        options: how to decode.
        marker: path of a file on this machine that exists while these contents are being decoded.
        decode: function that decodes one image.
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
    # Another preparation of the same source on this machine may have deleted it.
    marker.unlink(missing_ok=True)
    return outcomes


def decode_isolated(contents: Sequence[bytes], options: ImageOptions, decode: Decode = decode_image) -> list[Outcome]:
    """Do the same in a separate process, which may crash or hang.

    Args:
        contents: the bytes of each file.
        options: how to decode.
        decode: function that decodes one image; the other process must be able to import it.
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
