import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from trainer.runtime import storage
from trainer.runtime.errors import InputError, JobError
from trainer.training import shard_cache
from trainer.training.shard_cache import ShardCache

# Of shards with three images of 40x40 pixels: Arrow adds a few hundred bytes.
IMAGE_SIZE = 40


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training-notes" / "shards"


@pytest.fixture
def written(write_dataset):
    return write_dataset(rows=(12, 0, 0), image_size=IMAGE_SIZE)


def open_shard(cache: ShardCache, written, number: int) -> np.ndarray:
    shard = written.manifest.shards[number]
    return np.concatenate(cache.open(storage.join(written.uri, shard.path), shard))


def names(folder: Path) -> set[str]:
    return {path.stem[:12] for path in folder.glob("*.arrow")}


def digests(written, *numbers: int) -> set[str]:
    return {written.manifest.shards[number].sha256[:12] for number in numbers}


def limit_of(written, shards: float) -> float:
    return shards * written.manifest.shards[0].bytes / 2**30


def test_a_shard_is_downloaded_once_and_mapped(written, folder):
    cache = ShardCache()
    np.testing.assert_array_equal(open_shard(cache, written, 1), written.images["train"][3:6])
    storage.delete_file(storage.join(written.uri, written.manifest.shards[1].path))
    np.testing.assert_array_equal(open_shard(ShardCache(), written, 1), written.images["train"][3:6])
    assert names(folder) == digests(written, 1)
    shard = written.manifest.shards[1].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(InputError, match="not found, though the manifest names it"):
        cache.open(storage.join(written.uri, shard.path), shard)


def test_the_shards_that_were_used_longest_ago_make_room(written, folder):
    cache = ShardCache(limit_of(written, 3.5))
    for number in (0, 1, 2):
        open_shard(cache, written, number)
    # Clocks of file systems are coarse.
    for age, number in enumerate((1, 0, 2)):
        path = next(folder.glob(f"{written.manifest.shards[number].sha256}.arrow"))
        os.utime(path, (1000 + age, 1000 + age))
    held = open_shard(cache, written, 1)
    open_shard(cache, written, 3)
    assert names(folder) == digests(written, 1, 2, 3)
    # What was mapped stays readable after it was deleted.
    for path in folder.glob("*.arrow"):
        path.unlink()
    np.testing.assert_array_equal(held, written.images["train"][3:6])
    np.testing.assert_array_equal(open_shard(cache, written, 1), held)


def test_downloads_at_the_same_time_make_room_for_each_other(written, folder, monkeypatch):
    cache, both_have_room = ShardCache(limit_of(written, 2.5)), threading.Barrier(2)
    for number in (0, 1):
        open_shard(cache, written, number)
    read_bytes = storage.read_bytes

    def read(uri: str, start: int, length: int) -> bytes:
        both_have_room.wait(10)
        return read_bytes(uri, start, length)

    monkeypatch.setattr(storage, "read_bytes", read)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda number: open_shard(cache, written, number), (2, 3)))
    np.testing.assert_array_equal(np.concatenate(found), written.images["train"][6:])
    assert names(folder) == digests(written, 2, 3)


def test_a_limit_below_one_shard_holds_that_shard(written, folder):
    cache = ShardCache(limit_of(written, 0.5))
    for number in range(4):
        open_shard(cache, written, number)
    assert names(folder) == digests(written, 3)


def test_a_download_makes_room_of_those_that_were_given_up_and_leaves_those_that_go_on(written, folder):
    cache = ShardCache(limit_of(written, 1.5))
    going, given_up = (folder / f".{name}.arrow.{'0' * 32}.partial" for name in ("going", "given_up"))
    for path in (going, given_up):
        path.write_bytes(bytes(written.manifest.shards[0].bytes))
    os.utime(given_up, (1000, 1000))
    open_shard(cache, written, 0)
    assert (going.exists(), given_up.exists()) == (True, False)


def test_without_a_limit_it_is_half_of_the_free_space(written, monkeypatch):
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert ShardCache().limit == 500
    open_shard(ShardCache(), written, 0)
    assert ShardCache().limit == (1000 + written.manifest.shards[0].bytes) // 2


def test_a_damaged_shard_is_refused_and_not_kept(written, folder):
    uri = storage.join(written.uri, written.manifest.shards[0].path)
    content = storage.read_bytes(uri)
    storage.write_bytes(uri, content[:700] + bytes([content[700] ^ 1]) + content[701:])
    with pytest.raises(InputError, match=r"arrow has sha256 .*, the manifest says .*damaged or was changed"):
        open_shard(ShardCache(), written, 0)
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    storage.write_bytes(uri, content)
    np.testing.assert_array_equal(open_shard(ShardCache(), written, 0), written.images["train"][:3])


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(written, folder, monkeypatch):
    def fill_the_disk(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "replace", fill_the_disk)
        with pytest.raises(JobError, match="No space left on device; make room"):
            open_shard(ShardCache(), written, 0)
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    open_shard(ShardCache(), written, 0)


def test_workers_of_one_node_download_a_shard_once(written, monkeypatch):
    start, reads, opened, read = threading.Barrier(4), [], [], storage.read_bytes

    def count_reads(uri: str, *part: int) -> bytes:
        reads.append(uri)
        return read(uri, *part)

    def open_together() -> None:
        cache = ShardCache()
        start.wait()
        opened.append(open_shard(cache, written, 0))

    monkeypatch.setattr(storage, "read_bytes", count_reads)
    threads = [threading.Thread(target=open_together) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(reads)) == (4, 1)
    for images in opened:
        np.testing.assert_array_equal(images, written.images["train"][:3])
