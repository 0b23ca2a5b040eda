"""Random changes of the training images, on the device that trains.

The numbers are drawn for the whole global batch from the seed and the optimizer step alone, and each replica takes its
share, so that a run does not depend on how many workers share it, nor on where it was continued.
"""

import math
from typing import Any

import tensorflow as tf

from trainer.config.config import TrainConfig


def augment(images: Any, step: Any, config: TrainConfig) -> Any:
    """Returns this replica's images, each turned, shifted, resized, mirrored and changed in contrast at random.

    One affine transform with bilinear interpolation does all that moves pixels; what lies outside is mirrored in.

    Args:
        images: float32 ``[per_replica_batch_size, size, size, channels]``.
        step: int64 scalar, the optimizer step.
        config: says how much of each, and the seed.
    """
    share = config.per_replica_batch_size
    seed = tf.stack([tf.constant(config.seed, tf.int64), tf.cast(step, tf.int64)])
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * share
    # One column a quantity, whatever is switched on: switching one off leaves the others as they were.
    drawn = tf.random.stateless_uniform([config.global_batch_size, 6], seed, -1.0, 1.0)[first : first + share]
    turn, zoom, shift_x, shift_y, mirror, contrast = tf.unstack(drawn, axis=1)

    if config.augment_flip or config.augment_rotation or config.augment_translation or config.augment_zoom:
        angle = turn * (config.augment_rotation * math.pi / 180)
        # Output coordinates to input coordinates: a larger picture takes smaller steps.
        scale = 1 / (1 + zoom * config.augment_zoom)
        cosine, sine = tf.cos(angle) * scale, tf.sin(angle) * scale
        side = tf.where(mirror < 0, -1.0, 1.0) if config.augment_flip else tf.ones_like(mirror)
        size = images.shape[1]
        centre = (size - 1) / 2
        moved_x = centre + shift_x * (config.augment_translation * size)
        moved_y = centre + shift_y * (config.augment_translation * size)
        images = tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=tf.stack(
                [
                    cosine * side,
                    -sine,
                    moved_x - (cosine * side - sine) * centre,
                    sine * side,
                    cosine,
                    moved_y - (sine * side + cosine) * centre,
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
