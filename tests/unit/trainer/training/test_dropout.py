import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.training.dropout import draw_masks, use_masks

BATCH, WIDTH, RATE = 8, 500, 0.3


@pytest.fixture
def masks(make_config):
    """Return a function that gives what two layers do to ones at an optimizer step: two arrays [BATCH, WIDTH]."""

    def run(step: int = 0, seed: int = 0, training: bool = True) -> list[np.ndarray]:
        images = keras.Input((WIDTH,))
        first = keras.layers.Dropout(RATE)(images)
        second = keras.layers.Dropout(RATE)(images)
        model = keras.Model(images, [first, second])
        use_masks(model, draw_masks(model, make_config(global_batch_size=BATCH, seed=seed), step))
        return [one.numpy() for one in tf.function(model)(tf.ones((BATCH, WIDTH)), training=training)]

    return run


def test_a_step_drops_the_same_again_in_a_new_network(masks):
    np.testing.assert_array_equal(masks(step=7), masks(step=7))


def test_another_step_seed_or_layer_drops_others(masks):
    first, second = masks(step=7)
    for other in (masks(step=8)[0], masks(step=7, seed=1)[0], second):
        assert (first != other).mean() > 0.3


def test_the_rate_is_dropped_and_the_rest_grows_to_keep_the_mean(masks):
    (mask, _) = masks()
    assert set(np.unique(mask)) == {0, np.float32(1 / (1 - RATE))}
    assert (mask == 0).mean() == pytest.approx(RATE, abs=0.03)
    assert mask.mean() == pytest.approx(1, abs=0.05)


def test_every_image_has_a_mask_of_its_own(masks):
    (mask, _) = masks()
    assert len(np.unique(mask, axis=0)) == BATCH


def test_evaluation_drops_nothing(masks):
    for mask in masks(training=False):
        np.testing.assert_array_equal(mask, 1)
