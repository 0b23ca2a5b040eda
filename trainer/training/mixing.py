"""MixUp and CutMix: each training image is mixed with its neighbor in the batch, and so is what it shows.

MixUp blends two images (Zhang et al. 2018, arXiv 1710.09412), CutMix pastes a box of one into the other (Yun et al.
2019, arXiv 1905.04899). As in the code of both papers, all images of a step are mixed in one proportion.
"""

from typing import Any

import tensorflow as tf

from trainer.config.config import TrainConfig


def mix(images: Any, targets: Any, step: Any, mixup: Any, cutmix: Any, config: TrainConfig) -> tuple[Any, Any]:
    """Return images and targets, mixed in pairs; where both kinds are on, each step takes one of them.

    The numbers follow from the seed and the optimizer step alone, and the images are of one replica, so that a run does
    not depend on the number of workers unless their shares are odd: then the last image of each has no neighbor.

    Args:
        images: float32 ``[rows, size, size, channels]``.
        targets: float32 ``[rows, classes]``, what each image shows.
        step: int64 scalar, the optimizer step.
        mixup: float32 scalar, alpha of the Beta distribution of MixUp's proportion; 0 for no MixUp.
        cutmix: the same for CutMix.
        config: the seed.
    """
    size = images.shape[1]
    # Augmentation and dropout draw from seeds that are not negative.
    seeds = tf.random.split(tf.stack([tf.constant(-1 - config.seed, tf.int64), tf.cast(step, tf.int64)]))

    def mixed() -> tuple[Any, Any]:
        choice, row, column, *powers = tf.unstack(1 - tf.random.stateless_uniform([5], seeds[0]))
        is_cut = (cutmix > 0) & ((mixup <= 0) | (choice < 0.5))
        alpha = tf.where(is_cut, cutmix, mixup)
        # g_1 / (g_1 + g_2) is of Beta(alpha, alpha), where each g is of Gamma(alpha), which is Gamma(alpha + 1) times
        # the power 1 / alpha of a uniform number. In logarithms, since with a small alpha most g are below all floats.
        logs = tf.math.log(tf.random.stateless_gamma([2], seeds[1], alpha + 1)) + tf.math.log(powers) / alpha
        kept = tf.sigmoid(logs[0] - logs[1])
        # Half the side of a box of the area 1 - kept; a part of it may lie outside.
        reach = tf.sqrt(1 - kept) / 2
        middles = (tf.range(size, dtype=tf.float32) + 0.5) / size
        is_pasted = (tf.abs(middles - row) < reach)[:, None] & (tf.abs(middles - column) < reach)
        # In pairs, kept and 1 - kept are the same mixtures in the other order.
        blend = tf.fill([size, size], tf.maximum(kept, 1 - kept))
        own = tf.where(is_cut, tf.cast(~is_pasted, tf.float32), blend)[:, :, None]
        share = tf.reduce_mean(own)
        rows = tf.range(tf.shape(images)[0])
        neighbors = tf.minimum(tf.bitwise.bitwise_xor(rows, 1), tf.shape(images)[0] - 1)
        blended = own * images + (1 - own) * tf.gather(images, neighbors)
        return blended, share * targets + (1 - share) * tf.gather(targets, neighbors)

    varied, shown = tf.cond(mixup + cutmix > 0, mixed, lambda: (images, targets))
    return varied, shown
