import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training import dataset
from trainer.training.dataset import (
    BatchFeed,
    cache_folder,
    epoch_order,
    load_manifest,
    open_split,
    read_hashes,
    read_sources,
    worker_rows,
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_epoch_visits_every_row_once():
    assert sorted(epoch_order(97, seed=0, epoch=1)) == list(range(97))


def test_each_epoch_and_seed_has_an_order_of_its_own():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(1, 5)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_an_order_is_the_same_each_time():
    np.testing.assert_array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 6, 12])
def test_the_shares_of_all_workers_together_are_the_batch_of_one(num_workers):
    order = epoch_order(41, seed=0, epoch=1)
    for step in range(3):
        shares = [worker_rows(order, step, 12, rank, num_workers) for rank in range(num_workers)]
        assert {len(share) for share in shares} == {12 // num_workers}
        np.testing.assert_array_equal(np.concatenate(shares), order[step * 12 : (step + 1) * 12])


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
        np.testing.assert_array_equal(split.images, written.images[name])
        np.testing.assert_array_equal(split.labels, written.labels[name])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)


def test_the_images_are_a_map_that_cannot_be_written(write_dataset):
    written = write_dataset()
    images = open_split(written.uri, written.manifest, "train").images
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_a_split_that_is_in_the_cache_is_not_read_again(write_dataset):
    written = write_dataset()
    open_split(written.uri, written.manifest, "train")
    shutil.rmtree(written.uri)
    np.testing.assert_array_equal(open_split(written.uri, written.manifest, "train").images, written.images["train"])
    with pytest.raises(InputError, match=r"part-00000.parquet: not found, though the manifest names it; prepare"):
        open_split(written.uri, written.manifest, "val")


def test_another_dataset_at_the_same_place_is_read_again(write_dataset):
    first = write_dataset(seed=0)
    open_split(first.uri, first.manifest, "train")
    second = write_dataset(seed=1)
    assert second.uri == first.uri
    np.testing.assert_array_equal(open_split(second.uri, second.manifest, "train").images, second.images["train"])


def test_a_split_without_rows_is_empty(write_dataset):
    written = write_dataset(rows=(7, 4, 0))
    assert len(open_split(written.uri, written.manifest, "test")) == 0


def test_a_damaged_file_is_refused_with_what_to_do_and_its_repair_is_seen(write_dataset):
    written = write_dataset()
    uri = storage.join(written.uri, written.manifest.splits["train"].files[1].path)
    content = storage.read_bytes(uri)
    storage.write_bytes(uri, content[:200] + bytes([content[200] ^ 1]) + content[201:])
    with pytest.raises(InputError, match=r"train/part-00001.parquet has sha256 .*, the manifest says .*--overwrite"):
        open_split(written.uri, written.manifest, "train")
    storage.write_bytes(uri, content)
    np.testing.assert_array_equal(open_split(written.uri, written.manifest, "train").images, written.images["train"])


def test_workers_of_one_node_fill_the_cache_once_together(write_dataset):
    written, start, opened = write_dataset(rows=(60, 1, 1)), threading.Barrier(4), []

    def open_together() -> None:
        start.wait()
        opened.append(open_split(written.uri, written.manifest, "train"))

    threads = [threading.Thread(target=open_together) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for split in opened:
        np.testing.assert_array_equal(split.images, written.images["train"])


def test_the_cache_holds_nothing_unfinished(write_dataset, tmp_path):
    written = write_dataset()
    open_split(written.uri, written.manifest, "train")
    assert str(cache_folder()).startswith(str(tmp_path / "cache"))
    names = {path.name for path in (cache_folder() / "splits" / written.manifest.fingerprint).iterdir()}
    assert names <= {"train.images.npy", "train.labels.npy", "train.lock"}


def test_a_cache_that_could_not_be_finished_is_filled_again(write_dataset, monkeypatch):
    written = write_dataset()

    def fill_the_disk(path: Path, target: Path) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "replace", fill_the_disk)
        with pytest.raises(InputError, match="No space left"):
            open_split(written.uri, written.manifest, "train")
    np.testing.assert_array_equal(open_split(written.uri, written.manifest, "train").labels, written.labels["train"])


def test_a_manifest_of_a_newer_format_is_refused(write_dataset):
    written = write_dataset()
    newer = {**json.loads(written.manifest.model_dump_json()), "format": 2}
    storage.write_bytes(storage.join(written.uri, "manifest.json"), json.dumps(newer).encode())
    with pytest.raises(InputError, match="it is of format 2"):
        load_manifest(written.uri)


def test_a_split_larger_than_memory_is_fed_whole(tmp_path):
    """Half a gigabyte of images in a process that may hold 100 MB more than its modules do."""
    folder = cache_folder() / "splits" / "large"
    folder.mkdir(parents=True)
    images = np.lib.format.open_memmap(
        folder / "train.images.npy", mode="w+", dtype=np.uint8, shape=(8192, 256, 256, 1)
    )
    images[:, 0, 0, 0] = np.arange(8192) % 251
    images.flush()
    np.save(folder / "train.labels.npy", np.arange(8192, dtype=np.int32) % 251)
    finished = subprocess.run([sys.executable, "-c", FEED_AN_EPOCH], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["8192", "refused"]


FEED_AN_EPOCH = """
import re, resource
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from trainer.training.dataset import BatchFeed, cache_folder, epoch_order, open_split, worker_rows

held = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 100 * 2**20, held + 100 * 2**20))
split = open_split("", SimpleNamespace(fingerprint="large"), "train")
order = epoch_order(len(split), 0, 1)

def make_batch(step):
    rows = worker_rows(order, step, 64, 0, 1)
    return split.images[rows], split.labels[rows]

right = 0
for images, labels in BatchFeed().batches(make_batch, range(len(split) // 64)):
    right += int((images[:, 0, 0, 0] == labels).sum())
print(right)
try:
    np.load(cache_folder() / "splits" / "large" / "train.images.npy")
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
    expected = {hashlib.sha256(path.encode()).hexdigest(): split for path, split in paths.items()}
    assert read_hashes(written.uri, written.manifest) == expected
    shared = {
        split: described.model_copy(update={"files": written.manifest.splits["val"].files})
        for split, described in written.manifest.splits.items()
    }
    everywhere = written.manifest.model_copy(update={"splits": shared})
    assert set(read_hashes(written.uri, everywhere).values()) == {"train"}
    storage.write_bytes(storage.join(written.uri, "val/part-00000.parquet"), b"PAR1 no more")
    with pytest.raises(InputError, match=r"val/part-00000\.parquet cannot be read"):
        read_hashes(written.uri, written.manifest)
    storage.delete_file(storage.join(written.uri, "test/part-00000.parquet"))
    with pytest.raises(InputError, match=r"test/part-00000\.parquet cannot be read"):
        read_hashes(written.uri, written.manifest)
