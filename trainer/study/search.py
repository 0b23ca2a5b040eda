"""Choose the values that each trial of a study tries.

Points of sobol and grid depend only on the study and the number of the trial: they are the same at any
concurrency, after any interruption, and when more trials are added (tuning playbook, quasi-random search).
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.runtime.errors import InputError
from trainer.study.file import Choice, Parameter, Range, Study

Values = dict[str, Any]


def suggest_values(study: Study, index: int) -> Values:
    """Return the values of one trial, by name of the option, without those whose parent has another value.

    Scientific choices alternate, so each gets the same number of trials, with the same points of the nuisance
    parameters.

    Args:
        study: a study with any algorithm except tpe, whose points depend on earlier results.
        index: number of the trial, from 0.
    """
    parameters = study.parameters
    if study.algorithm == "grid":
        return _select(parameters, list(itertools.product(*map(_grid_positions, parameters)))[index])
    turns = [one for one in parameters if one.takes_turns]
    combinations = list(itertools.product(*(range(len(one.choices)) for one in turns)))
    combination = combinations[index % len(combinations)]
    others = [one for one in parameters if not one.takes_turns]
    point = _draw_point(len(others), study.seed, index // len(combinations)) if others else ()
    positions = {
        **{one.label: (turn + 0.5) / len(one.choices) for one, turn in zip(turns, combination, strict=True)},
        **dict(zip((one.label for one in others), point, strict=True)),
    }
    return _select(parameters, [positions[one.label] for one in parameters])


class OptunaSearch:
    """The part of a search that depends on earlier trials: suggestions of tpe, and which trial asha ends.

    It keeps no state of its own: `replay` restores it.

    Raises:
        InputError: Optuna is not installed.
    """

    def __init__(self, study: Study) -> None:
        try:
            import optuna
        except ImportError as error:
            raise InputError("tpe and asha need Optuna: pip install -e '.[optuna]'") from error

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._study = optuna, study
        stops = study.early_stopping == "asha"
        self._search = optuna.create_study(
            direction="maximize" if study.maximises else "minimize",
            sampler=optuna.samplers.TPESampler(seed=study.seed, constant_liar=True),
            pruner=optuna.pruners.SuccessiveHalvingPruner(1, 3) if stops else optuna.pruners.NopPruner(),
        )
        self._trials: dict[int, Any] = {}

    def start(self, index: int, values: Values | None = None) -> Values:
        """Return the values of a trial that starts: the given ones, or a suggestion."""
        if values is None and self._study.algorithm != "tpe":
            values = suggest_values(self._study, index)
        if values is not None:
            labels = {one.label: values[one.name] for one in self._study.parameters if one.applies(values)}
            self._search.enqueue_trial({name: _to_choice(value) for name, value in labels.items()})
        trial = self._trials[index] = self._search.ask()
        found: Values = {}
        for one in self._study.parameters:
            if one.applies(found):
                found[one.name] = self._suggest(trial, one)
        return values or found

    def report(self, index: int, epoch: int, value: float) -> bool:
        """Return whether a trial should end, given its objective after an epoch; call it for the epochs in order."""
        trial = self._trials[index]
        trial.report(value, epoch)
        return bool(trial.should_prune())

    def end(self, index: int, objective: float | None) -> None:
        """Add the result of a trial; None for one that diverged, failed or was stopped, which counts as bad."""
        states = self._optuna.trial.TrialState
        trial = self._trials.pop(index)
        if objective is None:
            self._search.tell(trial, state=states.PRUNED)
        else:
            self._search.tell(trial, objective)

    def replay(self, index: int, values: Values, history: Sequence[float], objective: float | None) -> None:
        """Add a trial of an earlier job as if this job had run it."""
        self.start(index, values)
        for epoch, value in enumerate(history, start=1):
            self.report(index, epoch, value)
        self.end(index, objective)

    def _suggest(self, trial: Any, one: Parameter) -> Any:
        if isinstance(one.domain, Choice):
            choices = [_to_choice(value) for value in one.domain.values]
            return one.domain.values[choices.index(trial.suggest_categorical(one.label, choices))]
        log = one.domain.scale == "log"
        if one.domain.integer:
            return trial.suggest_int(one.label, round(one.domain.low), round(one.domain.high), log=log)
        return trial.suggest_float(one.label, one.domain.low, one.domain.high, log=log)


def _draw_point(dimensions: int, seed: int, index: int) -> Sequence[float]:
    from scipy.stats import qmc

    sequence = qmc.Sobol(dimensions, scramble=True, rng=seed)
    if index:
        sequence.fast_forward(index)
    return list(sequence.random(1)[0])


def _grid_positions(one: Parameter) -> list[float]:
    if isinstance(one.domain, Range):
        return list(np.linspace(0, 1, one.domain.points))
    return [(index + 0.5) / len(one.domain.values) for index in range(len(one.domain.values))]


def _select(parameters: Sequence[Parameter], positions: Sequence[float]) -> Values:
    values: Values = {}
    for one, position in zip(parameters, positions, strict=True):
        if one.applies(values):
            values[one.name] = _value_at(one.domain, position)
    return values


def _value_at(domain: Range | Choice, position: float) -> Any:
    if isinstance(domain, Range):
        return domain.at(float(position))
    return domain.values[min(int(position * len(domain.values)), len(domain.values) - 1)]


def _to_choice(value: Any) -> Any:
    """Return a value in a form that Optuna accepts, which has no lists."""
    return json.dumps(value) if isinstance(value, list) else value


def nest_values(values: Values) -> dict[str, Any]:
    """Return the values of a trial as options of a run: those with dotted names become a table."""
    options: dict[str, Any] = {}
    for name, value in values.items():
        table, dot, argument = name.partition(".")
        if dot:
            options.setdefault(table, {})[argument] = value
        else:
            options[name] = value
    return options
