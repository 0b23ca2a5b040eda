import numpy as np
import pytest

from trainer.training.batches import make_batch
from trainer.training.dataset import ImageSplit


@pytest.fixture
def split() -> ImageSplit:
    random = np.random.default_rng(0)
    # An odd size: nothing is aligned by chance.
    return ImageSplit.hold(random.integers(0, 256, (50, 7, 5, 3), np.uint8), np.arange(50, dtype=np.int32))


@pytest.mark.parametrize("rows", [[3, 41, 3, 0], [49], list(range(50))])
def test_a_batch_has_the_pixels_and_labels_of_its_rows(split, rows):
    images, labels = make_batch(split, np.array(rows))
    np.testing.assert_array_equal(images.numpy(), split.take(np.array(rows)))
    assert labels.numpy().tolist() == rows


def test_batches_of_several_steps_are_made_at_once(split):
    images, labels = make_batch(split, np.array([[3, 41], [0, 7], [3, 9]]))
    np.testing.assert_array_equal(images.numpy().reshape(6, 7, 5, 3), split.take(np.array([3, 41, 0, 7, 3, 9])))
    assert labels.numpy().tolist() == [[3, 41], [0, 7], [3, 9]]


def test_a_batch_keeps_its_pixels_when_others_are_made(split):
    batches = [make_batch(split, np.arange(start, start + 8)) for start in range(40)]
    for start, (images, _) in enumerate(batches):
        np.testing.assert_array_equal(images.numpy(), split.take(np.arange(start, start + 8)))


def test_a_batch_can_be_computed_with(split):
    """TensorFlow ends the process where memory is not aligned as it expects."""
    import tensorflow as tf

    images, _ = make_batch(split, np.arange(32))
    np.testing.assert_array_equal(tf.reverse(images, [0]).numpy(), split.take(np.arange(31, -1, -1)))
    assert tf.reduce_sum(tf.cast(images, tf.int64)).numpy() == split.take(np.arange(32)).sum()
