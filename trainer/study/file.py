"""The study file: a question, what is varied to answer it, and what is fixed (tuning playbook, rounds)."""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from trainer.config.request import ARGUMENTS, OPTIONS
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_count
from trainer.runtime.record_format import Record

Role = Literal["scientific", "nuisance"]
Scalar = bool | int | float | str

_NOT_IN_BASE = {
    "epochs": "give the budget next to goal: epochs or steps",
    "steps": "give the budget next to goal: epochs or steps",
    "evaluate_test": "trials are chosen by validation; evaluate.py --split test reads the chosen one once",
}
# Why a study must not vary these, by the playbook.
_NEVER_VARIED = {
    "epochs": "the budget of a trial is not a hyperparameter; set epochs or steps next to goal, and run another round",
    "steps": "the budget of a trial is not a hyperparameter; set epochs or steps next to goal, and run another round",
    "seed": "the best of several seeds says nothing; --characterize N repeats the best trial with N seeds",
    "dataset": "results on different images cannot be compared",
    "evaluate_test": "the test split is read once, with train.py --evaluate-test, when all is decided",
    "num_workers": "the same network is trained by any number of workers",
}
_NEVER_NUISANCE = {
    "optimizer": "it decides which other values are good; make it scientific, or fix it in base",
    "arch": "it decides which other values are good; make it scientific, or fix it in base",
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Range(_Strict):
    """Numbers between two ends."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    integer: bool = False
    points: int = Field(5, ge=2)
    """Number of points in a grid."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be less than high {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be more than 0 on a log scale")
        return self

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (" (log)" if self.scale == "log" else "")

    def at(self, position: float) -> float | int:
        """Return the number at a position from 0 (low) to 1 (high)."""
        low, high = (math.log(one) if self.scale == "log" else one for one in (self.low, self.high))
        value = low + position * (high - low)
        # Six digits: a command line is read by people.
        value = float(f"{math.exp(value) if self.scale == 'log' else value:.6g}")
        return round(value) if self.integer else min(max(value, self.low), self.high)

    def position(self, value: float) -> float:
        """Return where a number is, from 0 (low) to 1 (high); outside of that beyond the ends."""
        low, high, at = (math.log(one) if self.scale == "log" else one for one in (self.low, self.high, value))
        return (at - low) / (high - low)


class Choice(_Strict):
    """One of several values."""

    values: list[Scalar | list[int]] = Field(min_length=2)

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter that a study varies."""

    name: str
    """Name of the option, or ``arch_arguments.dropout`` for an argument of the architecture's family."""
    role: Role
    domain: Range | Choice
    parent: tuple[str, Scalar] | None = None
    """If it exists only for one value of another parameter: that parameter and the value."""

    @property
    def label(self) -> str:
        """A name that differs from that of a parameter of the same name under another parent."""
        return f"{self.name} ({self.parent[0]}={self.parent[1]})" if self.parent else self.name

    @property
    def choices(self) -> list[Any]:
        """The values of a choice; empty for a range."""
        return self.domain.values if isinstance(self.domain, Choice) else []

    @property
    def takes_turns(self) -> bool:
        """Whether each of its values gets the same number of trials: it is a scientific choice that always exists."""
        return self.role == "scientific" and self.parent is None and bool(self.choices)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Return whether it exists with these values of the other parameters."""
        return self.parent is None or values.get(self.parent[0]) == self.parent[1]


class Study(Record):
    """The contents of a study file and of ``study.json``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    goal: str = Field(min_length=1)
    """One sentence: the question that the study answers."""
    base: dict[str, Any]
    """Options of train.py that every trial shares."""
    scientific: dict[str, Any] = Field(default_factory=dict)
    """What the question is about: every value gets the same number of trials."""
    nuisance: dict[str, Any] = Field(default_factory=dict)
    """What must be tuned for each scientific value for a fair comparison."""
    trials: int = Field(ge=1)
    algorithm: Literal["sobol", "grid", "tpe"] = "sobol"
    """Quasi-random to explore (Bousquet et al. 2017), tpe to exploit (Bergstra et al. 2011)."""
    early_stopping: Literal["none", "asha"] = "none"
    """asha ends the worse part of the trials after 1, 3, 9, ... epochs (Li et al. 2020)."""
    seed: int = 0
    """Seed of the search."""
    epochs: int | None = Field(None, ge=1)
    """Budget of a trial in epochs."""
    steps: int | None = Field(None, ge=1)
    """Budget of a trial in optimizer steps: compares batch sizes fairly."""
    objective: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """The metric that ranks the trials, at the best checkpoint of each."""
    split: Literal["val"] = "val"
    """The test split is read once, on request, when all is decided."""
    concurrency: int | None = Field(None, ge=1)
    """Number of trials at once; default: as many as can have their own GPUs (or nodes)."""
    allow_batch_size: bool = False
    """Let the batch size be a nuisance parameter all the same."""

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters that are varied, scientific ones first."""
        return [*_parse_parameters(self.scientific, "scientific"), *_parse_parameters(self.nuisance, "nuisance")]

    @property
    def num_combinations(self) -> int:
        """Number of combinations of the scientific values."""
        return math.prod(len(one.choices) for one in self.parameters if one.takes_turns)

    @property
    def maximises(self) -> bool:
        """Whether more of the objective is better."""
        return self.objective == "val_accuracy"

    @property
    def caveats(self) -> list[str]:
        """What is fixed: the conclusions hold only for these values."""
        steps = f"{format_count(self.steps or 0, 'step')}, in whole epochs,"
        budget = format_count(self.epochs, "epoch") if self.epochs else steps
        return [*(f"{name} = {value}" for name, value in self.base.items()), f"budget = {budget} per trial"]


def load_study(path: Path) -> Study:
    """Return the study that a file describes.

    Raises:
        InputError: there is no such file, or `parse_study` refuses it.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"STUDY.toml {path}: {reason}; give a study file") from error
    return parse_study(text, str(path))


def parse_study(text: str, source: str) -> Study:
    """Return the study that a file describes.

    Args:
        text: content of the file, TOML.
        source: name of the file, for messages.

    Raises:
        InputError: it is not TOML, or a key or value is not allowed; names the key.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source} is not TOML: {error}") from error
    try:
        study = Study.model_validate(values)
        parameters = study.parameters
    except ValidationError as error:
        # A key that is unknown is the reason why another one is missing.
        first, *_ = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise InputError(f"{source}: {_name_key(first['loc'])}: {_explain(first)}") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    problem = _find_problem(study, parameters)
    if problem:
        raise InputError(f"{source}: {problem}")
    return study


def find_warnings(study: Study) -> list[str]:
    """Return what the playbook advises against in a study, one line each."""
    per_value = study.trials // study.num_combinations
    # Tuning playbook, "what are the update rules ... and how should they be tuned".
    least_trials = {
        "base_learning_rate": 1,
        "optimizer_arguments.beta_1": 10,
        "optimizer_arguments.epsilon": 25,
        "optimizer_arguments.beta_2": 50,
    }
    return [
        f"{one.label} is worth tuning from {format_count(least_trials[one.name], 'trial')} per scientific value, "
        f"there are {per_value}"
        for one in study.parameters
        if one.role == "nuisance" and per_value < least_trials.get(one.name, 0)
    ]


def _parse_parameters(table: Mapping[str, Any], role: Role) -> list[Parameter]:
    """Return what a table of the file varies: ``NAME``, ``arch_arguments.NAME`` and ``"PARENT=VALUE"`` tables."""
    found = []
    for key, value in table.items():
        name, conditional, text = key.partition("=")
        parent = (name.strip(), _parse_scalar(text.strip())) if conditional else None
        location = (role, key) if conditional else (role,)
        found += [
            Parameter(one, role, _parse_domain(domain, (*location, one)), parent)
            for one, domain in _flatten(value if conditional else {key: value}).items()
        ]
    return found


def _flatten(table: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in (table if isinstance(table, dict) else {"": table}).items():
        if name in ARGUMENTS and isinstance(value, dict):
            flat |= {f"{name}.{argument}": domain for argument, domain in value.items()}
        else:
            flat[name] = value
    return flat


def _parse_domain(value: Any, location: tuple[str, ...]) -> Range | Choice:
    model: type[Range] | type[Choice] = Choice if isinstance(value, list) else Range
    try:
        return model.model_validate({"values": value} if isinstance(value, list) else value)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{_name_key((*location, *first['loc']))}: {first['input']!r}: {first['msg']}; give a list of values, or "
            '{ low = 0.001, high = 0.1, scale = "log" }'
        ) from error


def _parse_scalar(text: str) -> Scalar:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, get_args(Scalar)) else text


def _name_key(location: Iterable[int | str]) -> str:
    return ".".join(str(one) for one in location) or "the file"


def _explain(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "extra_forbidden":
        return f"is unknown; allowed are {', '.join(Study.model_fields)}"
    return f"{error['input']!r}: {error['msg']}"


def _find_problem(study: Study, parameters: list[Parameter]) -> str:
    """Return what is wrong with a file of the correct form; empty if nothing is."""
    if (study.epochs is None) == (study.steps is None):
        return "give the budget of a trial: either epochs or steps"
    if not parameters:
        return "nothing is varied; give [scientific] or [nuisance] parameters, or use train.py"
    for name in study.base:
        if name not in OPTIONS:
            return f"base.{name} is unknown; allowed are {', '.join(sorted(OPTIONS))}"
        if name in _NOT_IN_BASE:
            return f"base.{name}: {_NOT_IN_BASE[name]}"
    seen: dict[str, Parameter] = {}
    for one in parameters:
        problem = _find_problem_of(one, study, seen)
        if problem:
            return f"{one.role}.{one.label}: {problem}"
        seen[one.label] = one
    if "arch" not in study.base and "arch" not in seen:
        return "base.arch is missing: the architecture that is trained"
    if "dataset" not in study.base:
        return "base.dataset is missing: a dataset that jobs/prepare.py made"
    if study.algorithm == "grid":
        size = math.prod(_grid_size(one) for one in parameters)
        if study.trials > size:
            points = format_count(size, "point")
            return f"trials: the grid has {points}, not {study.trials}; give more points per range, or fewer trials"
    return ""


def _find_problem_of(one: Parameter, study: Study, seen: Mapping[str, Parameter]) -> str:
    root = one.name.partition(".")[0]
    if root not in OPTIONS:
        return f"is unknown; allowed are {', '.join(sorted(OPTIONS))}"
    if one.name in _NEVER_VARIED:
        return f"cannot be varied: {_NEVER_VARIED[one.name]}"
    if one.role == "nuisance" and one.name in _NEVER_NUISANCE:
        return f"cannot be a nuisance parameter: {_NEVER_NUISANCE[one.name]}"
    if one.role == "nuisance" and one.name == "global_batch_size" and not study.allow_batch_size:
        return (
            "cannot be a nuisance parameter: the batch size is chosen by speed, and other values must be tuned again "
            "(allow_batch_size = true forces it)"
        )
    if one.name in study.base or one.label in seen:
        return "is given twice"
    if one.parent is not None:
        parent = seen.get(one.parent[0])
        if parent is None or not isinstance(parent.domain, Choice) or one.parent[1] not in parent.domain.values:
            return f"there is no parameter {one.parent[0]} above it with {one.parent[1]} among its values"
    if any(other.name == one.name and (other.parent is None) != (one.parent is None) for other in seen.values()):
        return "is varied both with and without a condition"
    return _find_wrong_value(one)


def _find_wrong_value(one: Parameter) -> str:
    """Return which value of a parameter its option would refuse."""
    if one.name not in OPTIONS:
        return ""
    adapter: TypeAdapter[Any] = TypeAdapter(OPTIONS[one.name].rebuild_annotation())
    values = one.domain.values if isinstance(one.domain, Choice) else [one.domain.at(0), one.domain.at(1)]
    for value in values:
        try:
            adapter.validate_python(str(value) if one.name == "global_batch_size" else value)
        except ValidationError as error:
            return f"{value!r}: {error.errors()[0]['msg']}"
    return ""


def _grid_size(one: Parameter) -> int:
    return one.domain.points if isinstance(one.domain, Range) else len(one.domain.values)
