"""Attribution methods on networks whose answer is known."""

import numpy as np
import pytest
import tf_keras as keras

from trainer.explain.attribution import (
    METHODS,
    find_features,
    grad_cam,
    integrated_gradients,
    occlusion,
    smooth_grad,
)
from trainer.explain.page import METHOD_NAMES

SIZE = 16


def test_the_methods_that_can_be_asked_for_are_those_that_are_there():
    assert tuple(METHODS) == METHOD_NAMES


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    """Weight of each pixel for class 1; those of class 0 are zero."""
    return np.random.default_rng(0).standard_normal((SIZE, SIZE, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def linear(weights):
    network = keras.Sequential([keras.Input((SIZE, SIZE, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    network.layers[-1].set_weights([np.stack([0 * weights.ravel(), weights.ravel()], axis=1), np.zeros(2)])
    return network


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, SIZE, SIZE, 1)).astype(np.float32)


LABELS = np.array([1, 1, 0])


def test_integrated_gradients_of_a_linear_network_are_weight_times_pixel(linear, images, weights):
    maps = integrated_gradients(linear, images, LABELS)
    np.testing.assert_allclose(maps[:2], (images[:2] * weights)[..., 0], atol=1e-5)
    assert not maps[2].any()


def test_integrated_gradients_add_up_to_the_logit_of_a_curved_network(images):
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 1)),
            keras.layers.Conv2D(4, 3, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    logits = np.asarray(network(images)) - np.asarray(network(0 * images))
    maps = integrated_gradients(network, images, LABELS)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), logits[np.arange(3), LABELS], rtol=0.02, atol=0.01)


def test_smooth_grad_of_a_linear_network_is_the_size_of_its_weights(linear, images, weights):
    maps = smooth_grad(linear, images, LABELS)
    np.testing.assert_allclose(maps[0], np.abs(weights[..., 0]), rtol=1e-5)
    assert not maps[2].any()


def test_occlusion_finds_the_one_pixel_that_counts(images):
    network = keras.Sequential([keras.Input((SIZE, SIZE, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    kernel = np.zeros((SIZE * SIZE, 2), np.float32)
    kernel[5 * SIZE + 9, 1] = 1
    network.layers[-1].set_weights([kernel, np.zeros(2)])
    bright = np.ones_like(images)
    maps = occlusion(network, bright, LABELS)
    assert maps[0, 5, 9] == pytest.approx(1)
    assert maps[0, 0, 0] == 0
    assert not maps[2].any()


def test_grad_cam_marks_where_the_feature_of_the_class_is():
    network = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 1)),
            keras.layers.Conv2D(2, 1, use_bias=False),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, use_bias=False),
        ]
    )
    # Feature 0 is the picture, feature 1 its negative; class 1 is for the first and against the second.
    network.layers[0].set_weights([np.array([[[[1.0, -1.0]]]])])
    network.layers[-1].set_weights([np.array([[-1.0, 1.0], [1.0, -1.0]])])
    image = np.zeros((1, SIZE, SIZE, 1), np.float32)
    image[0, 2:6, 8:12] = 3
    expected = image[..., 0] * 2 / SIZE**2
    np.testing.assert_allclose(grad_cam(network, image, np.array([1])), expected, atol=1e-6)
    assert not grad_cam(network, image, np.array([0])).any()


def test_frozen_weights_change_nothing(images):
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [keras.Input((SIZE, SIZE, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    before = grad_cam(network, images, LABELS)
    network.trainable = False
    np.testing.assert_array_equal(grad_cam(network, images, LABELS), before)


def test_a_network_without_feature_map_is_reported(linear):
    with pytest.raises(ValueError, match="no feature map"):
        find_features(linear)


def stack(size: int, *strides: int) -> keras.Model:
    """A network of convolutions that divide the side of an image by these."""
    layers = [keras.layers.Conv2D(1, 1, strides=stride, name=f"map{place}") for place, stride in enumerate(strides)]
    return keras.Sequential([keras.Input((size, size, 1)), *layers, keras.layers.Flatten(), keras.layers.Dense(2)])


@pytest.mark.parametrize(
    ("size", "strides", "name"),
    [
        # The last map of 224 pixels has 7 cells on a side, as in the paper; that of 64 pixels would have 2.
        (224, (2, 2, 2, 2, 2), "map4"),
        (64, (2, 2, 2, 2, 2), "map3"),
        (128, (2, 2, 2, 2, 2), "map4"),
        (48, (2, 2, 2, 1, 2), "map3"),
        # There is none as large: the last of the largest.
        (48, (16, 1, 2), "map1"),
    ],
)
def test_grad_cam_reads_the_last_map_that_tells_parts_of_the_image_apart(size, strides, name):
    assert find_features(stack(size, *strides)).name == name
