"""The network of a run: its model and its optimizer, the same on every worker under MultiWorkerMirroredStrategy."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.architectures import build_model
from trainer.config.config import TrainConfig
from trainer.runtime import compat
from trainer.runtime.errors import InputError
from trainer.training.augment import find_strengths
from trainer.training.devices import has_gpu
from trainer.training.optimizer import build_optimizer
from trainer.training.schedule import StagedSchedule, build_schedule
from trainer.training.stages import EpochPlan, full_augmentation
from trainer.training.transfer import LayerWeights, freeze_trunk, transfer_weights
from trainer.workers.backend import tolerate_silence


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
    """float32 ``[7]``, a variable: how much the training images are varied (`trainer.training.augment`)."""

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

    def has_finite_weights(self) -> bool:
        """Return whether no trained weight is NaN or infinite."""
        return bool(tf.reduce_all([tf.reduce_all(tf.math.is_finite(one)) for one in self.model.trainable_variables]))

    @property
    def optimizer_variables(self) -> list[Any]:
        """The state of the optimizer, including the loss scale, which Keras leaves out."""
        optimizer = self.optimizer
        if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
            return [*optimizer.variables, compat.loss_scale_variable(optimizer), optimizer.dynamic_counter]
        return list(optimizer.variables)


def build_network(
    manifest: Manifest,
    config: TrainConfig,
    steps_per_epoch: int,
    read_weights: Callable[[Any], LayerWeights] | None = None,
) -> Network:
    """Build the model and its optimizer with all variables, identical on every worker.

    Args:
        manifest: the manifest of the dataset.
        config: the config of the run.
        steps_per_epoch: number of optimizer steps per epoch.
        read_weights: returns the weights that layers of the model start from, by their names.

    Raises:
        InputError: the network cannot be built with these arguments, or cannot start from these weights.
    """
    strategy, model = _build_distributed_model(manifest, config, config.all_reduce)
    with strategy.scope():
        transferred = str(transfer_weights(model, read_weights(model))) if read_weights else ""
        if config.freeze_trunk:
            freeze_trunk(model)
        schedule = build_schedule(config, steps_per_epoch)
        optimizer = build_optimizer(config, schedule)
        optimizer.build(model.trainable_variables)
        strengths = tf.Variable(
            find_strengths(full_augmentation(config), config),
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
    if optimizer.averages:
        for variable, average in zip(network.model.trainable_variables, optimizer.averages, strict=True):
            # Not through the host.
            weights = tf.identity(variable)
            variable.assign(tf.identity(average))
            average.assign(weights)
