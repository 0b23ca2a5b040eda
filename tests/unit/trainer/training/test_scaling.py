import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.training.scaling import build_scaling


@pytest.fixture
def manifest(write_dataset):
    return write_dataset(rows=(6, 1, 1)).manifest


def test_pixels_are_standardized_by_the_train_split(manifest, make_config):
    pixels = np.float32([50, 100, 200]).reshape(1, 3, 1, 1)
    scaled = build_scaling(manifest, make_config())(pixels)
    assert np.ravel(scaled) == pytest.approx([-1, 0, 2])


def test_pixels_may_be_scaled_to_the_unit_interval(manifest, make_config):
    scaled = build_scaling(manifest, make_config(input_scaling="unit"))(np.float32([0, 255]).reshape(1, 2, 1, 1))
    assert np.ravel(scaled) == pytest.approx([0, 1])


def test_pixels_may_be_scaled_as_published_weights_expect_them(manifest, make_config):
    color = manifest.model_copy(update={"channels": 3, "pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3})
    pixels = np.float32([[[[10, 20, 30]]]])
    for scaling, module in (("imagenet", keras.applications.resnet50), ("symmetric", keras.applications.xception)):
        scaled = build_scaling(color, make_config(input_scaling=scaling))(pixels)
        published = module.preprocess_input(pixels.copy())
        np.testing.assert_allclose(scaled, published[..., ::-1] if scaling == "imagenet" else published, rtol=1e-5)
    gray = build_scaling(manifest, make_config(input_scaling="imagenet"))(np.float32([[[[114.799]]]]))
    assert np.ravel(gray) == pytest.approx([0], abs=1e-3)


def test_each_channel_has_its_own_scale_and_a_plain_one_is_not_blown_up(manifest, make_config):
    color = manifest.model_copy(update={"channels": 3, "pixel_mean": [10.0, 20.0, 30.0], "pixel_std": [2.0, 4.0, 0.0]})
    scaled = build_scaling(color, make_config())(np.full((1, 1, 1, 3), 40, np.float32))
    assert np.ravel(scaled) == pytest.approx([15, 5, 10])


def test_brightness_and_contrast_of_an_image_do_not_matter_and_a_plain_one_is_not_blown_up(manifest, make_config):
    image = np.random.default_rng(0).uniform(60, 180, (5, 5, 3)).astype(np.float32)
    plain = np.full((5, 5, 3), 7, np.float32)
    scale_pixels = build_scaling(manifest, make_config(input_scaling="image"))
    scaled, darker, of_plain = scale_pixels(np.stack([image, image * 0.5 + 3, plain])).numpy()
    np.testing.assert_allclose(scaled, tf.image.per_image_standardization(image), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(darker, scaled, rtol=5e-3, atol=1e-3)
    assert not of_plain.any()


@pytest.mark.parametrize("input_scaling", ["image", "standardize", "unit", "imagenet", "symmetric"])
def test_scaling_has_no_weights_and_is_exact_in_mixed_precision(manifest, make_config, input_scaling):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        layer = build_scaling(manifest, make_config(input_scaling=input_scaling))
        assert layer(np.zeros((1, 5, 5, 1), np.float32)).dtype == tf.float32
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert not layer.weights
