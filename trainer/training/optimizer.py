"""The optimizer of a run: those of Keras, with each update done in one pass over the weights, and with their averages.

Keras writes an update as a dozen operations, each of which reads and writes as much memory as there are weights. On
CPUs that takes as long as half of a batch where a network has many (docs/performance.md). TensorFlow has operations
that do all of it at once, by the same formula.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras as keras

from trainer.config.config import TrainConfig
from trainer.runtime import compat
from trainer.training.devices import has_gpu

# So small that a weight less this share of its gradient is the weight, and that its inverse is finite in float32.
_NOTHING = 1e-30


def _decay(variable: Any, share: Any, gradient: Any) -> None:
    """Multiply a variable by ``1 - share``, which is rounded to a multiple of 1.2e-7.

    The gradient is any tensor of its shape.
    """
    ratio = share / (1 - share)
    _update(variable, share, variable.read_value, tf.cast(_NOTHING, variable.dtype), ratio / _NOTHING, gradient)


def _approach(variable: Any, share: Any, target: Any) -> None:
    """Add ``share * (target - variable)`` to a variable."""
    _update(variable, share, lambda: variable - target, -share / (1 - share), -tf.ones((), variable.dtype), target)


def _update(variable: Any, share: Any, distance: Callable[[], Any], alpha: Any, l2: Any, delta: Any) -> None:
    """Set a variable to ``(variable - alpha * delta) / (1 + alpha * l2)``, which is ``variable - share * distance()``.

    The first formula is that of one operation, which has no kernel for GPUs; there XLA makes one pass of the second.
    """
    if has_gpu():
        tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=share, delta=distance())
        return
    tf.raw_ops.ResourceApplyProximalGradientDescent(
        var=variable.handle, alpha=alpha, l1=tf.zeros((), variable.dtype), l2=l2, delta=delta
    )


class _Optimizer:
    """An optimizer of Keras with weight decay, and with a moving average of each weight.

    Keras has such averages too. They start as the initial weights, of which much is left after an epoch of few steps;
    here an average is of few steps as long as there were only few (`trainer.training.network.averaged_weights`).
    """

    decay = 0.0
    """Decoupled weight decay of the kernels: all variables but those of one dimension, biases and BatchNorm's."""
    average_momentum = 0.0
    """Share of the average that a step keeps; 0 for no averages."""
    averages: Sequence[Any] = ()
    """In the order of the weights."""

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the variables."""
        if self.average_momentum and not self.averages:
            self.averages = [
                self.add_variable_from_reference(variable, "average", initial_value=variable)  # type: ignore[attr-defined]
                for variable in var_list
            ]
        super().build(var_list)  # type: ignore[misc]

    def update_step(self, gradient: Any, variable: Any) -> None:
        """Update a weight and what is kept of it."""
        if self.decay and len(variable.shape) > 1:
            rate = tf.cast(self.learning_rate, variable.dtype)  # type: ignore[attr-defined]
            _decay(variable, rate * self.decay, gradient)
        self.update_weight(gradient, variable)
        if self.averages:
            average = self.averages[compat.index_of(self, variable)]
            steps = tf.cast(self.iterations, variable.dtype)  # type: ignore[attr-defined]
            momentum = tf.minimum(tf.cast(self.average_momentum, variable.dtype), (1 + steps) / (10 + steps))
            _approach(average, 1 - momentum, variable.read_value())

    def update_weight(self, gradient: Any, variable: Any) -> None:
        """Update a weight."""
        super().update_step(gradient, variable)  # type: ignore[misc]


class Adam(_Optimizer, keras.optimizers.Adam):
    """Adam for dense gradients, without amsgrad."""

    def update_weight(self, gradient: Any, variable: Any) -> None:
        """Update a weight and its two moments."""
        step = tf.cast(self.iterations + 1, variable.dtype)
        beta_1, beta_2, rate, epsilon = (
            tf.cast(value, variable.dtype) for value in (self.beta_1, self.beta_2, self.learning_rate, self.epsilon)
        )
        momentum, velocity = compat.moments_of(self, variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=momentum.handle,
            v=velocity.handle,
            beta1_power=beta_1**step,
            beta2_power=beta_2**step,
            lr=rate,
            beta1=beta_1,
            beta2=beta_2,
            epsilon=epsilon,
            grad=gradient,
        )


class SGD(_Optimizer, keras.optimizers.SGD):
    """SGD for dense gradients."""

    def update_weight(self, gradient: Any, variable: Any) -> None:
        """Update a weight and its momentum."""
        (momentum,) = compat.moments_of(self, variable)
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=momentum.handle,
            lr=tf.cast(self.learning_rate, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self.momentum, variable.dtype),
            use_nesterov=self.nesterov,
        )


class Nadam(_Optimizer, keras.optimizers.Nadam):
    """Nadam, by the update of Keras."""


def build_optimizer(config: TrainConfig, schedule: Any) -> Any:
    """Return the optimizer of a run, without its variables.

    Args:
        config: the config of the run.
        schedule: the learning rate schedule.
    """
    # Weight decay is decoupled in all of them, so Adam with decay is AdamW (Loshchilov & Hutter 2017).
    optimizer_class = {"sgd": SGD, "nadam": Nadam}.get(config.optimizer, Adam)
    # Keras would compile the update of each variable by itself on a GPU.
    options: dict[str, Any] = {**config.optimizer_arguments, "jit_compile": False}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    optimizer: Any = optimizer_class(schedule, **options)
    optimizer.decay, optimizer.average_momentum = config.weight_decay, config.ema_momentum
    if config.precision == "mixed_float16":
        # Small gradients vanish in float16; a step whose scaled gradients overflow is skipped.
        return keras.mixed_precision.LossScaleOptimizer(optimizer)
    return optimizer
