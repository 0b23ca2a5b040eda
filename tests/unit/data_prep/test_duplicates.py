import hashlib
import io

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.duplicates import HASH_BYTES, group_duplicates, list_duplicates, perceptual_hash


def photo(seed: int, size: int = 128) -> np.ndarray:
    """uint8 [size, size, 3] with shapes of all sizes, as a photo has."""
    coarse = np.random.default_rng(seed).normal(128, 60, (12, 12, 3)).clip(0, 255).astype(np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=quality)
    return np.asarray(Image.open(sink))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, (300, 300), interpolation=cv2.INTER_CUBIC)


def groups_of(images: list[np.ndarray], rule: str = "near") -> list[int]:
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
    columns = {"pixels_sha256": digests, "perceptual_hash": list(map(perceptual_hash, images))}
    table = pa.table({name: pa.array(column, pa.binary(HASH_BYTES)) for name, column in columns.items()})
    return group_duplicates(table, rule).tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: as_jpeg(pixels, 60),
        enlarged,
        lambda pixels: np.clip(pixels * 1.1 + 5, 0, 255).astype(np.uint8),
        lambda pixels: pixels.mean(axis=2, keepdims=True).astype(np.uint8),
    ],
    ids=["encoded again", "enlarged", "brighter", "gray"],
)
def test_a_copy_that_was_changed_a_little_is_a_duplicate(change):
    photos = [photo(seed) for seed in range(20)]
    groups = groups_of([*photos, change(photos[7])])
    assert groups[20] == groups[7]
    assert len(set(groups)) == 20


def test_different_photos_are_not_duplicates():
    assert len(set(groups_of([photo(seed) for seed in range(300)]))) == 300


def test_a_mirrored_photo_is_another_one():
    assert len(set(groups_of([photo(0), photo(0)[:, ::-1]]))) == 2


def test_equal_pixels_are_duplicates_even_without_any_shape():
    plain = [np.full((16, 16, 1), value, np.uint8) for value in (0, 0, 255)]
    groups = groups_of(plain)
    assert groups[0] == groups[1] != groups[2]


def test_copies_of_copies_are_one_group():
    photos = [photo(seed) for seed in range(10)]
    groups = groups_of([*photos, as_jpeg(photos[0], 70), enlarged(photos[0]), photos[0].copy()])
    assert groups[0] == groups[10] == groups[11] == groups[12]
    assert len(set(groups)) == 10


def test_by_the_rule_exact_only_equal_pixels_are_duplicates():
    photos = [photo(seed) for seed in range(10)]
    groups = groups_of([*photos, as_jpeg(photos[0], 90), photos[3].copy()], "exact")
    assert groups[11] == groups[3]
    assert len(set(groups)) == 11


def test_many_copies_of_one_photo_do_not_hide_another_pair():
    crowd = [photo(0)] * 100
    groups = groups_of([*crowd, photo(1), as_jpeg(photo(1), 70)])
    assert groups[100] == groups[101] != groups[0]
    assert len(set(groups[:100])) == 1


def test_one_image_is_a_group():
    assert len(groups_of([photo(0)])) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 3), (250, 250, 1)])
def test_an_image_of_any_size_has_a_hash_of_the_same_length(shape):
    assert len(perceptual_hash(np.full(shape, 9, np.uint8))) == HASH_BYTES


def test_images_with_a_duplicate_are_listed_by_group():
    images = pa.table({"path": ["e", "d", "c", "b", "a"]})
    listed = list_duplicates(images, np.array([5, 2, 5, 3, 2]), np.array([0, 0, 1, 2, 0], np.int8))
    assert listed.to_pylist() == [
        {"group": 0, "path": "a", "split": "train", "leaks": False},
        {"group": 0, "path": "d", "split": "train", "leaks": False},
        {"group": 2, "path": "c", "split": "val", "leaks": True},
        {"group": 2, "path": "e", "split": "train", "leaks": True},
    ]


def test_without_duplicates_the_list_is_empty():
    listed = list_duplicates(pa.table({"path": ["a", "b"]}), np.array([0, 1]), np.array([0, 1], np.int8))
    assert listed.num_rows == 0
    assert listed.column_names == ["group", "path", "split", "leaks"]
