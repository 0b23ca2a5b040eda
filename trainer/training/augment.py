"""Random augmentation of the training images, on the device that trains.

The numbers follow from the seed, the optimizer step and the row of the global batch alone, so that a run depends
neither on the number of workers nor on where it was resumed.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.config.config import MIXES, TrainConfig
from trainer.training.random_rows import draw_rows

# What can be varied, in the order of the strengths.
PARTS = ("rotation", "translation", "zoom", "flip", "contrast", *MIXES)


def find_strengths(augmentation: str, config: TrainConfig) -> npt.NDArray[np.float32]:
    """Return how much of each of PARTS is varied: the config's value where it is named, else 0; float32 ``[7]``.

    Args:
        augmentation: names joined by "+", or none, as in `trainer.training.stages`.
        config: the config of the run.
    """
    # A flip that the config does not ask for can still be tried.
    values = {part: 1.0 if part == "flip" else getattr(config, f"augment_{part}") for part in PARTS}
    return np.array([values[part] if part in augmentation.split("+") else 0.0 for part in PARTS], np.float32)


def augment(images: Any, step: Any, strengths: Any, config: TrainConfig) -> Any:
    """Return this replica's images, each rotated, shifted, zoomed, mirrored and changed in contrast at random.

    One affine transform with bilinear interpolation does everything that moves pixels; what lies outside of an image
    is filled by reflection.

    Args:
        images: float32 ``[per_replica_batch_size, size, size, channels]``.
        step: int64 scalar, the optimizer step.
        strengths: float32 ``[7]``, of `find_strengths`; one graph serves all of them.
        config: the seed and the batch sizes.
    """
    share = config.per_replica_batch_size
    seed = tf.stack([tf.constant(config.seed, tf.int64), tf.cast(step, tf.int64)])
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * share
    # One column per quantity, whatever is turned on: turning one off leaves the others unchanged.
    drawn = draw_rows(seed, first, share, [6]) * 2 - 1
    turn, grow, shift_x, shift_y, mirror, brighten = tf.unstack(drawn, axis=1)
    rotation, translation, zoom, flip, contrast = tf.unstack(strengths)[: -len(MIXES)]

    def move() -> Any:
        angle = turn * (rotation * math.pi / 180)
        # Output coordinates to input coordinates: a larger picture takes smaller steps.
        scale = 1 / (1 + grow * zoom)
        cosine, sine = tf.cos(angle) * scale, tf.sin(angle) * scale
        side = tf.where((mirror < 0) & (flip > 0), -1.0, 1.0)
        size = images.shape[1]
        center = (size - 1) / 2
        moved_x = center + shift_x * (translation * size)
        moved_y = center + shift_y * (translation * size)
        return tf.raw_ops.ImageProjectiveTransformV3(
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

    moved = tf.cond(rotation + translation + zoom + flip > 0, move, lambda: images)

    def change_contrast() -> Any:
        mean = tf.reduce_mean(moved, axis=(1, 2, 3), keepdims=True)
        return moved + (moved - mean) * (brighten * contrast)[:, None, None, None]

    return tf.cond(contrast > 0, change_contrast, lambda: moved)
