"""The compiled computations of a run: one training step, one evaluation batch, one gather over the workers.

All run under MultiWorkerMirroredStrategy with one replica a worker. They take and return this worker's own tensors;
what the workers share they share inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.architectures import build_model
from trainer.config import TrainConfig
from trainer.schedule import build_schedule

# Columns of what a training step returns, over the global batch.
STEP_LOSS, STEP_ACCURACY, STEP_GRAD_NORM, STEP_CLIPPED = range(4)


@dataclass(frozen=True)
class Network:
    """A model with its optimizer, made in the strategy's scope."""

    strategy: Any
    model: Any
    optimizer: Any


def pixel_scaling(manifest: Manifest, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Returns (scale, offset), one value a channel: the network sees ``pixel * scale + offset``."""
    if config.input_scaling == "unit":
        return [1 / 255] * manifest.channels, [0.0] * manifest.channels
    scale = [1 / max(std, 1.0) for std in manifest.pixel_std]
    return scale, [-mean * factor for mean, factor in zip(manifest.pixel_mean, scale, strict=True)]


def build_network(manifest: Manifest, config: TrainConfig, steps_per_epoch: int) -> Network:
    """Builds the model and its optimizer with all variables, the same on every worker."""
    keras.utils.set_random_seed(config.seed)
    keras.mixed_precision.set_global_policy(config.precision)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = _build_model(manifest, config)
        optimizer = _build_optimizer(config, build_schedule(config, steps_per_epoch))
        optimizer.build(model.trainable_variables)
    return Network(strategy, model, optimizer)


def _build_model(manifest: Manifest, config: TrainConfig) -> Any:
    shape = (manifest.image_size, manifest.channels, manifest.num_classes)
    return build_model(config.arch, *shape, config.arch_arguments)


def _build_optimizer(config: TrainConfig, schedule: Any) -> Any:
    if config.optimizer == "sgd":
        optimizer_class, options = keras.optimizers.SGD, {"momentum": config.momentum, "nesterov": config.nesterov}
    else:
        # Weight decay is decoupled in all of them, so Adam with decay is AdamW (Loshchilov & Hutter 2017).
        optimizer_class = keras.optimizers.Nadam if config.optimizer == "nadam" else keras.optimizers.Adam
        options = {"beta_1": config.beta_1, "beta_2": config.beta_2, "epsilon": config.epsilon}
    optimizer = optimizer_class(schedule, weight_decay=config.weight_decay or None, **options)
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimizer


def compile_train_step(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """Returns ``train_step(images, labels)``, which updates the model once.

    It takes uint8 ``[per_replica_batch_size, height, width, channels]`` and int32 ``[per_replica_batch_size]``. It
    returns float32 ``[4]``: mean cross-entropy, accuracy, L2 norm of the unclipped gradient and whether it was clipped,
    all over the global batch.
    """
    model, optimizer = network.model, network.optimizer
    scale, offset = map(tf.constant, pixel_scaling(manifest, config))
    smoothing, classes = config.label_smoothing, manifest.num_classes

    def replica_step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(tf.cast(images, tf.float32) * scale + offset, training=True)
            targets = tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
            # Divided by the global batch, so that the sum over the workers is its mean.
            objective = (
                tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, logits)) / config.global_batch_size
            )
        gradients = tape.gradient(objective, model.trainable_variables)
        cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        correct = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == labels, tf.float32)
        means = tf.stack([tf.reduce_sum(cross_entropy), tf.reduce_sum(correct)]) / config.global_batch_size
        *gradients, means = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, [*gradients, means]
        )
        norm = tf.linalg.global_norm(gradients)
        clipped = tf.constant(0.0)
        if config.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm, use_norm=norm)
            clipped = tf.cast(norm > config.clip_norm, tf.float32)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True), skip_gradients_aggregation=True
        )
        return tf.stack([means[0], means[1], norm, clipped])

    @tf.function  # type: ignore[untyped-decorator]
    def train_step(images: Any, labels: Any) -> Any:
        return network.strategy.run(replica_step, args=(images, labels))

    compiled: Callable[[Any, Any], Any] = train_step
    return compiled


def compile_eval_step(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """Returns ``eval_step(images, labels)``, which says of each row how the model judged it.

    It takes one batch of this worker's own and returns float32 ``[batch, 4]``, the columns of `trainer.evaluation`:
    cross-entropy, predicted label, its probability, and how many labels were thought likelier than the true one.
    """
    scale, offset = map(tf.constant, pixel_scaling(manifest, config))

    def replica_step(images: Any, labels: Any) -> Any:
        logits = network.model(tf.cast(images, tf.float32) * scale + offset, training=False)
        cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
        confidence = tf.reduce_max(tf.nn.softmax(logits), axis=1)
        true_logit = tf.gather(logits, labels, axis=1, batch_dims=1)
        likelier = tf.reduce_sum(tf.cast(logits > true_logit[:, None], tf.float32), axis=1)
        return tf.stack([cross_entropy, tf.cast(predicted, tf.float32), confidence, likelier], axis=1)

    @tf.function  # type: ignore[untyped-decorator]
    def eval_step(images: Any, labels: Any) -> Any:
        return network.strategy.run(replica_step, args=(images, labels))

    compiled: Callable[[Any, Any], Any] = eval_step
    return compiled


def compile_gather(network: Network) -> Callable[[Any], Any]:
    """Returns ``gather(values)``: float32 ``[rows, columns]`` of every worker, stacked by rank, on every worker."""

    def replica_gather(values: Any) -> Any:
        # The identity is on the replica's device, which is how the strategy learns where to gather to.
        return tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0)

    @tf.function  # type: ignore[untyped-decorator]
    def gather(values: Any) -> Any:
        return network.strategy.run(replica_gather, args=(values,))

    return lambda values: np.asarray(gather(tf.constant(values, tf.float32)))


def export_model(arrays: dict[str, Any], manifest: Manifest, config: TrainConfig, head: str) -> Any:
    """Returns a `tf_keras.Model` for use elsewhere, without strategy or mixed precision.

    It takes uint8 or float ``[batch, height, width, channels]`` with values 0-255 and gives float32 scores
    ``[batch, num_classes]``.
    """
    from trainer.checkpoint import assign_variables

    keras.mixed_precision.set_global_policy("float32")
    network = _build_model(manifest, config)
    assign_variables(network.variables, arrays)
    scale, offset = pixel_scaling(manifest, config)
    images = keras.Input((manifest.image_size, manifest.image_size, manifest.channels), name="images")
    scaled = keras.layers.Rescaling(scale, offset, name="pixel_scaling")(images)
    scores = keras.layers.Activation(head, name="scores")(network(scaled))
    return keras.Model(images, scores, name=config.arch)
