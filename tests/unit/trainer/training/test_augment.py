import numpy as np
import pytest
import tensorflow as tf

from trainer.training.augment import augment, find_strengths
from trainer.training.stages import full_augmentation

BATCH, SIZE = 16, 20


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (BATCH, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture
def augmented(make_config):
    """Return a function that augments the images of one optimizer step."""

    def run(images: np.ndarray, step: int = 0, **values) -> np.ndarray:
        config = make_config(global_batch_size=BATCH, **values)
        strengths = find_strengths(full_augmentation(config), config)
        return augment(tf.constant(images), tf.constant(step, tf.int64), tf.constant(strengths), config).numpy()

    return run


def blank_with(rows: slice, columns: slice) -> np.ndarray:
    """Black images with one white rectangle."""
    images = np.zeros((BATCH, SIZE, SIZE, 1), np.float32)
    images[:, rows, columns] = 1
    return images


def centres(images: np.ndarray) -> np.ndarray:
    """Row and column of each image's centre of mass, from the middle of the image: [images, 2]."""
    weights = images[..., 0] / images[..., 0].sum(axis=(1, 2), keepdims=True)
    offsets = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return np.einsum("bhw,ahw->ba", weights, offsets)


def test_nothing_switched_on_changes_nothing(images, augmented):
    np.testing.assert_array_equal(augmented(images), images)


def test_a_step_draws_the_same_again_and_another_step_or_seed_draws_others(images, augmented):
    values = {"augment_rotation": 20.0, "augment_translation": 0.1, "augment_zoom": 0.2, "augment_contrast": 0.3}
    once = augmented(images, step=7, **values)
    np.testing.assert_array_equal(augmented(images, step=7, **values), once)
    assert np.abs(augmented(images, step=8, **values) - once).mean() > 1
    assert np.abs(augmented(images, step=7, seed=1, **values) - once).mean() > 1


def test_a_flip_mirrors_some_images_left_to_right_and_leaves_the_others(images, augmented):
    flipped = augmented(images, augment_flip=True)
    is_same = [np.allclose(one, image, atol=1e-3) for one, image in zip(flipped, images, strict=True)]
    is_mirrored = [np.allclose(one, image[:, ::-1], atol=1e-3) for one, image in zip(flipped, images, strict=True)]
    assert all(np.logical_xor(is_same, is_mirrored))
    assert 0 < sum(is_mirrored) < BATCH


def test_a_translation_moves_no_further_than_its_fraction(augmented):
    moved = centres(augmented(blank_with(slice(9, 11), slice(9, 11)), augment_translation=0.2))
    assert np.abs(moved).max() <= 0.2 * SIZE + 1e-3
    assert (np.ptp(moved, axis=0) > 2).all()


@pytest.mark.parametrize("degrees", [30.0, 180.0])
def test_a_rotation_turns_about_the_centre_up_to_its_angle(augmented, degrees):
    turned = centres(augmented(blank_with(slice(9, 11), slice(12, 15)), augment_rotation=degrees))
    np.testing.assert_allclose(np.hypot(*turned.T), 3.5, atol=0.2)
    angles = np.degrees(np.arctan2(*turned.T))
    assert np.abs(angles).max() <= degrees + 1
    assert np.ptp(angles) > degrees


def test_a_zoom_changes_the_size_about_the_centre(augmented):
    zoomed = augmented(blank_with(slice(6, 14), slice(6, 14)), augment_zoom=0.5)
    np.testing.assert_allclose(centres(zoomed), 0, atol=1e-3)
    sides = np.sqrt(zoomed.sum(axis=(1, 2, 3))) / 8
    assert sides.min() >= 0.5 * 0.95
    assert sides.max() <= 1.5 * 1.05
    assert np.ptp(sides) > 0.5


def test_contrast_keeps_each_images_mean_and_scales_its_differences(images, augmented):
    changed = augmented(images, augment_contrast=0.5)
    np.testing.assert_allclose(changed.mean(axis=(1, 2, 3)), images.mean(axis=(1, 2, 3)), rtol=1e-4)
    factors = changed.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3))
    assert factors.min() >= 0.499
    assert factors.max() <= 1.501
    assert np.ptp(factors) > 0.3


def test_only_what_is_named_is_varied_and_a_flip_can_be_tried_unasked(make_config):
    config = make_config(augment="auto", augment_rotation=10.0, augment_zoom=0.25)
    assert find_strengths("none", config).tolist() == [0, 0, 0, 0, 0, 0, 0]
    assert find_strengths("rotation+zoom", config).tolist() == [10, 0, 0.25, 0, 0, 0, 0]
    assert find_strengths("zoom+flip", config).tolist() == [0, 0, 0.25, 1, 0, 0, 0]
