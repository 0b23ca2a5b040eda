"""The learning rate schedule."""

from typing import Any

from trainer.config.config import TrainConfig


def build_schedule(config: TrainConfig, steps_per_epoch: int) -> Any:
    """Return a `tf_keras` learning rate schedule: a function of the optimizer step, counted from 0.

    The rate rises linearly to the peak during warmup, then stays constant or decays to zero along a cosine. Warmup
    takes at most a tenth of all steps (tuning playbook, B50).
    """
    from tf_keras.optimizers import schedules

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
    return schedules.PolynomialDecay(first, decay_steps=max(1, warmup_steps), end_learning_rate=peak)
