"""The averages of BatchNorm with which a network is validated and exported: those of training images as they are.

While it trains, the averages follow augmented images. Interpolation makes these smoother than the images that the
network is validated on, and a network whose weights are good can then be validated at chance. So before each
validation the averages are estimated anew, with the weights of the moment, on images that are not augmented (Izmailov
et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2, do so for averaged weights). Training does not use them.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig
from trainer.training.dropout import fix_dropout
from trainer.training.network import Network
from trainer.training.scaling import build_scaling

# Images that an estimate is made of: enough for averages over all their pixels, and few beside an epoch.
_IMAGES = 1024


def count_estimate_steps(rows: int, global_batch_size: int) -> int:
    """Return how many global batches of a train split an estimate takes."""
    return min(rows // global_batch_size, -(-_IMAGES // global_batch_size))


def compile_estimate(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, int], None] | None:
    """Return ``estimate(images, number)``, which adds a batch to the averages; None if the network has none to learn.

    It takes uint8 ``[per_replica_batch_size, height, width, channels]`` and the number of the batch, from 0. Batch 0
    replaces the averages, so that nothing is left of earlier ones. All workers must call it.
    """
    layers = [
        layer
        for layer in network.model.layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if not layers:
        return None
    scale_pixels = build_scaling(manifest, config)

    def replica_step(images: Any, momentum: Any) -> None:
        # Another computation may have traced dropout with tensors of its own.
        fix_dropout(network.model, network.optimizer, config)
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
