"""Each replica's rows against the same rows of the whole draw, and that nothing of the global batch is made."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.training.augment import augment
from trainer.training.dropout import draw_masks, use_masks
from trainer.training.random_rows import draw_rows

SEED = tf.constant([11, 7], tf.int64)


def rows_of(first, rows, row_shape) -> np.ndarray:
    @tf.function
    def draw(first):
        return draw_rows(SEED, first, rows, row_shape)

    return draw(tf.constant(first)).numpy()


# Rows of one number, of odd sizes, of six as for augmentation, of multiples of 4 and of 256.
@pytest.mark.parametrize("row_shape", [[], [1], [3], [6], [5, 7], [8], [3, 256]])
@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_each_replica_has_its_rows_of_the_whole(row_shape, replicas):
    share = 7
    whole = tf.random.stateless_uniform([replicas * share, *row_shape], SEED).numpy()
    for replica in range(replicas):
        own = rows_of(replica * share, share, row_shape)
        np.testing.assert_array_equal(own, whole[replica * share : (replica + 1) * share])


def test_rows_far_down_a_large_batch_are_those_of_the_whole():
    whole = tf.random.stateless_uniform([65_536, 7], SEED).numpy()
    np.testing.assert_array_equal(rows_of(65_533, 3, [7]), whole[-3:])


def test_a_step_makes_nothing_as_large_as_the_global_batch(make_config):
    share, replicas, width = 13, 5, 30
    config = make_config(global_batch_size=share * replicas, num_workers=replicas)
    images = keras.Input((width,))
    model = keras.Model(images, keras.layers.Dropout(0.5)(images))
    optimizer = keras.optimizers.SGD()

    @tf.function
    def step(inputs, pictures):
        augmented = augment(pictures, optimizer.iterations, tf.ones([7]), config)
        use_masks(model, draw_masks(model, config, optimizer.iterations))
        return model(inputs, training=True), augmented

    graph = step.get_concrete_function(tf.ones([share, width]), tf.ones([share, 8, 8, 1])).graph
    sizes = [tensor.shape.num_elements() for node in graph.get_operations() for tensor in node.outputs]
    # The mask is drawn with up to three numbers before it.
    assert share * width + 3 in sizes
    assert max(size for size in sizes if size) < share * 8 * 8 * 3
    leading = {tensor.shape[0] for node in graph.get_operations() for tensor in node.outputs if tensor.shape.rank}
    assert config.global_batch_size not in leading
