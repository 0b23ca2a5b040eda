"""Attribution maps: which pixels of an image contribute to a network's score for a class. Pure Keras.

A network takes float32 ``[batch, height, width, channels]``, in which zero is the mean pixel, and returns logits
``[batch, num_classes]``. Every method returns float32 ``[batch, height, width]``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tf_keras as keras

Maps = npt.NDArray[np.float32]
Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_INTEGRATION_STEPS = 32
_NOISY_COPIES = 16
# Standard deviation of the noise, as a share of the range of an image's values (Smilkov et al. 2017, section 3.1).
_NOISE_SHARE = 0.1
_OCCLUDED_SHARE = 0.15
# Cells on a side of the map that Grad-CAM reads; docs/LOG.md has the effect of each layer.
_LEAST_MAP_SIDE = 4


def grad_cam(network: Any, images: Images, labels: Labels) -> Maps:
    """Return where a late feature map raises the class's logit (Selvaraju et al. 2017, section 3); never negative.

    Raises:
        ValueError: the network has no feature map.
    """
    features = find_features(network).output
    model = keras.Model(network.inputs, [features, network.output])
    watched = tf.constant(images)
    with tf.GradientTape() as tape:
        # Record the operations on the images even if no weight is trainable.
        tape.watch(watched)
        activations, logits = model(watched, training=False)
        score = tf.reduce_sum(tf.gather(logits, labels, axis=1, batch_dims=1))
    weights = tf.reduce_mean(tape.gradient(score, activations), axis=(1, 2), keepdims=True)
    maps = tf.nn.relu(tf.reduce_sum(weights * activations, axis=-1, keepdims=True))
    return np.asarray(tf.image.resize(maps, images.shape[1:3])[..., 0], np.float32)


def integrated_gradients(network: Any, images: Images, labels: Labels) -> Maps:
    """Return each pixel's share of the class's logit above that of the zero image (Sundararajan et al. 2017).

    The shares of an image add up to that difference, within the error of the trapezoid rule.
    """
    total = np.zeros_like(images)
    for step in range(_INTEGRATION_STEPS + 1):
        weight = 0.5 if step in (0, _INTEGRATION_STEPS) else 1.0
        total += weight * _gradients(network, images * (step / _INTEGRATION_STEPS), labels)
    shares: Maps = (images * total / _INTEGRATION_STEPS).sum(axis=-1)
    return shares


def smooth_grad(network: Any, images: Images, labels: Labels) -> Maps:
    """Return the size of the logit's gradient, averaged over noisy copies (Smilkov et al. 2017); never negative."""
    random = np.random.default_rng(0)
    spread = np.ptp(images, axis=(1, 2, 3), keepdims=True) * _NOISE_SHARE
    total = np.zeros_like(images)
    for _ in range(_NOISY_COPIES):
        noise = (random.standard_normal(images.shape) * spread).astype(np.float32)
        total += _gradients(network, images + noise, labels)
    sizes: Maps = np.abs(total / _NOISY_COPIES).sum(axis=-1)
    return sizes


def occlusion(network: Any, images: Images, labels: Labels) -> Maps:
    """Return how far the logit falls when a square around the pixel is blanked (Zeiler & Fergus 2014, section 4.2)."""
    height, width = images.shape[1:3]
    side = max(1, round(_OCCLUDED_SHARE * height))
    stride = max(1, side // 2)
    scores = _scores(network, images, labels)
    falls, covers = np.zeros(images.shape[:3], np.float32), np.zeros((height, width), np.float32)
    for top in range(0, height, stride):
        for left in range(0, width, stride):
            square = (slice(top, top + side), slice(left, left + side))
            blanked = images.copy()
            blanked[:, *square] = 0
            falls[:, *square] += (scores - _scores(network, blanked, labels))[:, None, None]
            covers[square] += 1
    return falls / covers


METHODS: Mapping[str, Callable[[Any, Images, Labels], Maps]] = {
    "grad_cam": grad_cam,
    "integrated_gradients": integrated_gradients,
    "smooth_grad": smooth_grad,
    "occlusion": occlusion,
}


def find_features(network: Any) -> Any:
    """Return the last layer whose feature map can still tell the parts of an image apart: one of 4x4 or more.

    Where an image is small for its network, the very last maps have fewer cells. Earlier maps than needed have more of
    them, but are less about the class. Where no map has as many, the last of the largest is taken.

    Raises:
        ValueError: the network has no feature map.
    """
    sizes = {
        layer: min(layer.output.shape[1:3])
        for layer in network.layers
        if len(layer.output.shape) == 4 and not isinstance(layer, keras.layers.InputLayer)
    }
    largest = max(sizes.values(), default=1)
    if largest < 2:
        raise ValueError("the network has no feature map")
    least = min(_LEAST_MAP_SIDE, largest)
    return next(layer for layer in reversed(network.layers) if sizes.get(layer, 0) >= least)


def _gradients(network: Any, images: Images, labels: Labels) -> Images:
    """Return the gradient of each image's own logit, in the shape of the images."""
    watched = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(watched)
        logits = network(watched, training=False)
        score = tf.reduce_sum(tf.gather(logits, labels, axis=1, batch_dims=1))
    return np.asarray(tape.gradient(score, watched), np.float32)


def _scores(network: Any, images: Images, labels: Labels) -> npt.NDArray[np.float32]:
    logits = np.asarray(network(tf.constant(images), training=False))
    return logits[np.arange(len(labels)), labels]
