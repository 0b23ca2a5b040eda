"""The arguments of each optimizer: their names, types, limits and defaults."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _SGDArguments(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    nesterov: bool = True


class _AdamArguments(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    beta_1: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-7, gt=0)


_ARGUMENTS: Mapping[str, type[BaseModel]] = {
    "sgd": _SGDArguments,
    "adam": _AdamArguments,
    "adamw": _AdamArguments,
    "nadam": _AdamArguments,
}
# Fields of earlier configs that no longer have an effect.
_NO_OPTIONS_NOW = {"tuned_batch_size"}
SQUARE_ROOT_FORMAT = 3
"""The format of ``config.json`` since which the learning rate of SGD is scaled by the square root."""
_NAMES = {name for model in _ARGUMENTS.values() for name in model.model_fields}


def complete_arguments(optimizer: str, given: Mapping[str, Any]) -> dict[str, bool | float]:
    """Return all arguments of an optimizer: the given ones, and the defaults of the others.

    Raises:
        ValueError: the optimizer has no such argument, or the value is not allowed.
    """
    model = _ARGUMENTS[optimizer]
    try:
        return model.model_validate(given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if name not in model.model_fields:
            raise ValueError(f"{name!r} is unknown; {optimizer} has {', '.join(model.model_fields)}") from error
        raise ValueError(f"{name}={first['input']}: {first['msg']}") from error


def drop_foreign_arguments(optimizer: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments without those of other optimizers; unknown names are kept, so that they are refused."""
    own = _ARGUMENTS[optimizer].model_fields if optimizer in _ARGUMENTS else _NAMES
    return {name: value for name, value in arguments.items() if name in own or name not in _NAMES}


def find_former_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the optimizer in a config of format 1, where each was a field of the config."""
    model = _ARGUMENTS.get(config.get("optimizer", ""))
    return {name: config[name] for name in (model.model_fields if model else ()) if name in config}


def find_former_rate(config: Mapping[str, Any]) -> float:
    """Return the base learning rate that gives a config of an earlier format the rate that it had.

    That of SGD was scaled to the batch linearly, not by the square root.
    """
    rate: float = config["base_learning_rate"]
    return rate * math.sqrt(config["global_batch_size"] / 256) if config["optimizer"] == "sgd" else rate


def upgrade_options(config: Mapping[str, Any], record_format: int) -> dict[str, Any]:
    """Return the options in a config of any format by their current names, with their current meaning."""
    kept = {name: value for name, value in config.items() if name not in _NAMES | _NO_OPTIONS_NOW}
    if record_format < SQUARE_ROOT_FORMAT:
        kept["base_learning_rate"] = find_former_rate(config)
    return {"optimizer_arguments": find_former_arguments(config), **kept}
