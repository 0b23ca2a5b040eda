"""Random augmentation of the training images, on the device that trains.

The numbers are drawn for the whole global batch from the seed and the optimizer step alone, and each replica takes its
share, so that a run depends neither on the number of workers nor on where it was resumed.
"""

import math
from typing import Any

import tensorflow as tf

from trainer.config.config import TrainConfig


def augment(images: Any, step: Any, config: TrainConfig) -> Any:
    """Return this replica's images, each rotated, shifted, zoomed, mirrored and changed in contrast at random.

    One affine transform with bilinear interpolation does everything that moves pixels; what lies outside of an image
    is filled by reflection.

    Args:
        images: float32 ``[per_replica_batch_size, size, size, channels]``.
        step: int64 scalar, the optimizer step.
        config: how much of each change, and the seed.
    """
    share = config.per_replica_batch_size
    seed = tf.stack([tf.constant(config.seed, tf.int64), tf.cast(step, tf.int64)])
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * share
    # One column per quantity, whatever is turned on: turning one off leaves the others unchanged.
    drawn = tf.random.stateless_uniform([config.global_batch_size, 6], seed, -1.0, 1.0)[first : first + share]
    turn, zoom, shift_x, shift_y, mirror, contrast = tf.unstack(drawn, axis=1)

    if config.augment_flip or config.augment_rotation or config.augment_translation or config.augment_zoom:
        angle = turn * (config.augment_rotation * math.pi / 180)
        # Output coordinates to input coordinates: a larger picture takes smaller steps.
        scale = 1 / (1 + zoom * config.augment_zoom)
        cosine, sine = tf.cos(angle) * scale, tf.sin(angle) * scale
        side = tf.where(mirror < 0, -1.0, 1.0) if config.augment_flip else tf.ones_like(mirror)
        size = images.shape[1]
        center = (size - 1) / 2
        moved_x = center + shift_x * (config.augment_translation * size)
        moved_y = center + shift_y * (config.augment_translation * size)
        images = tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=tf.stack(
                [
                    cosine * side,
                    -sine,
                    moved_x - (cosine * side - sine) * center,
                    sine * side,
                    cosine,
                    moved_y - (sine * side + cosine) * center,
                    tf.zeros_like(angle),
                    tf.zeros_like(angle),
                ],
                axis=1,
            ),
            output_shape=[size, size],
            fill_value=0.0,
            interpolation="BILINEAR",
            fill_mode="REFLECT",
        )
    if config.augment_contrast:
        mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)
        images = mean + (images - mean) * (1 + contrast * config.augment_contrast)[:, None, None, None]
    return images
