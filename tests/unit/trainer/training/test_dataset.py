import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from data_prep.manifest import read_index
from data_prep.shards import write_shard
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training import dataset
from trainer.training.dataset import (
    BatchFeed,
    ImageSplit,
    KnownFiles,
    all_worker_rows,
    epoch_order,
    load_manifest,
    open_split,
    read_known_files,
    read_sources,
    worker_rows,
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def held(rows: int, rows_per_shard: int = 10) -> ImageSplit:
    """Returns a split without pixels, whose shards are of 1 KiB."""
    numbers = np.arange(rows, dtype=np.int32)
    sizes = np.full(-(-rows // rows_per_shard), 1024)
    pixels = SimpleNamespace(shard_bytes=sizes)
    return ImageSplit(numbers, numbers // rows_per_shard, numbers % rows_per_shard, pixels)


def test_an_epoch_visits_every_row_once():
    assert sorted(epoch_order(held(97), seed=0, epoch=1)) == list(range(97))


def test_each_epoch_and_seed_has_an_order_of_its_own():
    orders = {tuple(epoch_order(held(50), seed, epoch)) for seed in range(4) for epoch in range(1, 5)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_an_order_is_the_same_each_time_and_that_of_earlier_versions():
    np.testing.assert_array_equal(epoch_order(held(50), 1, 2), epoch_order(held(50), 1, 2))
    np.testing.assert_array_equal(epoch_order(held(50), 1, 2), np.random.default_rng([1, 2]).permutation(50))


def test_a_dataset_larger_than_the_window_is_shuffled_in_parts():
    split, gib = held(97), 2**30
    np.testing.assert_array_equal(epoch_order(split, 0, 1, 10 * 1024 / gib), epoch_order(split, 0, 1))
    windows = []
    for epoch in (1, 2, 3):
        order = epoch_order(split, 0, epoch, 3 * 1024 / gib)
        assert sorted(order) == list(range(97))
        np.testing.assert_array_equal(order, epoch_order(split, 0, epoch, 3 * 1024 / gib))
        shards = split.shards[order].tolist()
        first = {shard: shards.index(shard) for shard in set(shards)}
        in_turn = sorted(first, key=first.__getitem__)
        windows.append([sorted(in_turn[start : start + 3]) for start in range(0, 10, 3)])
        # Rows of the three shards are mixed, and all of them come before those of the next three.
        start = 0
        for window in windows[-1]:
            rows = sum(int((split.shards == shard).sum()) for shard in window)
            of_window = shards[start : start + rows]
            assert sorted(set(of_window)) == window
            assert len(window) == 1 or of_window != sorted(of_window, key=of_window.index)
            start += rows
    assert windows[0] != windows[1] != windows[2]


def test_a_part_is_no_larger_than_the_window():
    """Two of them fit into a cache of two windows: the one in use and the next one."""
    split, gib = held(97), 2**30
    shards = split.shards[epoch_order(split, 0, 1, 2.5 * 1024 / gib)].tolist()
    first, last = (
        {shard: find(shard) for shard in set(shards)} for find in (shards.index, lambda one: _last(shards, one))
    )
    for place in range(97):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= 2


def _last(values: list[int], value: int) -> int:
    return len(values) - 1 - values[::-1].index(value)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 6, 12])
def test_the_shares_of_all_workers_together_are_the_batch_of_one(num_workers):
    order = epoch_order(held(41), seed=0, epoch=1)
    for step in range(3):
        shares = [worker_rows(order, step, 12, rank, num_workers) for rank in range(num_workers)]
        assert {len(share) for share in shares} == {12 // num_workers}
        np.testing.assert_array_equal(np.concatenate(shares), order[step * 12 : (step + 1) * 12])
    for rank in range(num_workers):
        shares = [worker_rows(order, step, 12, rank, num_workers) for step in range(3)]
        np.testing.assert_array_equal(all_worker_rows(order, 3, 12, rank, num_workers), shares)
        # Fewer workers continue an epoch, of which less than their batch may be left.
        assert all_worker_rows(order[:5], 0, 12, rank, num_workers).shape == (0, 12 // num_workers)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_batches_come_in_order(count):
    assert list(BatchFeed().batches(lambda step: step * step, range(count))) == [step**2 for step in range(count)]


def test_batches_may_start_anywhere_and_skip():
    assert list(BatchFeed().batches(lambda step: step, range(3, 20, 4))) == [3, 7, 11, 15, 19]


def test_batches_are_made_ahead_by_another_thread_and_not_too_far():
    made = []
    batches = BatchFeed().batches(lambda step: made.append(threading.get_ident()) or step, range(10))
    assert next(batches) == 0
    assert next(batches) == 1
    batches.close()
    assert 2 <= len(made) <= 4
    assert threading.get_ident() not in made


def test_an_error_while_making_a_batch_reaches_its_user_in_its_turn():
    def make(step: int) -> int:
        if step == 3:
            raise ZeroDivisionError("step 3")
        return step

    received = []
    with pytest.raises(ZeroDivisionError, match="step 3"):
        received.extend(BatchFeed().batches(make, range(10)))
    assert received == [0, 1, 2]


def test_two_batches_are_moved_at_a_time_and_come_in_order():
    both, threads = threading.Barrier(2, timeout=30), set()

    def move(batch: int) -> int:
        threads.add(threading.get_ident())
        # One copy is asked for before the one before has ended.
        both.wait()
        return -batch

    made: list[int] = []
    feed = BatchFeed(move)
    assert list(feed.batches(lambda step: made.append(step) or step, range(10))) == [-step for step in range(10)]
    assert made == list(range(10))
    assert len(threads) == 2


def test_a_copy_to_the_device_is_no_waiting_for_images(monkeypatch):
    now, user_waits = [100.0], threading.Event()

    def read_clock() -> float:
        if threading.current_thread() is threading.main_thread():
            user_waits.set()
        return now[0]

    def move(batch: int) -> int:
        user_waits.wait()
        now[0] += 5
        return batch

    monkeypatch.setattr(dataset, "time", SimpleNamespace(perf_counter=read_clock))
    feed = BatchFeed(move)
    assert list(feed.batches(lambda step: step, range(1))) == [0]
    assert feed.wait_seconds == 0


def test_the_seconds_that_the_user_waits_are_counted(monkeypatch):
    user_waits, now = threading.Event(), [100.0]

    def read_clock() -> float:
        user_waits.set()
        return now[0]

    def make(step: int) -> None:
        user_waits.wait()
        now[0] += 5

    monkeypatch.setattr(dataset, "time", SimpleNamespace(perf_counter=read_clock))
    feed = BatchFeed()
    list(feed.batches(make, range(1)))
    assert feed.wait_seconds == 5


def test_the_manifest_of_a_dataset_is_read(write_dataset):
    written = write_dataset()
    assert load_manifest(written.uri) == written.manifest


def test_a_folder_without_a_committed_dataset_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"holds no prepared dataset.*run: python jobs/prepare.py SOURCE .*nothing"):
        load_manifest(str(tmp_path / "nothing"))


@pytest.mark.parametrize("file", ["cat/1.png", "1.png"])
def test_images_that_are_not_prepared_are_refused_with_the_command_that_prepares_them(tmp_path, file):
    path = tmp_path / "my images" / file
    path.parent.mkdir(parents=True)
    path.touch()
    source, target = f"'{tmp_path}/my images'", f"'{tmp_path}/my images-prepared'"
    with pytest.raises(InputError, match=f"run: python jobs/prepare.py {source} {target} and give --dataset {target}$"):
        load_manifest(str(tmp_path / "my images"))


def test_a_file_of_images_is_refused_with_the_command_that_prepares_it(tmp_path):
    (tmp_path / "labels.csv").touch()
    target = f"{tmp_path}/labels-prepared"
    with pytest.raises(
        InputError, match=f"it is a file: run: .*{tmp_path}/labels.csv {target} and give --dataset {target}"
    ):
        load_manifest(str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("given", ["train", ".."])
def test_a_dataset_above_or_below_is_proposed(write_dataset, given):
    written = write_dataset()
    place = str(Path(written.uri, given).resolve())
    with pytest.raises(InputError, match=f"{place} holds no .*; give --dataset {written.uri}, which holds one$"):
        load_manifest(place)


def test_an_interrupted_preparation_is_to_be_continued(tmp_path):
    (tmp_path / "dataset" / "_staging").mkdir(parents=True)
    with pytest.raises(InputError, match=r"run the same command of jobs/prepare\.py again"):
        load_manifest(str(tmp_path / "dataset"))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_row_of_a_split_is_there_in_order(write_dataset, channels):
    written = write_dataset(rows=(7, 4, 3), channels=channels)
    for name, count in (("train", 7), ("val", 4), ("test", 3)):
        split = open_split(written.uri, written.manifest, name)
        assert len(split) == count
        np.testing.assert_array_equal(split.take(np.arange(count)), written.images[name])
        np.testing.assert_array_equal(split.labels, written.labels[name])
        assert split.labels.dtype == np.int32
        some = np.array([count - 1, 0, 1, 0])
        np.testing.assert_array_equal(split.take(some), written.images[name][some])


def test_a_split_without_rows_is_empty(write_dataset):
    written = write_dataset(rows=(7, 4, 0))
    split = open_split(written.uri, written.manifest, "test")
    assert (len(split), split.take(np.arange(0)).shape) == (0, (0, 5, 5, 1))


def test_a_manifest_of_a_newer_format_is_refused(write_dataset):
    written = write_dataset()
    newer = {**json.loads(written.manifest.model_dump_json()), "format": 3}
    storage.write_bytes(storage.join(written.uri, "manifest.json"), json.dumps(newer).encode())
    with pytest.raises(InputError, match="it is of format 3"):
        load_manifest(written.uri)


def test_a_split_larger_than_memory_is_fed_whole(tmp_path):
    """Half a gigabyte of images in a process that may hold 100 MB more than its modules do."""
    image = np.zeros((256, 256, 1), np.uint8)
    with write_shard(str(tmp_path / "shards" / "00000-00000000.arrow"), image.shape) as shard:
        for row in range(8192):
            image[0] = row % 251
            shard.add(image)
    finished = subprocess.run([sys.executable, "-c", FEED_AN_EPOCH, tmp_path], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["8192", "refused"]


FEED_AN_EPOCH = """
import os, re, resource, sys
from pathlib import Path
import numpy as np
from data_prep.manifest import Shard
from trainer.training.dataset import BatchFeed, ImageSplit, epoch_order, worker_rows
from trainer.training.shards import MappedShards

held = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 100 * 2**20, held + 100 * 2**20))
path = "shards/00000-00000000.arrow"
shard = Shard(path=path, rows=8192, bytes=os.path.getsize(Path(sys.argv[1], path)), sha256="")
pixels = MappedShards(sys.argv[1], [shard], (256, 256, 1))
pixels._checker.join()
pixels._damage = None
rows = np.arange(8192, dtype=np.int32)
split = ImageSplit(rows % 251, np.zeros_like(rows), rows, pixels)
order = epoch_order(split, 0, 1)

def make_batch(step):
    rows = worker_rows(order, step, 64, 0, 1)
    return split.take(rows), split.labels[rows]

right = 0
for images, labels in BatchFeed().batches(make_batch, range(len(split) // 64)):
    right += int((images[:, 0, 0, 0] == labels).sum())
print(right)
try:
    np.fromfile(Path(sys.argv[1], path), np.uint8)
except MemoryError:
    print("refused")
"""


def test_the_file_of_each_image_is_found_in_the_order_of_the_rows(write_dataset):
    written = write_dataset(rows=(7, 4, 0))
    sources = read_sources(written.uri, written.manifest, "train").to_pylist()
    paths = [f"train/{row}.png" for row in range(7)]
    assert sources == [{"path": path, "sha256": hashlib.sha256(path.encode()).hexdigest()} for path in paths]
    assert read_sources(written.uri, written.manifest, "test").column_names == ["path", "sha256"]


def test_the_split_of_each_image_is_found_by_the_hash_of_its_file(write_dataset):
    written = write_dataset(rows=(7, 4, 3))
    paths = {
        f"{split}/{row}.png": split for split, rows in (("train", 7), ("val", 4), ("test", 3)) for row in range(rows)
    }
    digests = [hashlib.sha256(path.encode()).digest() for path in paths]
    known = read_known_files(written.uri, written.manifest)
    assert known.find([b"\0" * 32, *digests, b"\xff" * 32]).to_pylist() == [None, *paths.values(), None]
    assert known.find([digests[0], digests[0][:-1] + bytes([digests[0][-1] ^ 1])]).to_pylist() == ["train", None]
    index = read_index(written.uri, written.manifest)
    same = pa.array([b"0" * 32] * len(index), pa.binary(32))
    content = storage.parquet_bytes(index.set_column(index.column_names.index("sha256"), "sha256", same))
    storage.write_bytes(storage.join(written.uri, "index.parquet"), content)
    with pytest.raises(InputError, match=r"index\.parquet has sha256"):
        read_known_files(written.uri, written.manifest)
    tables = {"index.parquet": hashlib.sha256(content).hexdigest()}
    everywhere = written.manifest.model_copy(update={"tables": tables})
    assert read_known_files(written.uri, everywhere).find([b"0" * 32]).to_pylist() == ["train"]


def test_of_no_dataset_no_file_is_known():
    assert KnownFiles.none().find([b"0" * 32]).to_pylist() == [None]
