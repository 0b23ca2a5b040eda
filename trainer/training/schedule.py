"""The learning rate schedule."""

from typing import Any

import tensorflow as tf
from tf_keras.optimizers import schedules

from trainer.config.config import TrainConfig


def build_schedule(config: TrainConfig, steps_per_epoch: int) -> Any:
    """Return a `tf_keras` learning rate schedule: a function of the optimizer step, counted from 0.

    The rate rises linearly to the peak during warmup, then stays constant, decays to zero along a cosine, or follows
    the epochs (`StagedSchedule`). Warmup takes at most a tenth of all steps (tuning playbook, B50).
    """
    num_steps = config.epochs * steps_per_epoch
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), num_steps // 10)
    peak = config.peak_learning_rate
    first = peak / (warmup_steps + 1)  # not zero, so that the first step has an effect
    if config.schedule == "cosine":
        return schedules.CosineDecay(
            first if warmup_steps else peak,
            decay_steps=num_steps - warmup_steps,
            warmup_target=peak if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    constant = schedules.PolynomialDecay(first, decay_steps=max(1, warmup_steps), end_learning_rate=peak)
    return StagedSchedule(constant) if config.schedule == "plateau" else constant


class StagedSchedule(schedules.LearningRateSchedule):
    """A schedule times a factor that changes linearly over an epoch; each epoch sets it again.

    Args:
        schedule: a function of the optimizer step.
    """

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule
        self._first_step, self._num_steps, self._first_factor, self._last_factor = (
            tf.Variable(value, trainable=False, dtype=tf.float32, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
            for value in (0, 1, 1, 1)
        )

    def start_epoch(self, first_step: int, num_steps: int, first_factor: float, last_factor: float) -> None:
        """Set the factor at the first optimizer step of an epoch and after its last one."""
        self._first_step.assign(first_step)
        self._num_steps.assign(num_steps)
        self._first_factor.assign(first_factor)
        self._last_factor.assign(last_factor)

    def __call__(self, step: Any) -> Any:
        """Return the learning rate at an optimizer step."""
        done = (tf.cast(step, tf.float32) - self._first_step) / self._num_steps
        return self._schedule(step) * (self._first_factor + (self._last_factor - self._first_factor) * done)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, as Keras asks of every schedule."""
        return {"schedule": self._schedule}
