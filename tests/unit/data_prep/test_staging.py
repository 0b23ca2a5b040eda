import io

import numpy as np
import pytest
import ray
from PIL import Image

from data_prep import staging
from data_prep.decode import ImageOptions
from data_prep.manifest import Shard
from data_prep.sources import find_images
from data_prep.staging import _decode_range, _describe, _divide, _next_number, open_staging
from trainer.runtime import storage


@pytest.mark.parametrize(
    ("images", "image_size", "channels", "sizes"),
    [
        (3, 250, 1, [3]),
        (600, 250, 1, [256, 256, 88]),
        (70_000, 28, 1, [1094] * 63 + [70_000 - 63 * 1094]),
        (200_000, 250, 1, [2147] * 93 + [329]),
        (5, 4096, 3, [2, 2, 1]),
    ],
)
def test_shards_are_of_128_mib_or_a_64th_of_the_images(images, image_size, channels, sizes):
    ranges = _divide(images, ImageOptions(image_size=image_size, channels=channels))
    assert [len(one) for one in ranges] == sizes
    assert [row for one in ranges for row in one] == list(range(images))


@pytest.mark.parametrize(("path", "number"), [(None, 0), ("shards/00041-0a1b2c3d.arrow", 42)])
def test_appended_shards_come_after_the_others_by_their_names(path, number):
    assert _next_number([Shard(path=path, rows=1, bytes=1, sha256="")] if path else []) == number


@pytest.mark.parametrize("shape", [(1, 1, 1), (28, 28, 1), (300, 300, 3)])
def test_the_sums_of_an_image_are_exact_and_its_values_are_counted_in_a_grid(shape):
    pixels, counts = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.zeros(256, np.int64)
    described = _describe(b"content", pixels, counts)
    assert described["pixel_sums"] == pixels.astype(int).sum(axis=(0, 1)).tolist()
    assert described["pixel_squares"] == (pixels.astype(int) ** 2).sum(axis=(0, 1)).tolist()
    step = {1: 1, 28: 1, 300: 5}[shape[0]]
    np.testing.assert_array_equal(counts, np.bincount(pixels[::step, ::step].ravel(), minlength=256))


def test_a_task_of_a_killed_preparation_cannot_write_into_the_next_one(tmp_path, write_files, monkeypatch):
    sink = io.BytesIO()
    Image.new("L", (8, 8), 100).save(sink, "png")
    found, dataset = find_images(write_files("cat/a.png", "dog/b.png")), str(tmp_path / "prepared")
    for path in found.images["path"].to_pylist():
        storage.write_bytes(storage.join(found.uri, path), sink.getvalue())
    monkeypatch.setattr(ray, "get", lambda listed: listed)

    def decode(image_size: int) -> None:
        options = ImageOptions(image_size=image_size)
        folder = open_staging(dataset, found.images, options)
        item = {"record": storage.join(folder, "chunk-000000"), "number": 0, "start": 0, "rows": 2}
        assert _decode_range(item, found.images, dataset, found.uri, options) == {"images": 2}

    decode(5)
    (first,) = storage.find_files(storage.join(dataset, "shards"))
    killed = storage.read_bytes(storage.join(dataset, "shards", first))
    decode(7)
    # The task of the killed one goes on: another folder, and another shard.
    names = set(storage.find_files(storage.join(dataset, "shards")))
    assert len(names) == 2
    assert storage.read_bytes(storage.join(dataset, "shards", first)) == killed
    decode(5)
    assert set(storage.find_files(storage.join(dataset, "shards"))) == names


def test_an_interrupted_preparation_keeps_its_records(write_files, tmp_path):
    found = find_images(write_files("cat/a.png", "dog/b.png"))
    dataset, options = str(tmp_path / "prepared"), ImageOptions(image_size=5)
    record = storage.join(open_staging(dataset, found.images, options), "chunk-000000.rows.parquet")
    storage.write_bytes(record, b"rows")
    assert record.startswith(open_staging(dataset, found.images, options))
    assert storage.exists(record)
    assert staging.is_started(dataset)
    more = find_images(write_files("cat/a.png", "dog/b.png", "dog/c.png"))
    assert not record.startswith(open_staging(dataset, more.images, options))
    assert not storage.exists(record)


def test_the_rows_of_a_range_without_any_image_are_recorded_without_a_shard(write_files, tmp_path, monkeypatch):
    found, dataset = find_images(write_files("cat/a.png", "dog/b.png")), str(tmp_path / "prepared")
    options = ImageOptions(image_size=5)
    monkeypatch.setattr(ray, "get", lambda listed: listed)
    record = storage.join(open_staging(dataset, found.images, options), "chunk-000000")
    item = {"record": record, "number": 0, "start": 0, "rows": 2}
    _decode_range(item, found.images, dataset, found.uri, options)
    rows = storage.parquet_table(storage.read_bytes(f"{record}.rows.parquet"))
    assert rows["reason"].to_pylist() == ["not_an_image"] * 2
    assert rows.schema.remove_metadata() == staging.STAGED_SCHEMA
    assert not storage.find_files(storage.join(dataset, "shards"))
