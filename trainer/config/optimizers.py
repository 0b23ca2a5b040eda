"""The arguments of each optimizer: their names, types, limits and defaults."""

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
NAMES = {name for model in _ARGUMENTS.values() for name in model.model_fields}
"""The arguments of all optimizers."""


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
    own = own_arguments(optimizer) or NAMES
    return {name: value for name, value in arguments.items() if name in own or name not in NAMES}


def own_arguments(optimizer: str) -> list[str]:
    """Return the names of the arguments of an optimizer; none if there is no such optimizer."""
    return list(_ARGUMENTS[optimizer].model_fields) if optimizer in _ARGUMENTS else []
