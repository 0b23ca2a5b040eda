import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import isolation
from data_prep.decode import ImageOptions
from data_prep.formats import RejectedImageError
from trainer.runtime.errors import InputError

OPTIONS = ImageOptions(image_size=4)


@pytest.fixture(autouse=True, scope="module")
def end_the_decoder():
    yield
    pool = isolation._decoder_process()
    pool.stop()
    pool.join()
    isolation._decoder_process.cache_clear()


def decode_or_misbehave(content: bytes, options: ImageOptions) -> np.ndarray:
    """Run in the decoder's process: does what the content says."""
    match content:
        case b"crash":
            os._exit(1)
        case b"hang":
            threading.Event().wait()
        case b"reject":
            raise RejectedImageError("unsupported")
    return np.full((4, 4, 1), content[0], np.uint8)


def decode_as_guarded(contents: list[bytes], marker: Path, decode: isolation.Decode) -> list:
    calls = [contents[:2], contents[2:]]
    return [outcome for of_call in isolation.decode_guarded(calls, OPTIONS, marker, decode) for outcome in of_call]


def as_text(outcomes: list) -> list[str]:
    return [outcome if isinstance(outcome, str) else bytes(outcome[0, 0]).decode() for outcome in outcomes]


def test_real_images_are_decoded_in_order_and_bad_ones_have_their_reason():
    contents = []
    for value in range(40):
        sink = io.BytesIO()
        Image.new("L", (9, 9), value).save(sink, "PNG")
        contents.append(sink.getvalue())
    contents[11], contents[30] = b"", b"<html>"
    outcomes = isolation.decode_isolated(contents, OPTIONS)
    assert outcomes[11] == "empty"
    assert outcomes[30] == "not_an_image"
    assert all((outcome == value).all() for value, outcome in enumerate(outcomes) if value not in (11, 30))


def test_a_crash_costs_only_the_image_that_made_it():
    contents = [b"a", b"crash", b"b", b"reject", *[b"c"] * 20, b"crash", b"d"]
    outcomes = isolation.decode_isolated(contents, OPTIONS, decode_or_misbehave)
    assert as_text(outcomes) == ["a", "decoder_crashed", "b", "unsupported", *"c" * 20, "decoder_crashed", "d"]


def test_a_hang_costs_only_the_image_that_made_it(monkeypatch):
    isolation.decode_isolated([b"a"], OPTIONS, decode_or_misbehave)
    monkeypatch.setattr(isolation, "_CALL_TIMEOUT_SECONDS", 2)
    outcomes = isolation.decode_isolated([b"a", b"hang", b"b"], OPTIONS, decode_or_misbehave)
    assert as_text(outcomes) == ["a", "decoder_hung", "b"]


def test_another_preparation_of_the_same_images_may_end_first(tmp_path):
    marker = tmp_path / "marker"

    def decode_while_another_ends(content: bytes, options: ImageOptions) -> np.ndarray:
        marker.unlink(missing_ok=True)
        return np.full((4, 4, 1), content[0], np.uint8)

    assert as_text(decode_as_guarded([b"a", b"b", b"c"], marker, decode_while_another_ends)) == ["a", "b", "c"]


def test_after_a_death_all_is_decoded_in_another_process(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    outcomes = decode_as_guarded([b"a", b"crash", b"b"], marker, decode_or_misbehave)
    assert as_text(outcomes) == ["a", "decoder_crashed", "b"]
    assert not marker.exists()


def test_an_error_in_reading_is_no_death(tmp_path):
    def read() -> Iterator[list[bytes]]:
        yield [b"a"]
        raise InputError("away")

    guarded = isolation.decode_guarded(read(), OPTIONS, tmp_path / "marker", decode_or_misbehave)
    next(guarded)
    assert (tmp_path / "marker").exists()
    with pytest.raises(InputError, match="away"):
        next(guarded)
    assert not (tmp_path / "marker").exists()


def test_no_images_give_no_outcomes():
    assert isolation.decode_isolated([], OPTIONS) == []
