import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.shards import (
    STAGED_SCHEMA,
    images_to_arrow,
    read_chunk_pixels,
    read_chunk_rows,
    write_chunk,
    write_data_file,
)


def random_images(rows: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 6, 5, channels), np.uint8)


def row_table(labels=(2, 0, 1), paths=("a", "b", "c")) -> pa.Table:
    return pa.table({"label": pa.array(labels, pa.int32()), "path": list(paths), "sha256": ["x"] * len(paths)})


@pytest.mark.parametrize("channels", [1, 3])
def test_images_survive_as_a_tensor_column(channels):
    images = random_images(4, channels)
    column = images_to_arrow(images)
    assert column.type == pa.fixed_shape_tensor(pa.uint8(), [6, 5, channels])
    np.testing.assert_array_equal(column.to_numpy_ndarray(), images)


def test_a_staged_chunk_survives(tmp_path):
    uri, images = str(tmp_path / "chunk-000001"), random_images(2)
    rows = pa.Table.from_pylist(
        [{"path": "a", "label": 1, "sha256": "x", "perceptual_hash": b"\0\xff"}, {"path": "b", "reason": "empty"}],
        schema=STAGED_SCHEMA,
    )
    write_chunk(uri, images, rows)
    np.testing.assert_array_equal(read_chunk_pixels(uri), images)
    assert read_chunk_rows(uri) == rows


def test_a_chunk_may_hold_no_image(tmp_path):
    uri = str(tmp_path / "chunk-000001")
    write_chunk(uri, random_images(0), pa.Table.from_pylist([{"path": "a", "reason": "empty"}], schema=STAGED_SCHEMA))
    assert read_chunk_pixels(uri).shape == (0, 6, 5, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_data_file_holds_what_was_written_and_is_described(tmp_path, channels):
    images = random_images(3, channels)
    file = write_data_file(str(tmp_path), "train/part-00000.parquet", images, row_table())
    content = (tmp_path / "train" / "part-00000.parquet").read_bytes()
    assert (file.path, file.rows, file.bytes) == ("train/part-00000.parquet", 3, len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    table = pq.read_table(tmp_path / file.path)
    assert table.column_names == ["image", "label", "path", "sha256"]
    np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray(), images)
    assert table["label"].to_pylist() == [2, 0, 1]


def test_pixels_take_about_a_byte_each(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 1), np.uint8)
    file = write_data_file(
        str(tmp_path), "val/0.parquet", images, row_table([0] * 200, [str(row) for row in range(200)])
    )
    assert file.bytes < 1.1 * images.nbytes


def test_the_content_digest_depends_on_labels_paths_and_pixels(tmp_path):
    def digest(seed=0, **columns) -> str:
        file = write_data_file(str(tmp_path), "val/0.parquet", random_images(3, seed=seed), row_table(**columns))
        return file.content_sha256

    assert digest() == digest()
    others = {digest(seed=1), digest(labels=(2, 0, 2)), digest(paths=("a", "b", "d"))}
    assert len(others | {digest()}) == 4
