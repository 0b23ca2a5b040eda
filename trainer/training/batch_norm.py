"""BatchNorm in training, and the averages with which a network is validated: those of training images as they are.

While a network trains, the averages follow augmented images. Interpolation makes these smoother than the images that
the network is validated on, and a network whose weights are good can then be validated at chance. So before each
validation the averages are estimated again, with the current weights, on images that are not augmented (Izmailov
et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2, do so for averaged weights). Training does not use them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig
from trainer.training.dropout import draw_masks, use_masks
from trainer.training.network import Network
from trainer.training.scaling import build_scaling

# Images that an estimate is made of. More did not improve the validation (docs/LOG.md). One of them costs a third of
# what it costs to train on an image, so a quarter of the images adds a twelfth to an epoch.
_MOST_IMAGES = 512
_LEAST_IMAGES = 128
_SHARE = 0.25


def find_batch_norms(model: Any) -> list[Any]:
    """Return the BatchNorm layers of a model."""
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def synchronize_batch_norm(model: Any, is_synchronized: bool) -> None:
    """Make the layers take their statistics over all workers, or over this worker's images by one fused kernel.

    It applies to calls with ``training=True`` that are traced afterwards.
    """
    for layer in find_batch_norms(model):
        layer.synchronized, layer.fused = is_synchronized, not is_synchronized


@contextlib.contextmanager
def without_idle_biases(model: Any) -> Iterator[None]:
    """Leave out the biases that training cannot use, in calls with ``training=True`` that are traced in the context.

    BatchNorm subtracts the mean of what they add to. Their gradients would be rounding noise, which Adam scales up.
    """
    layers = find_idle_biases(model)
    for layer in layers:
        layer.use_bias = False
    try:
        yield
    finally:
        for layer in layers:
            layer.use_bias = True


def find_idle_biases(model: Any) -> list[Any]:
    """Return the convolutions whose bias BatchNorm cancels in training."""
    before = [
        node.inbound_layers
        for norm in find_batch_norms(model)
        if norm.trainable  # else it subtracts a moving average
        for node in norm.inbound_nodes
    ]
    return [
        layer
        for layer in before
        if isinstance(layer, keras.layers.Conv2D)
        and layer.use_bias
        and layer.activation is keras.activations.linear
        and len(layer.outbound_nodes) == 1
    ]


def count_estimate_steps(rows: int, global_batch_size: int) -> int:
    """Return how many global batches of a train split an estimate takes."""
    images = min(_MOST_IMAGES, max(_LEAST_IMAGES, round(_SHARE * rows)))
    return min(rows // global_batch_size, math.ceil(images / global_batch_size))


def compile_estimate(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, int], None] | None:
    """Return ``estimate(images, number)``, which adds a batch to the averages; None if the network has none to learn.

    It takes uint8 ``[per_replica_batch_size, height, width, channels]`` and the number of the batch, from 0. Batch 0
    replaces the averages, so that nothing is left of earlier ones. All workers must call it.
    """
    layers = [layer for layer in find_batch_norms(network.model) if layer.trainable]
    if not layers:
        return None
    scale_pixels = build_scaling(manifest, config)

    def replica_step(images: Any, momentum: Any) -> None:
        use_masks(network.model, draw_masks(network.model, config, network.optimizer.iterations))
        # Over the global batch, whatever training does, so that all workers validate with the same averages.
        synchronize_batch_norm(network.model, True)
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = momentum  # while tracing
        network.model(scale_pixels(tf.cast(images, tf.float32)), training=True)
        for layer, before in zip(layers, momenta, strict=True):
            layer.momentum = before

    @tf.function  # type: ignore[untyped-decorator]
    def step(images: Any, momentum: Any) -> None:
        network.strategy.run(replica_step, args=(images, momentum))

    # With this momentum the moving average is the mean over all batches so far.
    return lambda images, number: step(images, tf.constant(number / (number + 1), tf.float32))
