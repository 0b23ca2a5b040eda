"""Findings from the metrics of a run: one line for each, with its evidence and options to try.

Each function below tests for one symptom: its docstring says what is tested, the constants where the line is drawn and
why. The options that a finding names are to be added to the command of the run. Findings that exclude each other or ask
for opposite remedies never stand together: only the first of `_BROKEN` that holds is reported, and nothing else about
such a run; of `_CURVE`, too, only the first that holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config.config import AUGMENT_STRENGTHS, TrainConfig, has_mixture
from trainer.config.recipes import RECIPES, recipe_epochs
from trainer.record.epoch_row import Metrics, main_path
from trainer.record.evaluation_result import ClassResult, EvaluationResult
from trainer.runtime.markdown import format_count, format_loss

History = Sequence[Metrics]

# A loss this close to that of guessing by class frequency is that of guessing: a few epochs of noise cover the rest.
_CHANCE_LOSS_SHARE = 0.95
# A loss near zero changes by large factors; so much, in nats, changes no prediction.
_NEGLIGIBLE_CHANGE = 0.02
# Relative rise of the training loss since the first epoch: dropout and the order of the images make a few percent.
_TRAINING_RISE = 0.1
# Relative rise of the validation loss over its lowest value: neighboring epochs of a sound run differ by as much.
_OVERFITTING_RISE = 0.15
# One epoch can jump, and the next come back: the rise is that of the lowest of so many last epochs.
_RISEN_EPOCHS = 3
# Relative fall of the validation loss below its earlier minimum: smaller ones cost more epochs than they are worth.
_STILL_FALLING = 0.05
# A rate below this share of the highest has come down: that the loss falls then is what it came down for.
_FULL_RATE_SHARE = 0.5
# Late epochs whose accuracy differs by more than this, and by more than four sampling errors, differ by more than luck.
_LARGE_DROP = 0.05
_SAMPLING_ERRORS = 4
# Trends are not judged from fewer epochs: a quarter of them would be one.
_LEAST_EPOCHS = 8
# Small sets of ten classes had 0.95 of the training images correct after 200 to 300 steps (docs/LOG.md).
_FEW_STEPS = 300
_FITTED_ACCURACY = 0.95
# Recipes were tuned within a factor of two or three; other datasets ask for rates that differ by somewhat more.
_FAR_RATE = 10
# Above this accuracy an augmentation that is harder than the task costs little.
_LOW_ACCURACY = 0.9
# As wide as this, the interval cannot tell runs apart whose accuracies differ by ten points.
_WIDE_INTERVAL = 0.2
# A class without a correct prediction is no accident where that is rarer than this, over all classes.
_SIGNIFICANCE = 0.05
_MOST_CLASSES = 5


@dataclass(frozen=True)
class _Run:
    """What the findings are about."""

    history: History
    """The epochs that led to the last weights; `trainer.record.epoch_row.main_path`."""
    left: History
    """The other epochs: those of candidates that lost, and those after which the run went on from better weights."""
    val: EvaluationResult
    config: TrainConfig

    @property
    def epochs(self) -> int:
        """Number of epochs of the run, those that led nowhere included."""
        return int(self.history[-1]["epoch"])

    @property
    def steps_per_epoch(self) -> float:
        """Number of optimizer steps per epoch."""
        return float(self.history[-1]["step"]) / self.epochs

    @property
    def alike(self) -> History:
        """The epochs whose losses can be compared: those trained on images varied as in the last, `clean` apart."""
        trained = [row for row in self.history if row.get("stage") != "clean"] or self.history
        return [row for row in trained if row.get("augmentation") == trained[-1].get("augmentation")]

    @property
    def has_fitted(self) -> bool:
        """Whether the training images are learned, or it is not known: a mixture of two is hardly ever predicted."""
        last = self.history[-1]
        return last["accuracy"] >= _FITTED_ACCURACY or has_mixture(str(last.get("augmentation", "")))


def find_symptoms(history: History, val: EvaluationResult, config: TrainConfig, reason: str = "") -> list[str]:
    """Return one line for each symptom of a run; none if it trained as it should.

    Args:
        history: one row of metrics for each epoch.
        val: evaluation of the best checkpoint.
        config: config of the run.
        reason: why the run diverged; empty if it did not.
    """
    path = main_path(history)
    kept = {row["epoch"] for row in path}
    run = _Run(path, [row for row in history if row["epoch"] not in kept], val, config)
    if broken := _diverged(run, reason) or _first(run, _BROKEN):
        return [broken]
    found = [_first(run, _CURVE), *(find(run) for find in _INDEPENDENT)]
    return [line for line in found if line]


def _first(run: _Run, tests: Sequence[Callable[[_Run], str]]) -> str:
    return next((line for find in tests if (line := find(run))), "")


def _diverged(run: _Run, reason: str) -> str:
    """The loss, a gradient or a weight became infinite."""
    if not reason:
        return ""
    advice = _advise_rate(run.config) or f"try --base-learning-rate {run.config.base_learning_rate / 10:.3g}"
    return f"diverged: {reason}; {advice} --clip-norm 1"


def _training_loss_rose(run: _Run) -> str:
    """The training loss is higher than after the first epoch of the same augmentation, and validation no better."""
    first, last = run.alike[0], run.alike[-1]
    rise = last["loss"] - first["loss"]
    if rise <= max(_TRAINING_RISE * first["loss"], _NEGLIGIBLE_CHANGE) or last["val_loss"] < first["val_loss"]:
        return ""
    return (
        f"training loss rose from {format_loss(first['loss'], 3)} (epoch {first['epoch']:.0f}) to "
        f"{format_loss(last['loss'], 3)} (epoch {last['epoch']:.0f}), and val_loss did not fall: the learning rate is "
        f"too high; try --base-learning-rate {run.config.base_learning_rate / 10:.3g}"
    )


def _did_not_train(run: _Run) -> str:
    """Neither accuracy nor loss of validation is better than a guess by class frequency.

    Where the training loss is better, few validation images could be wrong by chance: the interval must exclude a
    network that is half as good as can be.
    """
    val, config, loss = run.val, run.config, float(run.history[-1]["loss"])
    chance, prior_loss = val.chance, _guessing_loss(val)
    low, high = val.accuracy_interval
    if low > chance or val.loss < _CHANCE_LOSS_SHARE * prior_loss:
        return ""
    if loss < _CHANCE_LOSS_SHARE * prior_loss and high > (1 + chance) / 2:
        return ""
    line = (
        f"did not train: {val.correct} of {val.total} correct ({low:.2f}-{high:.2f}) is no better than always "
        f"predicting the most frequent class ({chance:.2f}), and the loss {format_loss(val.loss, 3)} is no better than "
        f"that of guessing by class frequency ({prior_loss:.3f})"
    )
    if loss < prior_loss / 2:
        return (
            f"{line}, though the training loss fell to {format_loss(loss, 3)}: the validation images or their labels "
            "are not like those of training; look at README.md and contact_sheet.png of the dataset"
        )
    if advice := _advise_steps(run):
        return f"{line}; {advice}"
    if config.recipe == "notes":
        return f"{line}; try --recipe modern"
    if advice := _advise_rate(config):
        return f"{line}; {advice}"
    if loss < _CHANCE_LOSS_SHARE * prior_loss:
        return (
            f"{line}, though the training loss fell to {format_loss(loss, 3)}: what it learned of the training images "
            "does not hold for others; are the labels right? Look at contact_sheet.png of the dataset"
        )
    rate = config.base_learning_rate
    return f"{line}; try --base-learning-rate {rate / 10:.3g}, then --base-learning-rate {rate * 10:.3g}"


def _overfitted(run: _Run) -> str:
    """The validation loss ended well above its lowest value, in each of the last epochs, and the training loss fell."""
    rows, config = run.alike, run.config
    if len(rows) < _LEAST_EPOCHS:
        return ""
    lowest, last = _lowest(rows), rows[-1]
    least_rise = max(_OVERFITTING_RISE * lowest["val_loss"], _NEGLIGIBLE_CHANGE)
    end = _lowest(rows[-_RISEN_EPOCHS:])
    if end["val_loss"] < lowest["val_loss"] + least_rise or last["loss"] >= lowest["loss"]:
        return ""
    has_chosen = config.known_augmentation or any(row.get("stage") == "trial" for row in run.history)
    is_varied = rows[-1].get("augmentation", "none") != "none"
    if config.augment == "none":
        remedy = "--augment auto"
    elif not is_varied and not has_chosen:
        # Its recipe has none, or it had too few epochs to try any.
        has_strengths = any(getattr(config, name) for name in AUGMENT_STRENGTHS)
        remedy = "--augment all" if has_strengths else "--augment-rotation 10 --augment-zoom 0.1"
    elif not config.label_smoothing:
        remedy = "--label-smoothing 0.1"
    else:
        remedy = f"--weight-decay {10 * config.weight_decay or 0.01:.3g}"
    return (
        f"overfitting: val_loss rose from {format_loss(lowest['val_loss'], 3)} (epoch {lowest['epoch']:.0f}) to "
        f"{format_loss(last['val_loss'], 3)} (epoch {last['epoch']:.0f}) while loss fell from "
        f"{format_loss(lowest['loss'], 3)} to {format_loss(last['loss'], 3)}; the best weights are kept; try {remedy}"
    )


def _lost_epochs(run: _Run) -> str:
    """The training loss of an epoch rose above that of guessing, and the run went on from earlier weights.

    That of a network with weights from elsewhere may begin above it, and fall.
    """
    guessing = _guessing_loss(run.val)
    rows = {row["epoch"]: row for row in (*run.history, *run.left)}
    # Each candidate for the augmentation may be too hard.
    left = [row for row in run.left if row.get("stage") != "trial"]
    risen = [row for row in left if row["loss"] > rows.get(row.get("started_from", row["epoch"] - 1), row)["loss"]]
    worst = max(risen, key=lambda row: float(row["loss"]), default=None)
    if worst is None or worst["loss"] <= (1 + _TRAINING_RISE) * guessing:
        return ""
    return (
        f"lost epochs: with a training loss of {format_loss(worst['loss'], 3)} (epoch {worst['epoch']:.0f}), above "
        f"that of guessing by class frequency ({guessing:.3f}), the run went on from earlier weights: the learning "
        f"rate is too high; try --base-learning-rate {run.config.base_learning_rate / 10:.3g}"
    )


def _saturated_early(run: _Run) -> str:
    """The validation loss was lowest within the first tenth of the epochs, and was not negligible."""
    rows = run.history
    losses = [row["val_loss"] for row in rows]
    place = int(np.argmin(losses)) + 1
    if len(rows) < _LEAST_EPOCHS or place > max(1, len(rows) // 10) or min(losses) <= _NEGLIGIBLE_CHANGE:
        return ""
    return (
        f"saturated early: val_loss was lowest ({min(losses):.3f}) in epoch {rows[place - 1]['epoch']:.0f} of "
        f"{run.epochs}, within the first tenth; try --base-learning-rate {run.config.base_learning_rate / 10:.3g}"
    )


def _too_few_steps(run: _Run) -> str:
    """The run took few optimizer steps, did not end by itself, and has not fitted the training images."""
    if run.has_fitted or run.config.init_from or not (advice := _advise_steps(run)):
        return ""
    return f"too few steps: only {run.history[-1]['accuracy']:.2f} of the training images are correct; {advice}"


def _advise_steps(run: _Run) -> str:
    """Return the advice to take more steps, or nothing if there were enough or the run ended by itself."""
    steps = round(len(run.history) * run.steps_per_epoch)
    if steps >= _FEW_STEPS or _ended_by_patience(run):
        return ""
    epochs = recipe_epochs("modern", run.config.arch, max(1, math.floor(run.steps_per_epoch)))
    return (
        f"its weights took {format_count(steps, 'step')}, and fewer than {_FEW_STEPS} rarely suffice; try "
        f"--epochs {epochs} --patience 4"
    )


def _unusual_rate(run: _Run) -> str:
    """The base learning rate is far from the recipe's, and the run has not fitted the training images."""
    if run.has_fitted or run.config.init_from or not (advice := _advise_rate(run.config)):
        return ""
    return f"unusual rate: only {run.history[-1]['accuracy']:.2f} of the training images are correct; {advice}"


def _advise_rate(config: TrainConfig) -> str:
    """Return the advice to take the recipe's base learning rate, or nothing if that of the run is not far from it."""
    recipe = RECIPES[config.recipe].get(config.arch, {})
    usual, rate = recipe.get("base_learning_rate"), config.base_learning_rate
    if usual is None or recipe["optimizer"] != config.optimizer or rate / _FAR_RATE < usual < rate * _FAR_RATE:
        return ""
    return f"the base learning rate is {rate:.3g}, the recipe's {usual:.3g}; try --base-learning-rate {usual:.3g}"


def _unsteady(run: _Run) -> str:
    """The validation accuracy fell from one late epoch to a later one by more than chance (tuning playbook)."""
    rows, val = run.history, run.val
    ending = [row for row in rows if row.get("stage") in ("decay", "clean")] or rows[-(len(rows) // 4) :]
    if len(rows) < _LEAST_EPOCHS:
        return ""
    accuracies = np.array([row["val_accuracy"] for row in ending])
    highest = np.maximum.accumulate(accuracies)
    place = int(np.argmax(highest - accuracies))
    drop = float(highest[place] - accuracies[place])
    sampling_error = (val.accuracy * (1 - val.accuracy) / val.total) ** 0.5
    if drop <= max(_SAMPLING_ERRORS * sampling_error, _LARGE_DROP):
        return ""
    if run.config.schedule == "constant":
        remedy = "--schedule plateau"
    elif not run.config.ema_momentum:
        remedy = "--ema-momentum 0.99"
    else:
        remedy = f"--base-learning-rate {run.config.base_learning_rate / 3:.3g}"
    return (
        f"unsteady: val_accuracy fell from {highest[place]:.3f} to {accuracies[place]:.3f} (epoch "
        f"{ending[place]['epoch']:.0f}) within the last {len(ending)} epochs, by "
        f"{drop / max(sampling_error, 1 / val.total):.0f} times the sampling error; try {remedy}"
    )


def _still_improving(run: _Run) -> str:
    """At a rate that has not come down, the validation loss of the last quarter is below all earlier, and the last low.

    The number of epochs ended the run, not its patience.
    """
    rows = [row for row in run.history if row.get("stage") not in ("decay", "clean")]
    if len(rows) < _LEAST_EPOCHS or _ended_by_patience(run):
        return ""
    if rows[-1]["learning_rate"] < _FULL_RATE_SHARE * max(row["learning_rate"] for row in rows):
        return ""
    losses, quarter = np.array([row["val_loss"] for row in rows]), len(rows) // 4
    before, last = float(losses[:-quarter].min()), float(losses[-quarter:].mean())
    has_fallen = last < before - max(_STILL_FALLING * before, _NEGLIGIBLE_CHANGE)
    lowest = float(losses.min())
    is_low = losses[-1] < lowest + max(_STILL_FALLING * lowest, _NEGLIGIBLE_CHANGE)
    if not has_fallen or not is_low:
        return ""
    return (
        f"still improving: mean val_loss of epochs {rows[-quarter]['epoch']:.0f} to {rows[-1]['epoch']:.0f} is "
        f"{last:.3f}, the lowest before them was {before:.3f}; try --epochs {2 * run.epochs}"
    )


def _augmentation_costs(run: _Run) -> str:
    """Fewer of the varied training images are correct than of the unvaried validation images, and those are few."""
    rows, val = run.alike, run.val
    name, accuracy = rows[-1].get("augmentation", "none"), float(rows[-1]["accuracy"])
    # What `auto` uses has been compared with no augmentation. Of a mixture only the larger part counts as correct.
    if name == "none" or has_mixture(name) or run.config.augment == "auto" or val.accuracy >= _LOW_ACCURACY:
        return ""
    if accuracy >= val.accuracy_interval[0]:
        return ""
    return (
        f"augmentation costs: with {name}, {accuracy:.2f} of the training images are correct, and {val.accuracy:.2f} "
        "of the unvaried validation images: the variation is harder than the task, and is not learned; try --augment "
        "auto"
    )


def _never_predicted(run: _Run) -> str:
    """A class has no correct prediction, which would be rare if it were as easy as the other classes."""
    val = run.val
    seen = [one for one in val.per_class if one.total]
    missed = [one for one in seen if not one.correct and _is_no_accident(one, val, len(seen))]
    if not missed:
        return ""
    names = [_describe_missed(one) for one in missed[:_MOST_CLASSES]]
    if more := len(missed) - len(names):
        names.append(f"{more} more")
    is_rare = max(one.total for one in missed) < val.total / len(seen) / 2
    if is_rare and run.config.class_weights == "none":
        advice = "they have few images; try --class-weights balanced"
    else:
        advice = (
            "look at their images, on the page that jobs/notes.py makes of the run: are the labels right, and can one "
            "tell them apart?"
        )
    return f"never correct: {'; '.join(names)}; {advice}"


def _is_no_accident(one: ClassResult, val: EvaluationResult, classes: int) -> bool:
    others = val.correct / max(1, val.total - one.total)
    return float((1 - others) ** one.total) < _SIGNIFICANCE / classes


def _describe_missed(one: ClassResult) -> str:
    other, count = next(iter(one.taken_for.items()))
    return f"{one.name} (0 of {one.total}, {count} predicted as {other})"


def _small_validation(run: _Run) -> str:
    """The 95% interval of the accuracy is so wide that large differences between runs cannot be seen."""
    val = run.val
    low, high = val.accuracy_interval
    if high - low <= _WIDE_INTERVAL:
        return ""
    # An interval is as wide as one over the root of the number of images.
    needed = round(val.total * ((high - low) / (_WIDE_INTERVAL / 2)) ** 2)
    return (
        f"few validation images: of {val.total}, the interval {low:.2f}-{high:.2f} is {high - low:.2f} wide, and runs "
        f"that differ by ten points cannot be told apart; about {needed} would show five points: prepare the dataset "
        "with more images or a larger --val-fraction"
    )


def _guessing_loss(val: EvaluationResult) -> float:
    """Return the loss of guessing by class frequency."""
    prior = np.array([one.total for one in val.per_class if one.total]) / val.total
    return float(-(prior * np.log(prior)).sum())


def _lowest(rows: History) -> Metrics:
    return min(rows, key=lambda row: float(row["val_loss"]))


def _ended_by_patience(run: _Run) -> bool:
    return bool(run.config.patience) and run.epochs < run.config.epochs


_BROKEN = (_training_loss_rose, _did_not_train)
_CURVE = (
    _overfitted,
    _lost_epochs,
    _saturated_early,
    _too_few_steps,
    _unusual_rate,
    _unsteady,
    _still_improving,
    _augmentation_costs,
)
_INDEPENDENT = (_never_predicted, _small_validation)
