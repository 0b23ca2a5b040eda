import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training import shards
from trainer.training.shard_cache import ShardCache
from trainer.training.shards import CachedShards, MappedShards, open_pixels


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training-notes"


@pytest.fixture
def written(write_dataset):
    """Eight shards of three images."""
    return write_dataset(rows=(24, 0, 0))


NONE = np.array([], np.int32)


def map_shards(written) -> MappedShards:
    return MappedShards(written.uri, written.manifest.shards, written.manifest.image_shape)


def cache_shards(written, cache: ShardCache) -> CachedShards:
    return CachedShards(written.uri, written.manifest.shards, written.manifest.image_shape, cache)


def take(pixels, rows: list[int]) -> np.ndarray:
    numbers, out = np.array(rows, np.int32), np.empty((len(rows), *pixels.image_shape), np.uint8)
    pixels.take(numbers // 3, numbers % 3, out)
    return out


def damage(written, number: int) -> None:
    path = Path(written.uri, written.manifest.shards[number].path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_local_dataset_is_mapped_where_it_lies(written, cache_home):
    pixels = open_pixels(written.uri, written.manifest)
    rows = [5, 0, 23, 5, 11]
    np.testing.assert_array_equal(take(pixels, rows), written.images["train"][rows])
    mapped = Path("/proc/self/maps").read_text()
    # Only what is used.
    assert [f"{written.uri}/{written.manifest.shards[number].path}" in mapped for number in (7, 5)] == [True, False]
    assert not (cache_home / "shards").exists()


def test_a_damaged_shard_is_found_and_no_more_images_are_taken(written):
    damage(written, 6)
    pixels = map_shards(written)
    with pytest.raises(
        InputError, match=r"shards/00006.*arrow has sha256 .*, the manifest says .*damaged or was changed"
    ):
        pixels.finish_check()
    with pytest.raises(InputError, match="shards/00006"):
        take(pixels, [0])


def test_shards_are_compared_with_their_checksums_once_unless_they_change(written, monkeypatch):
    hashed, hash_file = [], shards._hash_file
    monkeypatch.setattr(shards, "_hash_file", lambda path: hashed.append(path.name) or hash_file(path))

    def open_and_check() -> int:
        hashed.clear()
        map_shards(written).finish_check()
        return len(hashed)

    assert [open_and_check(), open_and_check()] == [8, 0]
    os.utime(Path(written.uri, written.manifest.shards[3].path), (5, 5))
    assert [open_and_check(), open_and_check()] == [8, 0]


def test_one_process_of_a_node_compares_them(written):
    damage(written, 6)
    first = map_shards(written)
    first._checker.join()
    with FileLock(f"{first._mark}.lock"):
        other = map_shards(written)
        other.finish_check()
        take(other, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "not found, though the manifest names it"),
        (lambda path: path.write_bytes(b"short"), r"has 5 bytes, the manifest says \d+;"),
    ],
)
def test_a_shard_that_is_missing_or_of_another_size_is_refused_at_once(written, change, message):
    change(Path(written.uri, written.manifest.shards[2].path))
    with pytest.raises(InputError, match=message):
        map_shards(written)


class CountingCache(ShardCache):
    """Counts what is opened, in order."""

    def __init__(self, written, shards: float) -> None:
        super().__init__(shards * written.manifest.shards[0].bytes / 2**30)
        self.opened = []

    def open(self, uri, shard):
        self.opened.append(int(storage.basename(uri)[:5]))
        return super().open(uri, shard)


def finish(pixels: CachedShards) -> None:
    for future in pixels._opened.values():
        future.result()


def test_shards_of_a_bucket_are_fetched_ahead_in_the_order_of_their_use_as_far_as_the_cache_goes(written):
    cache = CountingCache(written, 3.5)
    pixels = cache_shards(written, cache)
    order = [row for shard in (4, 1, 6, 0, 2) for row in (3 * shard, 3 * shard + 2)]
    pixels.expect(np.array(order, np.int32) // 3, NONE)
    finish(pixels)
    assert sorted(cache.opened) == [1, 4, 6]
    for start, fetched in ((0, [1, 4, 6]), (1, [0, 1, 4, 6]), (2, [0, 1, 4, 6]), (3, [0, 1, 2, 4, 6])):
        np.testing.assert_array_equal(
            take(pixels, order[start : start + 1]), written.images["train"][order[start : start + 1]]
        )
        finish(pixels)
        assert sorted(cache.opened) == fetched
    np.testing.assert_array_equal(take(pixels, order[4:]), written.images["train"][order[4:]])
    assert not pixels._opened
    assert len(cache.opened) == 5


def test_a_batch_that_needs_more_than_the_cache_is_taken_all_the_same(written):
    pixels = cache_shards(written, CountingCache(written, 2))
    rows = list(range(0, 24, 3))
    np.testing.assert_array_equal(take(pixels, rows), written.images["train"][rows])
    pixels.expect(np.array(rows, np.int32) // 3, NONE)
    np.testing.assert_array_equal(take(pixels, rows), written.images["train"][rows])


def test_what_follows_is_fetched_when_the_last_of_the_order_is_in_use(written):
    """The first images of an epoch are there when it begins."""
    cache = CountingCache(written, 2.5)
    pixels = cache_shards(written, cache)
    first, second = np.array([0, 1, 2], np.int32), np.array([2, 3, 4], np.int32)
    pixels.expect(first, second)
    for shard, opened in ((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1, 2, 2, 3])):
        take(pixels, [3 * shard])
        finish(pixels)
        # The shard 2 is in use, so it is opened again for the next order, and 4 has no room beside 2 and 3.
        assert cache.opened == opened
    pixels.expect(second, NONE)
    np.testing.assert_array_equal(take(pixels, [6, 9]), written.images["train"][[6, 9]])
    finish(pixels)
    assert cache.opened == [0, 1, 2, 2, 3, 4]


def test_an_order_that_is_given_up_leaves_nothing_open(written):
    pixels = cache_shards(written, CountingCache(written, 3.5))
    pixels.expect(np.array([0, 1, 2, 3], np.int32), NONE)
    finish(pixels)
    pixels.expect(np.array([2, 5], np.int32), NONE)
    assert sorted(pixels._opened) == [2, 5]
    pixels.expect(NONE, NONE)
    assert not pixels._opened


@pytest.mark.parametrize(
    ("shards", "window", "is_enough"), [(8.1, 8, True), (7, 8, False), (7, 3, True), (5, 3, False)]
)
def test_a_cache_that_holds_neither_the_dataset_nor_two_windows_is_refused(written, shards, window, is_enough):
    pixels = cache_shards(written, CountingCache(written, shards))
    window *= written.manifest.shards[0].bytes
    if is_enough:
        pixels.check_window(window)
        return
    with pytest.raises(InputError, match=r"cache of this node may take .* --cache-gib .*--shuffle-window-gib"):
        pixels.check_window(window)


def test_a_damaged_shard_of_a_bucket_is_refused_when_it_is_fetched(written):
    damage(written, 1)
    pixels = cache_shards(written, CountingCache(written, 8))
    pixels.expect(np.array([0, 1], np.int32), NONE)
    np.testing.assert_array_equal(take(pixels, [0]), written.images["train"][:1])
    with pytest.raises(InputError, match=r"shards/00001.*has sha256"):
        take(pixels, [3])
