"""The compiled computations of a run: one training step, one evaluation batch, one gather over the workers.

All run under MultiWorkerMirroredStrategy with one replica per worker. They take and return this worker's own tensors,
and communicate with the other workers inside.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.architectures import build_model
from trainer.config.config import TrainConfig
from trainer.runtime import compat
from trainer.runtime.errors import InputError
from trainer.training.augment import augment, find_strengths
from trainer.training.devices import has_gpu
from trainer.training.dropout import fix_dropout
from trainer.training.scaling import build_scaling
from trainer.training.schedule import StagedSchedule, build_schedule
from trainer.training.stages import EpochPlan, list_augmentations
from trainer.training.transfer import LayerWeights, freeze_trunk, transfer_weights
from trainer.workers.backend import tolerate_silence

# Without a size, all gradients form one pack, which is exchanged after the backward pass. With one, the gradients of
# the last layers are exchanged while those of the first are computed (docs/performance.md).
_PACKS = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=32 * 2**20)
# The columns that a training step returns, over the global batch.
STEP_LOSS, STEP_ACCURACY, STEP_GRAD_NORM, STEP_CLIPPED, STEP_GRAD_NOISE = range(5)


@dataclass(frozen=True)
class Network:
    """A model and its optimizer, created in the strategy's scope."""

    strategy: Any
    model: Any
    optimizer: Any
    transferred: str
    """Which layers started from other weights, in words; empty if none did."""
    schedule: Any = None
    """The learning rate schedule of the optimizer."""
    strengths: Any = None
    """float32 ``[5]``, a variable: how much the training images are varied (`trainer.training.augment`)."""

    def start_epoch(self, plan: EpochPlan, config: TrainConfig, first_step: int, num_steps: int) -> None:
        """Train the next epoch as planned.

        Args:
            plan: how.
            config: the config of the run.
            first_step: the optimizer step at which the epoch started.
            num_steps: optimizer steps of an epoch.
        """
        self.strengths.assign(find_strengths(plan.augmentation, config))
        if isinstance(self.schedule, StagedSchedule):
            self.schedule.start_epoch(first_step, num_steps, plan.first_rate, plan.last_rate)

    @property
    def optimizer_variables(self) -> list[Any]:
        """The state of the optimizer, including the loss scale, which Keras leaves out."""
        optimizer = self.optimizer
        if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
            return [*optimizer.variables, compat.loss_scale_variable(optimizer), optimizer.dynamic_counter]
        return list(optimizer.variables)


def build_network(
    manifest: Manifest, config: TrainConfig, steps_per_epoch: int, initial_weights: LayerWeights | None = None
) -> Network:
    """Build the model and its optimizer with all variables, identical on every worker.

    Args:
        manifest: the manifest of the dataset.
        config: the config of the run.
        steps_per_epoch: number of optimizer steps per epoch.
        initial_weights: weights of another network, which layers of the same name start from.

    Raises:
        InputError: the network cannot be built with these arguments, or cannot start from these weights.
    """
    strategy, model = _build_distributed_model(manifest, config, config.all_reduce)
    with strategy.scope():
        transferred = str(transfer_weights(model, initial_weights)) if initial_weights else ""
        if config.freeze_trunk:
            freeze_trunk(model)
        schedule = build_schedule(config, steps_per_epoch)
        optimizer = _build_optimizer(config, schedule)
        optimizer.build(model.trainable_variables)
        strengths = tf.Variable(
            find_strengths(list_augmentations(config)[-1], config),
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
    return Network(strategy, model, optimizer, transferred, schedule, strengths)


def build_network_for_evaluation(manifest: Manifest, config: TrainConfig) -> Network:
    """Build the model without an optimizer, whose variables can take twice the memory of the model's."""
    # One process, which may have no GPU where the run had some.
    return Network(*_build_distributed_model(manifest, config, "auto"), optimizer=None, transferred="")


def _build_distributed_model(manifest: Manifest, config: TrainConfig, all_reduce: str) -> tuple[Any, Any]:
    keras.utils.set_random_seed(config.seed)
    keras.mixed_precision.set_global_policy(config.precision)
    tolerate_silence()
    strategy = _join_workers(all_reduce)
    with strategy.scope():
        try:
            model = build_model(
                config.arch, manifest.image_size, manifest.channels, manifest.num_classes, config.arch_arguments
            )
        except ValueError as error:
            raise InputError(
                f"--arch {config.arch} with --arch-argument {config.arch_arguments} cannot be built for images of "
                f"{manifest.image_size} pixels: {str(error).splitlines()[0]}"
            ) from error
    return strategy, model


@functools.cache
def _join_workers(all_reduce: str) -> Any:
    """Return the strategy of this process: its workers can be joined once only, and several networks share them."""
    # Of the strategy, not of each call: BatchNorm and validation communicate too.
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=choose_communication(all_reduce))


def choose_communication(all_reduce: str) -> Any:
    """Return the `tf.distribute.experimental.CommunicationOptions` for ``--all-reduce``.

    Raises:
        InputError: it is nccl, and this worker has no GPU.
    """
    if all_reduce == "nccl" and not has_gpu():
        raise InputError("--all-reduce nccl needs workers with GPUs; give auto or ring")
    kinds = tf.distribute.experimental.CommunicationImplementation
    # TensorFlow's own AUTO is never NCCL.
    kind = {"nccl": kinds.NCCL, "ring": kinds.RING}.get(all_reduce, kinds.NCCL if has_gpu() else kinds.AUTO)
    return tf.distribute.experimental.CommunicationOptions(implementation=kind)


def _build_optimizer(config: TrainConfig, schedule: Any) -> Any:
    # Weight decay is decoupled in all of them, so Adam with decay is AdamW (Loshchilov & Hutter 2017).
    optimizer_class = {"sgd": keras.optimizers.SGD, "nadam": keras.optimizers.Nadam}.get(
        config.optimizer, keras.optimizers.Adam
    )
    options: dict[str, Any] = dict(config.optimizer_arguments)
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    if config.ema_momentum:
        # `averaged_weights` says when the averages are used.
        options |= {"use_ema": True, "ema_momentum": config.ema_momentum}
    optimizer = optimizer_class(schedule, weight_decay=config.weight_decay or None, **options)
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    if config.precision == "mixed_float16":
        # Small gradients vanish in float16; a step whose scaled gradients overflow is skipped.
        return keras.mixed_precision.LossScaleOptimizer(optimizer)
    return optimizer


@contextlib.contextmanager
def averaged_weights(network: Network) -> Iterator[None]:
    """Swap the trainable weights with their moving averages, which the optimizer keeps, within the context.

    Checkpoints are saved and restored in the context: the model then holds what was validated, and the optimizer what
    training continues from. Without ``ema_momentum`` nothing is swapped.
    """
    _swap_averages(network)
    try:
        yield
    finally:
        _swap_averages(network)


def _swap_averages(network: Network) -> None:
    optimizer = getattr(network.optimizer, "inner_optimizer", network.optimizer)
    if optimizer.use_ema:
        for variable, average in zip(network.model.trainable_variables, compat.moving_averages(optimizer), strict=True):
            weights = variable.numpy()
            variable.assign(average.numpy())
            average.assign(weights)


def _class_weights(manifest: Manifest, config: TrainConfig) -> list[float]:
    """Return the weight of each class; the mean over the train split is 1."""
    rows = manifest.splits["train"].rows_per_class
    if config.class_weights == "none":
        return [1.0] * len(rows)
    present = sum(count > 0 for count in rows)
    return [sum(rows) / (present * count) if count else 0.0 for count in rows]


def build_gradients(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """Return ``gradients(images, labels)`` for this replica's share of the training objective.

    It takes float32 images with pixels from 0 to 255, augmented, and int32 labels. It returns a list with the gradient
    of each trainable variable, and the logits. The gradients are divided by the global batch of the config, so that
    their sum over the workers is that of its mean loss.
    """
    model, optimizer = network.model, network.optimizer
    scale_pixels = build_scaling(manifest, config)
    smoothing, classes = config.label_smoothing, manifest.num_classes
    scales_loss = config.precision == "mixed_float16"
    class_weights = tf.constant(_class_weights(manifest, config), tf.float32)

    def gradients_of(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(scale_pixels(images), training=True)
            targets = tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
            losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits) * tf.gather(class_weights, labels)
            objective = tf.reduce_sum(losses) / config.global_batch_size
            if scales_loss:
                objective = optimizer.get_scaled_loss(objective)
        gradients = tape.gradient(objective, model.trainable_variables)
        if scales_loss:
            gradients = optimizer.get_unscaled_gradients(gradients)
        return gradients, logits

    return gradients_of


def sum_over_workers(gradients: list[Any], means: Any, config: TrainConfig) -> tuple[list[Any], Any]:
    """Return the sums of the gradients and of a float32 tensor over the workers; called by each replica."""
    if config.num_workers == 1:
        return gradients, means
    context, total = tf.distribute.get_replica_context(), tf.distribute.ReduceOp.SUM
    if config.gradient_exchange == "float32":
        *gradients, means = context.all_reduce(total, [*gradients, means], options=_PACKS)
        return gradients, means
    # A pack has tensors of one type.
    sums = context.all_reduce(total, [tf.cast(one, tf.bfloat16) for one in gradients], options=_PACKS)
    return [tf.cast(one, tf.float32) for one in sums], context.all_reduce(total, means)


def compile_train_step(network: Network, manifest: Manifest, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """Return ``train_step(images, labels)``, which updates the model once.

    It takes uint8 ``[per_replica_batch_size, height, width, channels]`` and int32 ``[per_replica_batch_size]``. It
    returns float32 ``[5]`` over the global batch: mean cross-entropy, accuracy, L2 norm of the unclipped gradient,
    whether the gradient was clipped, and the noise of the gradient, `trainer.record.noise_scale`: NaN with one worker
    (`trainer.training.noise`).
    """
    model, optimizer = network.model, network.optimizer
    gradients_of = build_gradients(network, manifest, config)

    def replica_step(images: Any, labels: Any) -> Any:
        fix_dropout(model, optimizer, config)  # while tracing, for this batch size
        augmented = augment(tf.cast(images, tf.float32), optimizer.iterations, network.strengths, config)
        gradients, logits = gradients_of(augmented, labels)
        cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        correct = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == labels, tf.float32)
        # This worker's gradient is of a part of the batch; its length comes with the exchange that there is anyway.
        own = tf.linalg.global_norm(gradients) * config.num_workers if config.num_workers > 1 else tf.constant(0.0)
        means = tf.stack([tf.reduce_sum(cross_entropy), tf.reduce_sum(correct)]) / config.global_batch_size
        means = tf.concat([means, [own**2 / config.num_workers]], axis=0)
        gradients, means = sum_over_workers(gradients, means, config)
        norm = tf.linalg.global_norm(gradients)
        clipped = tf.constant(0.0)
        if config.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm, use_norm=norm)
            clipped = tf.cast(norm > config.clip_norm, tf.float32)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True), skip_gradients_aggregation=True
        )
        noise = tf.constant(float("nan"))
        if config.num_workers > 1:
            noise = (means[2] - norm**2) * config.global_batch_size / (config.num_workers - 1)
        return tf.stack([means[0], means[1], norm, clipped, noise])

    @tf.function  # type: ignore[untyped-decorator]
    def train_step(images: Any, labels: Any) -> Any:
        return network.strategy.run(replica_step, args=(images, labels))

    compiled: Callable[[Any, Any], Any] = train_step
    return compiled


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
