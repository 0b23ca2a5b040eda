"""Dropout as a function of seed and optimizer step, so that a run can be resumed, by any number of workers.

Keras' own masks depend on how many were drawn before in this process, which a checkpoint cannot hold.
"""

import functools
from typing import Any

import tensorflow as tf
import tf_keras as keras

from trainer.config.config import TrainConfig
from trainer.runtime import compat
from trainer.training.random_rows import draw_rows


def fix_dropout(model: Any, optimizer: Any, config: TrainConfig, first_row: Any = None) -> None:
    """Make every Dropout layer of a model draw this replica's share of a mask for the global batch.

    The layers themselves stay unchanged, so neither an architecture nor an export needs to know.

    Args:
        model: a `tf_keras.Model`, before it is first called with ``training=True``.
        optimizer: the optimizer whose ``iterations`` are the step.
        config: the seed and the batch sizes.
        first_row: int32 scalar: the row of the global batch that the layers' first input is; None for the first of this
            replica's share.
    """
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    for number, layer in enumerate(layers):
        compat.replace_dropout(layer, functools.partial(_drop, number, optimizer, config, first_row))


def _drop(
    number: int,
    optimizer: Any,
    config: TrainConfig,
    first_row: Any,
    inputs: Any,
    rate: float,
    noise_shape: Any = None,
) -> Any:
    first = first_row
    if first is None:
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * config.per_replica_batch_size
    # A seed of its own for each layer and step; augmentation draws from (seed, step).
    layer_seed = tf.constant((config.seed + 1) * 1_000_003 + number + 1, tf.int64)
    seed = tf.stack([layer_seed, tf.cast(optimizer.iterations, tf.int64)])
    drawn = draw_rows(seed, first, tf.shape(inputs)[0], inputs.shape[1:])
    kept = tf.cast(drawn >= rate, inputs.dtype)
    return inputs * kept / tf.cast(1 - rate, inputs.dtype)
