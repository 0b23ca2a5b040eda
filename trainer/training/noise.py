"""The noise of the gradient with one worker: every so often, the gradients of the two halves of a batch.

With several workers each has the gradient of its own part of the batch, so the training step itself compares these
with their mean. One worker has the gradient of the whole batch only.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig, replace_values
from trainer.training.dropout import draw_masks
from trainer.training.network import Network
from trainer.training.step import STEP_GRAD_NOISE, build_gradients, vary_batch

# One measurement takes about as long as one step without its update, so this is less than 1% of the time. It depends on
# the number of the step alone, so that a resumed run measures at the same steps.
STEPS_BETWEEN = 128
# Not the first step: the gradients of the initial weights are like no others.
FIRST_STEP = 32


def add_noise(
    take_steps: Callable[[Any, Any], Any], network: Network, manifest: Manifest, config: TrainConfig
) -> Callable[[Any, Any, int], Any]:
    """Return ``take_steps(images, labels, number)``, which also measures the noise of the gradient at some steps.

    It takes the number of the first step. If that is one of them, it is measured; no other may be.

    Args:
        take_steps: from `trainer.training.step.compile_execution`.
        network: what it trains.
        manifest: the manifest of the dataset.
        config: the config of the run.
    """
    if config.num_workers > 1:
        return lambda images, labels, number: take_steps(images, labels)
    measure = compile_noise(network, manifest, config) if config.global_batch_size > 1 else None

    def measured_steps(images: Any, labels: Any, number: int) -> Any:
        if measure is None or number % STEPS_BETWEEN != FIRST_STEP:
            return take_steps(images, labels)
        # Before the update, for the weights that the step's own gradient is of.
        noise = measure(images[0], labels[0])
        return tf.tensor_scatter_nd_update(take_steps(images, labels), [[0, STEP_GRAD_NOISE]], [noise])

    return measured_steps


def compile_noise(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """Return ``noise(images, labels)``: the noise of the gradient on a batch, float32 scalar, for one worker.

    Augmentation and dropout are those of the next training step, and nothing is changed: neither the weights nor the
    averages of BatchNorm.
    """
    model, optimizer, half = network.model, network.optimizer, config.global_batch_size // 2
    gradients_of = build_gradients(network, manifest, replace_values(config, global_batch_size=half))

    def half_gradients(images: Any, labels: Any, first: Any) -> Any:
        varied, targets = vary_batch(images, labels, network, manifest, config, first, half)
        averages = [tf.identity(variable) for variable in model.non_trainable_variables]
        masks = draw_masks(model, config, optimizer.iterations, first, half)
        gradients, _ = gradients_of(varied, targets, masks)
        for variable, average in zip(model.non_trainable_variables, averages, strict=True):
            variable.assign(average)
        return gradients

    @tf.function  # type: ignore[untyped-decorator]
    def halves(images: Any, labels: Any, first: Any) -> Any:
        return network.strategy.run(half_gradients, args=(images, labels, first))

    def noise(images: Any, labels: Any) -> Any:
        one, two = (halves(images, labels, tf.constant(first)) for first in (0, half))
        difference = tf.linalg.global_norm([before - after for before, after in zip(one, two, strict=True)])
        return difference**2 * half / 2

    return noise
