"""The compiled computations of a run: one training step, one evaluation batch, one gather over the workers.

All run under MultiWorkerMirroredStrategy with one replica per worker. They take and return this worker's own tensors,
and communicate with the other workers inside.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from data_prep.manifest import Manifest
from trainer.config.config import MIXES, TrainConfig
from trainer.runtime.compat import number_functions_alike
from trainer.training.augment import augment
from trainer.training.batch_norm import synchronize_batch_norm, without_idle_biases
from trainer.training.dropout import draw_masks, use_masks
from trainer.training.mixing import mix
from trainer.training.network import Network
from trainer.training.scaling import build_scaling

# Without a size, all gradients form one pack, which is exchanged after the backward pass. With one, the gradients of
# the last layers are exchanged while those of the first are computed (docs/performance.md).
_PACKS = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=32 * 2**20)
# The columns that a training step returns, over the global batch.
STEP_COLUMNS = 5
STEP_LOSS, STEP_ACCURACY, STEP_GRAD_NORM, STEP_CLIPPED, STEP_GRAD_NOISE = range(STEP_COLUMNS)


def _class_weights(manifest: Manifest, config: TrainConfig) -> list[float]:
    """Return the weight of each class; the mean over the train split is 1."""
    rows = manifest.splits["train"].rows_per_class
    if config.class_weights == "none":
        return [1.0] * len(rows)
    present = sum(count > 0 for count in rows)
    return [sum(rows) / (present * count) if count else 0.0 for count in rows]


def build_gradients(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any, Any], Any]:
    """Return ``gradients(images, targets, masks)`` for this replica's share of the training objective.

    It takes float32 images with pixels from 0 to 255 and float32 ``[rows, classes]``, of `vary_batch`, and what Dropout
    keeps (`trainer.training.dropout.draw_masks`). It returns a list with the gradient of each trainable variable, and
    the logits. The gradients are divided by the global batch of the config, so that their sum over the workers is that
    of its mean loss.
    """
    model, optimizer = network.model, network.optimizer
    scale_pixels = build_scaling(manifest, config)
    smoothing, classes = config.label_smoothing, manifest.num_classes
    scales_loss = config.precision == "mixed_float16"
    class_weights = tf.constant(_class_weights(manifest, config), tf.float32)

    def gradients_of(images: Any, targets: Any, masks: Any) -> Any:
        # While tracing: other computations trace the same layers in another way.
        use_masks(model, masks)
        synchronize_batch_norm(model, config.synchronizes_batch_norm)
        with tf.GradientTape() as tape:
            with without_idle_biases(model):
                logits = model(scale_pixels(images), training=True)
            # A mixture has the sum of the weighted losses of what it shows.
            weighted = targets * class_weights
            weights = tf.reduce_sum(weighted, axis=1)
            smoothed = tf.math.divide_no_nan(weighted, weights[:, None]) * (1 - smoothing) + smoothing / classes
            losses = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits) * weights
            objective = tf.reduce_sum(losses) / config.global_batch_size
            if scales_loss:
                objective = optimizer.get_scaled_loss(objective)
        # Zero for the biases that are left out.
        zero = tf.UnconnectedGradients.ZERO
        gradients = tape.gradient(objective, model.trainable_variables, unconnected_gradients=zero)
        if scales_loss:
            gradients = optimizer.get_unscaled_gradients(gradients)
        return gradients, logits

    return gradients_of


def vary_batch(
    images: Any,
    labels: Any,
    network: Network,
    manifest: Manifest,
    config: TrainConfig,
    first: Any = 0,
    rows: int | None = None,
) -> tuple[Any, Any]:
    """Return this replica's training images, or some of them, augmented, and what they show.

    Args:
        images: uint8 ``[per_replica_batch_size, height, width, channels]``.
        labels: int32 ``[per_replica_batch_size]``.
        network: the step and the strengths.
        manifest: the manifest of the dataset.
        config: the config of the run.
        first: int scalar, the first row to return.
        rows: how many; None for all.

    Returns:
        float32 images with pixels from 0 to 255, and float32 ``[rows, classes]``: 1 for the label, or the shares of
        the images that were mixed (`trainer.training.mixing`).
    """
    step, strengths = network.optimizer.iterations, network.strengths
    chosen = slice(first, None if rows is None else first + rows)
    augmented = augment(tf.cast(images, tf.float32), step, strengths, config)[chosen]
    mixup, cutmix = tf.unstack(strengths)[-len(MIXES) :]
    return mix(augmented, tf.one_hot(labels[chosen], manifest.num_classes), step, mixup, cutmix, config)


def sum_over_workers(gradients: list[Any], means: Any, config: TrainConfig) -> tuple[list[Any], Any]:
    """Return the sums of the gradients and of a float32 tensor over the workers; called by each replica."""
    if config.num_workers == 1:
        return gradients, means
    # The strategy finds the device to reduce on from the operation that makes a tensor; an argument has none.
    gradients, means = [tf.identity(one) for one in gradients], tf.identity(means)
    context, total = tf.distribute.get_replica_context(), tf.distribute.ReduceOp.SUM
    if config.gradient_exchange == "float32":
        *gradients, means = context.all_reduce(total, [*gradients, means], options=_PACKS)
        return gradients, means
    # A pack has tensors of one type.
    sums = context.all_reduce(total, [tf.cast(one, tf.bfloat16) for one in gradients], options=_PACKS)
    return [tf.cast(one, tf.float32) for one in sums], context.all_reduce(total, means)


def compile_train_step(
    network: Network, manifest: Manifest, config: TrainConfig, *, use_xla: bool = False
) -> Callable[[Any, Any], Any]:
    """Return ``train_step(images, labels)``, a `tf.function` that updates the model once.

    It takes uint8 ``[per_replica_batch_size, height, width, channels]`` and int32 ``[per_replica_batch_size]``. It
    returns float32 ``[5]`` over the global batch: mean cross-entropy, accuracy, L2 norm of the unclipped gradient,
    whether the gradient was clipped, and the noise of the gradient, `trainer.record.noise_scale`: NaN with one worker
    (`trainer.training.noise`).

    Args:
        network: the network.
        manifest: the manifest of the dataset.
        config: the config of the run.
        use_xla: compile the step by XLA: one program for one worker, else one before and one after the exchange.
    """
    step = _build_step(network, manifest, config, use_xla)

    @tf.function  # type: ignore[untyped-decorator]
    def train_step(images: Any, labels: Any) -> Any:
        return step(images, labels)

    compiled: Callable[[Any, Any], Any] = train_step
    return compiled


def compile_execution(
    network: Network, manifest: Manifest, config: TrainConfig, *, use_xla: bool = False, repeats: bool = False
) -> Callable[[Any, Any], Any]:
    """Return ``execute(images, labels)``, a `tf.function` that takes several steps of `compile_train_step`.

    It takes the batches of some steps, uint8 ``[steps, per_replica_batch_size, height, width, channels]`` and int32
    ``[steps, per_replica_batch_size]``, and returns float32 ``[steps, 5]``.

    Args:
        network: the network.
        manifest: the manifest of the dataset.
        config: the config of the run.
        use_xla: compile the step by XLA.
        repeats: take any number of steps; else there must be one.
    """
    step = _build_step(network, manifest, config, use_xla)
    images_shape = [None, config.per_replica_batch_size, manifest.image_size, manifest.image_size, manifest.channels]
    signature = [tf.TensorSpec(images_shape, tf.uint8), tf.TensorSpec(images_shape[:2], tf.int32)]

    @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
    def execute(images: Any, labels: Any) -> Any:
        if not repeats:
            return step(tf.squeeze(images, 0), tf.squeeze(labels, 0))[None]
        # Over the numbers: a GPU has no kernels for lists of uint8, and the images would go through the host.
        return tf.map_fn(
            lambda number: step(images[number], labels[number]),
            tf.range(tf.shape(images)[0]),
            parallel_iterations=1,
            fn_output_signature=tf.TensorSpec([STEP_COLUMNS], tf.float32),
        )

    compiled: Callable[[Any, Any], Any] = execute
    return compiled


def _build_step(network: Network, manifest: Manifest, config: TrainConfig, use_xla: bool) -> Callable[[Any, Any], Any]:
    """Return the step of `compile_train_step` as a function to trace."""

    def run(*parts: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls parts on this replica, each with what the one before returned."""
        return lambda *values: network.strategy.run(functools.partial(_call_in_turn, parts), args=values)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        program = tf.function(function, jit_compile=True)

        def call(*values: Any) -> Any:
            # While tracing: a run that is resumed, in a process that measured nothing, finds the same program.
            number_functions_alike()
            return program(*values)

        return call

    parts = _TrainStep(network, manifest, config)
    if not use_xla:
        stages = [run(parts.prepare, parts.compute, parts.exchange, parts.update)]
    elif config.num_workers == 1:
        stages = [run(parts.prepare), compiled(run(parts.compute, parts.exchange, parts.update))]
    else:
        # XLA has no collectives for CPUs.
        stages = [run(parts.prepare), compiled(run(parts.compute)), run(parts.exchange), compiled(run(parts.update))]
    return functools.partial(_call_in_turn, stages)


def _call_in_turn(functions: Sequence[Callable[..., Any]], *values: Any) -> Any:
    """Call each function with the tuple that the one before returned, and return what the last one returns."""
    return functools.reduce(lambda taken, function: function(*taken), functions, values)


class _TrainStep:
    """The parts of a training step on one replica; each takes what the one before returns."""

    def __init__(self, network: Network, manifest: Manifest, config: TrainConfig) -> None:
        self._network, self._manifest, self._config = network, manifest, config
        self._gradients_of = build_gradients(network, manifest, config)

    def prepare(self, images: Any, labels: Any) -> tuple[Any, Any, Any]:
        """Augment the images and draw what Dropout keeps, which XLA cannot do or does with other random numbers."""
        network, config = self._network, self._config
        varied, targets = vary_batch(images, labels, network, self._manifest, config)
        return varied, targets, draw_masks(network.model, config, network.optimizer.iterations)

    def compute(self, images: Any, targets: Any, masks: Any) -> tuple[Any, Any]:
        """Return this replica's gradients and its part of the means: cross-entropy, accuracy, its gradient's length."""
        config = self._config
        gradients, logits = self._gradients_of(images, targets, masks)
        cross_entropy = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        # Of an image that was mixed, the larger part counts.
        correct = tf.cast(tf.argmax(logits, axis=1) == tf.argmax(targets, axis=1), tf.float32)
        # This worker's gradient is of a part of the batch; its length comes with the exchange that there is anyway.
        own = tf.linalg.global_norm(gradients) * config.num_workers if config.num_workers > 1 else tf.constant(0.0)
        means = tf.stack([tf.reduce_sum(cross_entropy), tf.reduce_sum(correct)]) / config.global_batch_size
        return gradients, tf.concat([means, [own**2 / config.num_workers]], axis=0)

    def exchange(self, gradients: list[Any], means: Any) -> tuple[list[Any], Any]:
        """Return the sums over the workers."""
        return sum_over_workers(gradients, means, self._config)

    def update(self, gradients: list[Any], means: Any) -> Any:
        """Update the model, and return the columns of the step."""
        config = self._config
        norm = tf.linalg.global_norm(gradients)
        clipped = tf.constant(0.0)
        if config.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm, use_norm=norm)
            clipped = tf.cast(norm > config.clip_norm, tf.float32)
        self._network.optimizer.apply_gradients(
            zip(gradients, self._network.model.trainable_variables, strict=True), skip_gradients_aggregation=True
        )
        noise = tf.constant(float("nan"))
        if config.num_workers > 1:
            noise = (means[2] - norm**2) * config.global_batch_size / (config.num_workers - 1)
        return tf.stack([means[0], means[1], norm, clipped, noise])


def compile_eval_step(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """Return ``eval_step(images, labels)``, which predicts each row and compares it to its label.

    It takes a batch of this worker and returns float32 ``[batch, 4]``, the columns of
    `trainer.training.evaluation`: cross-entropy, predicted label, its probability, and how many labels were
    predicted as more likely than the true one.
    """
    scale_pixels = build_scaling(manifest, config)

    def replica_step(images: Any, labels: Any) -> Any:
        logits = network.model(scale_pixels(tf.cast(images, tf.float32)), training=False)
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
    """Return ``gather(values)``: float32 ``[rows, columns]`` of every worker, stacked by rank, on every worker."""
    if network.strategy.num_replicas_in_sync == 1:
        return lambda values: np.array(values, np.float32)

    def replica_gather(values: Any) -> Any:
        # The identity is on the replica's device, which tells the strategy where to gather to.
        return tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0)

    @tf.function  # type: ignore[untyped-decorator]
    def gather(values: Any) -> Any:
        return network.strategy.run(replica_gather, args=(values,))

    return lambda values: np.asarray(gather(tf.constant(values, tf.float32)))
