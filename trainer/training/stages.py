"""What a run does in its next epoch, decided from the metrics of those before.

With ``schedule=plateau`` a run goes through stages, each of which ends when its epochs say so:

    plain   no augmentation, until the validation loss stops falling                (with augment=auto only)
    trial   each candidate for the augmentation by itself, all from the best plain weights; then none and the best of
            the others once more, this one with a flip, or with MixUp and CutMix, where that helped, too
                                                                                    (with augment=auto only)
    train   with the augmentation that won, from its weights, until validation stops improving
    decay   from the best weights of `train`, while the learning rate falls to zero
    clean   a last epoch without augmentation, at a low rate                        (where there is an augmentation)

A run keeps the checkpoint that is best in validation, so decay and clean count only where they help. All decisions are
functions of the history: alike on every worker, and in a run that was resumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from statistics import mean

from trainer.config.config import MIXES, TrainConfig, has_mixture
from trainer.record.checkpoint import rank_epoch
from trainer.record.epoch_row import Metrics

NO_AUGMENTATION = "none"
_FLIP = "flip"
# The fewest steps between two decisions: where an epoch has fewer, several epochs count as one.
_LEAST_STEPS = 40
_PLAIN_PATIENCE = 2
# The largest shares of all epochs that `plain` and the trials take.
_PLAIN_SHARE = 0.15
_TRIAL_SHARE = 0.25
# None and one other.
_FINALISTS = 2
# The most steps of an epoch of a trial: what costs or helps much shows by then, and an epoch can have thousands.
_TRIAL_STEPS = 200
# The last epochs of `plain` that tell how far its validation loss rises by chance.
_NOISE_EPOCHS = 6
# Share of the epochs so far that `decay` adds.
_DECAY_SHARE = 0.15
# The first learning rate of `clean`, as a share of the peak.
_CLEAN_RATE = 0.1


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is trained."""

    stage: str
    augmentation: str
    """What is varied: the names of the parts, joined by "+", or none."""
    started_from: int
    """The epoch whose weights and optimizer state it starts from; 0 for the initial ones."""
    first_rate: float = 1.0
    """Learning rate at the first step, as a share of what the schedule says; it changes linearly."""
    last_rate: float = 1.0
    """The same after the last step."""
    most_steps: int | None = None
    """The most optimizer steps that it takes, however many images there are."""


def plan_epoch(history: Sequence[Metrics], config: TrainConfig, steps_per_epoch: int) -> EpochPlan | None:
    """Return how the next epoch is trained; None where the run has ended.

    Args:
        history: the metrics of all epochs so far.
        config: the config of the run.
        steps_per_epoch: number of optimizer steps per epoch.
    """
    if len(history) >= config.epochs:
        return None
    unit = math.ceil(_LEAST_STEPS / steps_per_epoch)
    if config.schedule != "plateau":
        ended = _has_stalled(history, config.patience * unit)
        return None if ended else EpochPlan("train", _augmentation_without_trials(config), len(history))
    return _plan_search(history, config, unit) or _plan_training(history, config, unit)


def list_candidates(config: TrainConfig) -> list[str]:
    """Return what a run with ``augment=auto`` tries at first, beginning with none.

    A flip is one of them, which no recipe has: it makes other digits of digits. MixUp and CutMix are where the options
    of the run ask for them.
    """
    moves, shift = _list_parts(config, "rotation", "zoom", "contrast"), _list_parts(config, "translation")
    candidates: list[list[str]] = [[], moves, [*moves, *shift], [_FLIP], _list_parts(config, *MIXES)]
    return list(dict.fromkeys("+".join(parts) or NO_AUGMENTATION for parts in candidates))


def full_augmentation(config: TrainConfig) -> str:
    """Return all that the options of a run vary; none if that is nothing."""
    names = () if config.augment == "none" else ("rotation", "zoom", "contrast", "translation", _FLIP, *MIXES)
    return "+".join(_list_parts(config, *names)) or NO_AUGMENTATION


def _list_parts(config: TrainConfig, *names: str) -> list[str]:
    return [name for name in names if getattr(config, f"augment_{name}")]


def needed_epochs(history: Sequence[Metrics]) -> set[int]:
    """Return the epochs whose weights a later epoch may start from."""
    needed = {len(history)}
    for stage in ("plain", "train"):
        rows = _of_stage(history, stage)
        needed |= {_best(rows), int(rows[-1]["epoch"])} if rows else set()
    if not _of_stage(history, "train"):
        needed |= {int(row["epoch"]) for row in _of_stage(history, "trial")}
    return needed


def _plan_search(history: Sequence[Metrics], config: TrainConfig, unit: int) -> EpochPlan | None:
    """Return the next epoch of `plain` or of a trial; None where both are over."""
    plain, trials = _of_stage(history, "plain"), _of_stage(history, "trial")
    is_open = config.augment == "auto" and not config.known_augmentation
    if not is_open or len(history) > len(plain) + len(trials):
        return None
    candidates, most = list_candidates(config), _TRIAL_SHARE * config.epochs / unit - _FINALISTS
    # A run that has more epochs now does not try what it left out before.
    has_finalists = any(len(_trials_of(str(row["augmentation"]), trials)) > unit for row in trials)
    if len(candidates) > most or has_finalists:
        names = {row["augmentation"] for row in trials}
        candidates = [name for name in candidates if name in names or not has_mixture(name)]
    if len(candidates) > most:
        return None
    # By the loss alone, as in the trials: with few images the accuracy may still improve while the loss rises.
    is_falling = _epochs_since_best([-float(row["val_loss"]) for row in plain]) < _PLAIN_PATIENCE * unit
    if not trials and len(plain) < _PLAIN_SHARE * config.epochs and is_falling:
        return EpochPlan("plain", NO_AUGMENTATION, len(history))
    if (name := _find_untried(candidates, trials, unit)) is None:
        name = _find_untried(_find_finalists(candidates, plain, trials, unit), trials, 2 * unit)
    if name is None:
        return None
    tried = _trials_of(name, trials)
    return EpochPlan("trial", name, int(tried[-1]["epoch"]) if tried else _best(plain), most_steps=_TRIAL_STEPS)


def _find_untried(candidates: Sequence[str], trials: Sequence[Metrics], epochs: int) -> str | None:
    """Return the first of some candidates that has not been tried for so many epochs, and has not diverged."""
    for name in candidates:
        tried = _trials_of(name, trials)
        if len(tried) < epochs and not (tried and math.isinf(tried[-1]["val_loss"])):
            return name
    return None


def _find_finalists(
    candidates: Sequence[str], plain: Sequence[Metrics], trials: Sequence[Metrics], unit: int
) -> list[str]:
    """Return what is tried once more: none and the best of the others, with the additions that helped, too."""
    losses = {name: _mean_loss(_trials_of(name, trials)[:unit]) for name in candidates}
    additions = [name for name in candidates if _is_addition(name)]
    best = min(candidates[1:], key=losses.__getitem__)
    moved = min((name for name in candidates if name not in additions), key=losses.__getitem__)
    most = losses[NO_AUGMENTATION] - _find_noise(plain)
    helped = [name for name in additions if losses[name] < most]
    if moved != NO_AUGMENTATION and helped:
        best = "+".join((moved, *helped))
    return [NO_AUGMENTATION, best]


def _is_addition(name: str) -> bool:
    """Return whether an augmentation is a flip or mixtures only, which are tried alone and added to others."""
    return {_FLIP, *MIXES}.issuperset(name.split("+"))


def _without_additions(name: str) -> str:
    """Return what a flip and mixtures were added to; an addition alone is as it is."""
    return name if _is_addition(name) else "+".join(part for part in name.split("+") if not _is_addition(part))


def _trials_of(name: str, trials: Sequence[Metrics]) -> list[Metrics]:
    """Return the epochs in which an augmentation was tried, after those of what it has additions to."""
    names = dict.fromkeys((_without_additions(name), name))
    return [row for one in names for row in trials if row["augmentation"] == one]


def choose_augmentation(plain: Sequence[Metrics], trials: Sequence[Metrics], unit: int) -> str:
    """Return the augmentation that won: that of the last trial, if better than none by more than the noise, else none.

    If it has additions, it has to be better than without, too, or the one without takes its place.
    """
    finalist = str(trials[-1]["augmentation"])
    names = NO_AUGMENTATION, finalist, _without_additions(finalist)
    losses = {name: _mean_loss(_trials_of(name, trials)[-unit:]) for name in names}
    best = min(losses, key=losses.__getitem__)
    return best if losses[best] < losses[NO_AUGMENTATION] - _find_noise(plain) else NO_AUGMENTATION


def _find_noise(plain: Sequence[Metrics]) -> float:
    """Return how far the validation loss of plain training rises from one epoch to the next, on average.

    A fall counts as no rise: it may be progress.
    """
    losses = [float(row["val_loss"]) for row in plain][-_NOISE_EPOCHS - 1 :]
    return mean([max(0.0, after - before) for before, after in pairwise(losses)] or [0.0])


def _mean_loss(rows: Sequence[Metrics]) -> float:
    """Return the mean validation loss; infinite if one of the epochs diverged."""
    return mean(float(row["val_loss"]) for row in rows)


def _plan_training(history: Sequence[Metrics], config: TrainConfig, unit: int) -> EpochPlan | None:
    """Return the next epoch of `train`, `decay` or `clean`; None where the last is over."""
    trials, train = _of_stage(history, "trial"), _of_stage(history, "train")
    if train:
        augmentation, start = str(train[-1]["augmentation"]), int(train[-1]["epoch"])
    elif trials:
        augmentation = choose_augmentation(_of_stage(history, "plain"), trials, unit)
        start = int(_trials_of(augmentation, trials)[-1]["epoch"])
    else:
        augmentation, start = _augmentation_without_trials(config), len(history)
    ending = list(takewhile(lambda row: row.get("stage") in ("decay", "clean"), reversed(history)))
    before = len(history) - len(ending)
    # In a short run too the rate falls to zero.
    least = min(unit, max(1, config.epochs // 3))
    clean = least if augmentation != NO_AUGMENTATION else 0
    decay = max(least, round(_DECAY_SHARE * (before if config.patience else config.epochs)))
    # The end of a run that is longer now came too early: it goes on from before it.
    if before < config.epochs - decay - clean and not _has_stalled(train, config.patience * unit):
        return EpochPlan("train", augmentation, start)
    decay = max(1, min(decay, config.epochs - before - clean))
    decayed, cleaned = len(_of_stage(ending, "decay")), len(_of_stage(ending, "clean"))
    if decayed < decay:
        start = _best(train) if train and not decayed else len(history)
        return EpochPlan("decay", augmentation, start, 1 - decayed / decay, 1 - (decayed + 1) / decay)
    if cleaned < clean:
        first, last = (_CLEAN_RATE * (1 - done / clean) for done in (cleaned, cleaned + 1))
        return EpochPlan("clean", NO_AUGMENTATION, len(history), first, last)
    return None


def _augmentation_without_trials(config: TrainConfig) -> str:
    """Return what is varied in a run that tries nothing: it has few epochs, another schedule, or nothing to choose."""
    unknown = NO_AUGMENTATION if config.augment == "auto" else full_augmentation(config)
    return config.known_augmentation or unknown


def _of_stage(history: Sequence[Metrics], stage: str) -> list[Metrics]:
    # A run that an earlier version began had no other stage.
    return [row for row in history if row.get("stage", "train") == stage]


def _best(rows: Sequence[Metrics]) -> int:
    return int(max(rows, key=rank_epoch)["epoch"])


def _has_stalled(rows: Sequence[Metrics], patience: int) -> bool:
    """Return whether neither loss nor accuracy of validation improved in the last epochs; never if patience is 0."""
    since_best = min(
        _epochs_since_best([-float(row["val_loss"]) for row in rows]),
        _epochs_since_best([float(row["val_accuracy"]) for row in rows]),
    )
    return bool(patience) and since_best >= patience


def _epochs_since_best(scores: Sequence[float]) -> int:
    """Return how many epochs came after the first of the highest score; 0 without epochs."""
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
