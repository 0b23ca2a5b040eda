"""Findings from the metrics of a run: one line for each, with its evidence and what to try."""

from collections.abc import Sequence

import numpy as np

from trainer.record.epoch_row import Metrics
from trainer.record.evaluation_result import EvaluationResult

History = Sequence[Metrics]

# With a loss this close to that of guessing by class frequency, nothing was learned from the images.
_CHANCE_LOSS_SHARE = 0.95
# Relative rise of the validation loss over its lowest value that is more than noise between epochs.
_OVERFITTING_RISE = 0.15
# Relative fall of the validation loss over the last quarter of the epochs that suggests more epochs.
_STILL_FALLING = 0.05
# A change of the validation loss, in nats, too small to matter: a loss near zero changes by large factors.
_NEGLIGIBLE_CHANGE = 0.02
# Trends are not judged from fewer epochs.
_LEAST_EPOCHS = 8


def find_symptoms(history: History, val: EvaluationResult, reason: str = "") -> list[str]:
    """Return one line for each symptom of a run; none if it trained as it should.

    Args:
        history: one row of metrics per epoch.
        val: evaluation of the best checkpoint.
        reason: why the run ended early; empty if it did not.
    """
    found = [
        f"diverged: {reason}; try half the --base-learning-rate, --clip-norm 1, or more --warmup-epochs"
        if reason
        else "",
        _did_not_train(val),
        _training_loss_rose(history),
    ]
    if len(history) >= _LEAST_EPOCHS:
        found += [_overfitted(history), _still_improving(history), _saturated_early(history), _unsteady(history, val)]
    return [line for line in found if line]


def _did_not_train(val: EvaluationResult) -> str:
    counts = np.array([one.total for one in val.per_class if one.total])
    prior = counts / counts.sum()
    chance, prior_loss = float(prior.max()), float(-(prior * np.log(prior)).sum())
    low, high = val.accuracy_interval
    if low > chance or val.loss < _CHANCE_LOSS_SHARE * prior_loss:
        return ""
    return (
        f"did not train: {val.correct} of {val.total} correct ({low:.2f}-{high:.2f}) is no better than always "
        f"predicting the most frequent class ({chance:.2f}), and the loss {val.loss:.3f} is close to that of guessing "
        f"by class frequency ({prior_loss:.3f}); try --recipe modern, a --base-learning-rate ten times "
        "lower or higher, or batch_norm=true"
    )


def _training_loss_rose(history: History) -> str:
    first, last = history[0]["loss"], history[-1]["loss"]
    if len(history) < 2 or last <= first:
        return ""
    return (
        f"training loss rose from {first:.3f} (epoch 1) to {last:.3f} (epoch {len(history)}): the learning rate is too "
        "high, or the labels do not match the images; try a --base-learning-rate ten times lower, then look at the "
        "dataset's contact sheet"
    )


def _overfitted(history: History) -> str:
    losses = [row["val_loss"] for row in history]
    lowest = int(np.argmin(losses))
    least_rise = max(_OVERFITTING_RISE * losses[lowest], _NEGLIGIBLE_CHANGE)
    if losses[-1] < losses[lowest] + least_rise or history[-1]["loss"] >= history[lowest]["loss"]:
        return ""
    return (
        f"overfitting: val_loss rose from {losses[lowest]:.3f} (epoch {lowest + 1}) to {losses[-1]:.3f} while loss "
        f"fell from {history[lowest]['loss']:.3f} to {history[-1]['loss']:.3f}; try augmentation, --label-smoothing "
        f"0.1, more --weight-decay or dropout, or --epochs {lowest + 1}"
    )


def _still_improving(history: History) -> str:
    quarter = len(history) // 4
    before, last = (
        float(np.mean([row["val_loss"] for row in part]))
        for part in (history[-2 * quarter : -quarter], history[-quarter:])
    )
    if last > before - max(_STILL_FALLING * before, _NEGLIGIBLE_CHANGE):
        return ""
    return (
        f"still improving: mean val_loss fell from {before:.3f} to {last:.3f} over the last quarter of the epochs; try "
        f"--epochs {2 * len(history)}"
    )


def _saturated_early(history: History) -> str:
    losses = [row["val_loss"] for row in history]
    best = int(np.argmin(losses)) + 1
    if best > max(1, len(history) // 10):
        return ""
    return (
        f"saturated early: val_loss was lowest ({losses[best - 1]:.3f}) in epoch {best} of {len(history)}, within the "
        "first tenth; try a lower --base-learning-rate or fewer --epochs"
    )


def _unsteady(history: History, val: EvaluationResult) -> str:
    """Describe a validation accuracy that varies late in training, as the tuning playbook advises to look for."""
    late = [row["val_accuracy"] for row in history[-(len(history) // 4) :]]
    spread = max(late) - min(late)
    sampling_error = (val.accuracy * (1 - val.accuracy) / val.total) ** 0.5
    if spread <= max(4 * sampling_error, 0.05):
        return ""
    return (
        f"unsteady: val_accuracy ranged from {min(late):.3f} to {max(late):.3f} in the last quarter of the epochs, "
        f"{spread / max(sampling_error, 1 / val.total):.0f} times the sampling error; try --schedule cosine, a lower "
        "--base-learning-rate, a larger batch or --ema-momentum 0.99"
    )
