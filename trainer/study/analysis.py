"""The conclusions from the trials of a study: the checks of the tuning playbook, each one line with its evidence.

Everything here is arithmetic on records; `trainer.study.report` writes the report.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.config.options import format_value
from trainer.record.evaluation_result import accuracy_interval
from trainer.study.file import Choice, Parameter, Range, Study
from trainer.study.folder import Trial

# If the best value is this close to an end of its range, better ones may lie beyond it.
_EDGE_SHARE = 0.1
# A best learning rate this close below one that diverged is limited by instability.
_UNSTABLE_SHARE = 0.1
# In the reason of a trial that diverged (`trainer.training.loop`); other infeasible ones were too large for the memory.
_DIVERGED = "nan or inf"
_BUCKETS = 4
_BOOTSTRAP_SAMPLES = 2000
# Relative difference of a loss that is not significant.
_SAME_LOSS_SHARE = 0.05
_TOO_EARLY, _TOO_LATE = 0.1, 0.75
# Of fewer trials nothing is said about which parameter matters.
_LEAST_TRIALS = 6
_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class BestOf:
    """The best trial with one value of a scientific parameter."""

    label: str
    best: Trial | None
    trials: int
    """Number of trials with that value, including those without a result."""


@dataclass(frozen=True)
class Importance:
    """How much a parameter matters."""

    label: str
    share: float
    """Share of the differences between the objectives of the trials that it explains, from 0 to 1."""
    p_value: float
    """Probability of such differences between the groups if the parameter did nothing."""

    def __str__(self) -> str:
        verdict = "" if self.p_value < _SIGNIFICANCE else "; may be luck"
        evidence = f"(p = {self.p_value:.2g}{verdict})"
        return f"{self.label} explains {self.share:.0%} of the differences between trials {evidence}"


@dataclass(frozen=True)
class Repetitions:
    """The same config with several seeds."""

    name: str
    objectives: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean objective."""
        return float(np.mean(self.objectives))

    @property
    def deviation(self) -> float:
        """Standard deviation between seeds: the trial variance of the tuning playbook."""
        return float(np.std(self.objectives, ddof=1))

    def __str__(self) -> str:
        values = ", ".join(f"{one:.4f}" for one in self.objectives)
        return f"{self.name}: mean {self.mean:.4f}, standard deviation {self.deviation:.4f} ({values})"


def find_best(study: Study, trials: Sequence[Trial]) -> Trial | None:
    """Return the trial of the search with the best objective, the earliest of equals; None if none completed."""
    ranked = rank_trials(study, trials)
    return ranked[0] if ranked else None


def rank_trials(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Return the completed trials of the search, best first."""
    completed = [one for one in trials if one.kind == "search" and one.status == "completed"]
    return sorted(completed, key=lambda one: (-_score(study, one), one.index))


def is_above_chance(trial: Trial, chance: float) -> bool:
    """Return whether the 95% interval of a trial's accuracy lies above that of always predicting one class."""
    return not trial.total or accuracy_interval(trial.correct, trial.total)[0] > chance


def find_rivals(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that the best one must differ from for the study to have an answer.

    These are the best trials of the other scientific values. If nothing is scientific, they are all other trials where
    all are as good as the best, else those with the same objective.
    """
    ranked = rank_trials(study, trials)
    scientific = [one for one in study.parameters if one.role == "scientific"]
    if not scientific:
        others = ranked[1:]
        if all(is_as_good(study, one, ranked[0]) for one in others):
            return others
        return [one for one in others if one.objective == ranked[0].objective]
    best = [group.best for one in scientific for group in isolate(study, one, trials)]
    return list({one.index: one for one in best if one and one.index != ranked[0].index}.values())


def is_as_good(study: Study, trial: Trial, best: Trial) -> bool:
    """Return whether the objective of a trial equals that of the best within its sampling error."""
    return _score(study, best) - _score(study, trial) <= _tolerance(study, best)


def find_no_difference(study: Study, trials: Sequence[Trial], chance: float) -> str:
    """Return why nothing can be concluded from the ranking of the trials; empty if something can be.

    Args:
        study: the study.
        trials: its trials.
        chance: accuracy of always predicting the most frequent class; 0 if unknown.
    """
    ranked = rank_trials(study, trials)
    if ranked and not any(is_above_chance(one, chance) for one in ranked):
        return f"no trial is above chance ({chance:.2f})"
    if len(ranked) > 1 and all(is_as_good(study, one, ranked[0]) for one in ranked):
        return f"all {len(ranked)} completed trials are as good as the best within {_tolerance(study, ranked[0]):.3g}"
    return ""


def isolate(study: Study, parameter: Parameter, trials: Sequence[Trial]) -> list[BestOf]:
    """Return the best trial for each value of a scientific parameter, or for each quarter of its range."""
    groups: dict[str, list[Trial]] = {}
    if isinstance(parameter.domain, Choice):
        groups = {format_value(value): [] for value in parameter.domain.values}
    else:
        ends = [parameter.domain.at(share) for share in np.linspace(0, 1, _BUCKETS + 1)]
        groups = {f"{low:.3g} to {high:.3g}": [] for low, high in itertools.pairwise(ends)}
    names = list(groups)
    for trial in trials:
        if trial.kind != "search" or not trial.ended or not _varies(trial, parameter):
            continue
        groups[names[_find_group(parameter, trial)]].append(trial)
    return [BestOf(name, find_best(study, of_group), len(of_group)) for name, of_group in groups.items()]


def rank_parameters(study: Study, trials: Sequence[Trial]) -> list[Importance]:
    """Return how much each parameter matters, the most important first; empty where too few trials tell.

    The values of a parameter, or the quarters of its range, make groups of trials. Their share of the differences in
    the objective is the effect size of the test of Kruskal and Wallis (1952), which compares ranks, so that a trial
    that diverged counts as the worst, however bad.
    """
    from scipy.stats import kruskal

    ended = [one for one in trials if one.kind == "search" and one.status in ("completed", "infeasible")]
    found = []
    for parameter in study.parameters:
        groups: dict[int, list[float]] = {}
        for trial in ended:
            if _varies(trial, parameter):
                groups.setdefault(_find_group(parameter, trial), []).append(_score(study, trial))
        scores = [score for group in groups.values() for score in group]
        if len(groups) < 2 or len(scores) < _LEAST_TRIALS or len(set(scores)) < 2:
            continue
        # Ranks, since the score of a trial without result is infinite.
        order = {score: rank for rank, score in enumerate(sorted(set(scores)))}
        statistic, p_value = kruskal(*([order[score] for score in group] for group in groups.values()))
        share = (statistic - len(groups) + 1) / (len(scores) - len(groups))
        found.append(Importance(parameter.label, max(0.0, float(share)), float(p_value)))
    return sorted(found, key=lambda one: -one.share)


def _find_group(parameter: Parameter, trial: Trial) -> int:
    """Return the number of the value of a parameter, or of the quarter of its range that a trial is in."""
    value = trial.values[parameter.name]
    if isinstance(parameter.domain, Choice):
        return parameter.domain.values.index(value)
    return min(int(parameter.domain.position(value) * _BUCKETS), _BUCKETS - 1)


def check_boundaries(study: Study, trials: Sequence[Trial], chance: float) -> list[str]:
    """Return one line for each range with the best value at its edge, with a range to try next.

    If the trials do not differ by more than chance, the values of the best are no better than the others.
    """
    best = find_best(study, trials)
    if best is None:
        return []
    if reason := find_no_difference(study, trials, chance):
        return [f"not judged: {reason}, so the values of the best trial are not significant"]
    lines = []
    for one in study.parameters:
        if not isinstance(one.domain, Range) or not _varies(best, one):
            continue
        value = best.values[one.name]
        position = one.domain.position(value)
        # A range that begins with zero is not expanded below it.
        if _EDGE_SHARE <= position <= 1 - _EDGE_SHARE or (position < _EDGE_SHARE and one.domain.low == 0):
            continue
        low, high = _shift(one.domain, at_low=position < 0.5)
        end = "low" if position < 0.5 else "high"
        lines.append(
            f"{one.label}: the best value {value:.3g} is at the {end} end of {one.domain}; expand it to {low:.3g} to "
            f"{high:.3g} and run again (--new-round)"
        )
    return lines


def best_of_k(
    study: Study, trials: Sequence[Trial]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the expected best of k trials, by bootstrap.

    Returns:
        k from 1 to the number of trials; the mean objective of the best of k; float64 ``[2, k]`` of its 5th and 95th
        percentile. A trial without a result counts as the worst. All are empty if none completed.
    """
    completed = rank_trials(study, trials)
    if not completed:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros((2, 0))
    ended = [one for one in trials if one.kind == "search" and one.ended]
    worst = min(_score(study, one) for one in completed)
    scores = np.array([_score(study, one) if one.status == "completed" else worst for one in ended])
    draws = np.random.default_rng(0).choice(scores, (_BOOTSTRAP_SAMPLES, len(scores)))
    running = np.maximum.accumulate(draws, axis=1)
    sign = 1 if study.maximises else -1
    band = np.sort(sign * np.percentile(running, [5, 95], axis=0), axis=0)
    return np.arange(1, len(scores) + 1), sign * running.mean(axis=0), band


def check_points(study: Study, trials: Sequence[Trial], chance: float) -> str:
    """Return whether there were enough trials: how many are as good as the best, and what half of them would give.

    More trials do not help if none is above chance (the accuracy of always predicting the most frequent class; 0 if
    unknown), or if all are tied.
    """
    best = find_best(study, trials)
    if best is None:
        return "no trial has completed"
    if reason := find_no_difference(study, trials, chance):
        return f"{reason}: more trials of these ranges will not help"
    completed = rank_trials(study, trials)
    tolerance = _tolerance(study, best)
    good = sum(is_as_good(study, one, best) for one in completed)
    _, means, _ = best_of_k(study, trials)
    gain = abs(means[-1] - means[(len(means) - 1) // 2])
    verdict = "enough" if good > 1 and gain <= tolerance else "too few: add trials to the study and run it again"
    return (
        f"{good} of {len(completed)} completed trials are as good as the best within {tolerance:.3g}; half of the "
        f"trials would have given {gain:.3g} less on average: {verdict}"
    )


def check_points_of_each(study: Study, trials: Sequence[Trial], chance: float) -> list[str]:
    """Return `check_points` of the trials of each scientific value, which all need enough for a fair comparison.

    Of all trials together where nothing is scientific, or nothing can be concluded from them.
    """
    names = [one.name for one in study.parameters if one.role == "scientific"]
    groups: dict[str, list[Trial]] = {}
    for one in trials:
        values = (f"{name} {format_value(one.values[name])}" for name in names if name in one.values)
        groups.setdefault(", ".join(values), []).append(one)
    if len(groups) < 2 or find_no_difference(study, trials, chance):
        return [check_points(study, trials, chance)]
    return [f"{values}: {check_points(study, of_values, chance)}" for values, of_values in groups.items()]


def check_infeasible(study: Study, trials: Sequence[Trial]) -> list[str]:
    """Return how many trials have no result, and whether the best learning rate is next to those that diverged."""
    ended = [one for one in trials if one.kind == "search" and one.ended]
    bad = [one for one in ended if one.status == "infeasible"]
    failed = [one for one in ended if one.status == "failed"]
    stopped = [one for one in ended if one.status == "stopped"]
    lines = [
        f"{len(bad)} of {len(ended)} trials were infeasible, {len(failed)} failed"
        + (f", {len(stopped)} were stopped early" if stopped else "")
    ]
    lines += [f"{one.run_name} {one.status}: {one.reason}" for one in (*bad, *failed)]
    best = find_best(study, trials)
    for one in study.parameters:
        if one.name != "base_learning_rate" or not isinstance(one.domain, Range) or not best or not _varies(best, one):
            continue
        diverged = [trial for trial in bad if _DIVERGED in trial.reason and _varies(trial, one)]
        position = one.domain.position(best.values[one.name])
        distances = [one.domain.position(trial.values[one.name]) - position for trial in diverged]
        if any(0 <= distance < _UNSTABLE_SHARE for distance in distances):
            lines.append(
                f"{one.label}: the best value {best.values[one.name]:.3g} is at the edge of those that diverge: the "
                "optimum is held down by instability; try clip_norm, longer warmup_epochs, or normalization"
            )
    return lines


def check_steps(study: Study, trials: Sequence[Trial]) -> str:
    """Return when in training the best checkpoints fell, and whether the budget fits (playbook, max_train_steps)."""
    shares = [one.best_step / one.steps for one in rank_trials(study, trials) if one.steps]
    if not shares:
        return "no trial has completed"
    text = f"the best checkpoint fell at {np.median(shares):.0%} of the steps in the median trial"
    if max(shares) <= _TOO_EARLY:
        return f"{text}, never after the first tenth: the budget is far too long"
    if min(shares) >= _TOO_LATE:
        return f"{text}, never before the last quarter: the budget is too short, try twice of it in another round"
    return f"{text}, between {min(shares):.0%} and {max(shares):.0%}"


def find_repetitions(study: Study, trials: Sequence[Trial]) -> tuple[Repetitions | None, Repetitions | None]:
    """Return the repetitions of the best trial and those of the incumbent; None if there are fewer than two."""
    best = find_best(study, trials)
    groups = (
        ("best", [one for one in trials if one.kind == "best" and best is not None and one.index == best.index]),
        ("incumbent", [one for one in trials if one.kind == "incumbent"]),
    )
    of_group = [
        Repetitions(
            name, tuple(one.objective for one in group if one.status == "completed" and one.objective is not None)
        )
        for name, group in groups
    ]
    best_again, incumbent = (one if len(one.objectives) > 1 else None for one in of_group)
    return best_again, incumbent


def decide_adoption(study: Study, trials: Sequence[Trial]) -> str:
    """Return whether to adopt the best config, and the evidence.

    It must be better than the incumbent by more than both vary between seeds (playbook, whether to adopt a change).
    """
    best, incumbent = find_repetitions(study, trials)
    if best is None:
        return "not decided: --characterize 5 repeats the best trial and the incumbent with other seeds"
    if incumbent is None:
        return f"{best}; there is no incumbent to compare it with: base names no architecture"
    gain = (best.mean - incumbent.mean) * (1 if study.maximises else -1)
    noise = best.deviation + incumbent.deviation
    verdict = "adopt" if gain > noise else "do not adopt"
    return (
        f"{verdict}: the best config is {abs(gain):.4f} {'better' if gain > 0 else 'worse'} than the incumbent, the "
        f"two deviations between seeds add up to {noise:.4f}; {best}; {incumbent}"
    )


def _score(study: Study, trial: Trial) -> float:
    """Return the objective with a sign so that more is better; the worst value if it is not a number."""
    value = trial.objective
    if value is None or math.isnan(value):
        return -math.inf
    return value if study.maximises else -value


def _varies(trial: Trial, parameter: Parameter) -> bool:
    return parameter.name in trial.values and parameter.applies(trial.values)


def _tolerance(study: Study, best: Trial) -> float:
    """Return the difference from the best that is not significant: its sampling error, or a small share of a loss."""
    if study.maximises and best.total:
        return best.correct / best.total - accuracy_interval(best.correct, best.total)[0]
    return _SAME_LOSS_SHARE * abs(best.objective or 0.0)


def _shift(domain: Range, *, at_low: bool) -> tuple[float, float]:
    """Return a range of the same width with the end that was hit in its middle."""
    low, high = (math.log(one) if domain.scale == "log" else one for one in (domain.low, domain.high))
    half = (high - low) / 2
    center = low if at_low else high
    ends = (center - half, center + half)
    if domain.scale == "log":
        return math.exp(ends[0]), math.exp(ends[1])
    return (max(0.0, ends[0]), ends[1]) if domain.low >= 0 else ends
