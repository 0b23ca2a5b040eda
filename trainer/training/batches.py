"""Rows of a split as the tensors that a training step takes: each pixel is copied once."""

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.training.dataset import ImageSplit
from trainer.training.devices import has_gpu

# The alignment in bytes that TensorFlow's kernels expect (EIGEN_MAX_ALIGN_BYTES).
_ALIGNMENT = 64


def make_batch(split: ImageSplit, rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
    """Return images, uint8 ``[..., height, width, channels]``, and labels, int32, in the memory of the host.

    Their first dimensions are those of the rows.

    A constant that is made from an array is copied by Keras' rules and again for alignment, which took longer than
    gathering the rows.
    """
    images = split.take(rows.ravel(), _aligned_empty((rows.size, *split.pixels.image_shape)))
    images = images.reshape(*rows.shape, *split.pixels.image_shape)
    return tf.experimental.dlpack.from_dlpack(images.__dlpack__()), tf.constant(split.labels[rows])


def move_batch(batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return a batch with its images on the worker's device, when they are there."""
    images, labels = batch
    if has_gpu():
        with tf.device("/GPU:0"):
            images = tf.identity(images)
    return images, labels


def _aligned_empty(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    size = int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].reshape(shape)
