import hashlib

import numpy as np
import pyarrow as pa
import pytest

from data_prep import manifest
from data_prep.manifest import image_arrays
from data_prep.shards import write_shard


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_a_shard_holds_what_was_added_and_is_described(tmp_path, monkeypatch, rows, channels):
    monkeypatch.setattr(manifest, "_BATCH_BYTES", 4 * 30 * channels)
    images = np.random.default_rng(0).integers(0, 256, (rows, 6, 5, channels), np.uint8)
    path = tmp_path / "shards" / "00000-00000000.arrow"
    with write_shard(str(path), (6, 5, channels)) as shard:
        for image in images:
            shard.add(image)
        assert not path.exists()
    described, content = shard.describe("shards/00000-00000000.arrow"), path.read_bytes()
    assert (described.rows, described.bytes) == (rows, len(content))
    assert described.sha256 == hashlib.sha256(content).hexdigest()
    batches = image_arrays(pa.memory_map(str(path)))
    assert [len(batch) for batch in batches] == [4] * (rows // 4) + [rows % 4] * (rows % 4 > 0)
    np.testing.assert_array_equal(np.concatenate(batches), images)
    # What anything that reads Arrow sees.
    table = pa.ipc.open_file(str(path)).read_all()
    assert table.schema == pa.schema([("image", pa.fixed_shape_tensor(pa.uint8(), [6, 5, channels]))])


def test_a_mapped_shard_is_not_copied(tmp_path):
    with write_shard(str(tmp_path / "shard"), (100, 100, 1)) as shard:
        for _ in range(50):
            shard.add(np.zeros((100, 100, 1), np.uint8))
    before = pa.total_allocated_bytes()
    (images,) = image_arrays(pa.memory_map(str(tmp_path / "shard")))
    assert images.shape == (50, 100, 100, 1)
    assert not images.flags.owndata
    assert not images.flags.writeable
    assert pa.total_allocated_bytes() - before < 10_000


def test_an_error_leaves_no_shard(tmp_path):
    def write() -> None:
        with write_shard(str(tmp_path / "shard"), (2, 2, 1)) as shard:
            shard.add(np.zeros((2, 2, 1), np.uint8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list(tmp_path.iterdir()) == []
