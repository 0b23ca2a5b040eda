"""Dropout as a function of seed and optimizer step, so that a run can be resumed, by any number of workers.

Keras' own masks depend on how many were drawn before in this process, which a checkpoint cannot hold.
"""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras as keras

from trainer.config.config import TrainConfig
from trainer.runtime import compat
from trainer.training.random_rows import draw_rows


def draw_masks(model: Any, config: TrainConfig, step: Any, first_row: Any = None, rows: Any = None) -> list[Any]:
    """Return which inputs each Dropout layer keeps: a bool tensor ``[rows, ...]`` for each layer.

    They are some rows of masks for the global batch, by default those of this replica's share. Drawn before the step
    rather than in it, they are the same whether XLA compiles the step or not: its generator numbers what it draws in
    another order.

    Args:
        model: a `tf_keras.Model`.
        config: the seed and the batch sizes.
        step: int64 scalar, the optimizer step.
        first_row: int scalar, the first row of the global batch.
        rows: int scalar, how many.
    """
    if first_row is None:
        rows = config.per_replica_batch_size
        first_row = tf.distribute.get_replica_context().replica_id_in_sync_group * rows
    masks = []
    for number, layer in enumerate(_find_layers(model)):
        # A seed of its own for each layer and step; augmentation draws from (seed, step).
        layer_seed = tf.constant((config.seed + 1) * 1_000_003 + number + 1, tf.int64)
        seed = tf.stack([layer_seed, tf.cast(step, tf.int64)])
        masks.append(draw_rows(seed, first_row, rows, layer.input_shape[1:]) >= layer.rate)
    return masks


def use_masks(model: Any, masks: Sequence[Any]) -> None:
    """Make the Dropout layers keep what masks say, in calls with ``training=True`` that are traced afterwards.

    The layers themselves stay unchanged, so neither an architecture nor an export needs to know.
    """
    for layer, mask in zip(_find_layers(model), masks, strict=True):
        compat.replace_dropout(layer, functools.partial(_drop, mask))


def _find_layers(model: Any) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]


def _drop(mask: Any, inputs: Any, rate: float, noise_shape: Any = None) -> Any:
    return inputs * tf.cast(mask, inputs.dtype) / tf.cast(1 - rate, inputs.dtype)
