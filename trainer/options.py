"""Command-line options made from the fields of TrainConfig and BatchRequest, so that they cannot differ."""

import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from trainer.config import BatchRequest, TrainConfig

Wait = Annotated[int, typer.Option("--wait", min=0, help="Seconds to wait for a node, where none works yet.")]

# Not a user's to give, or given in a form of their own.
_WITHOUT_OPTION = {"dataset_fingerprint", "arch_arguments"}


def add_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a typer command with ``**options`` one option for each field of both that it does not name itself.

    The default is None: the recipe decides. The text under the field is the help.
    """
    signature = inspect.signature(command)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                field.annotation | None,  # type: ignore[operator]
                typer.Option(*_option_names(name), help=field.description),
            ],
        )
        for name, field in {**TrainConfig.model_fields, **BatchRequest.model_fields}.items()
        if name not in signature.parameters and name not in _WITHOUT_OPTION
    ]
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return command


def _option_names(field: str) -> tuple[str, ...]:
    """Returns the option of a field where it is not its name: the help says the unit."""
    return ("--" + field.removesuffix("_gib").replace("_", "-"),) if field.endswith("_gib") else ()


def parse_assignment(text: str) -> tuple[str, Any]:
    """Returns the name and the value of ``NAME=VALUE``: JSON where it is JSON, else text.

    Raises:
        typer.BadParameter: there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: give NAME=VALUE, such as dropout=0.3")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def format_command(job: str, options: Mapping[str, Any]) -> str:
    """Returns the command line of a job with these options by field name; those that are None are left out."""
    words = ["python", f"jobs/{job}"]
    for name, value in options.items():
        if name == "arch_arguments":
            for argument, of_argument in value.items():
                words += ["--arch-argument", f"{argument}={format_value(of_argument)}"]
        elif isinstance(value, bool):
            words.append("--" + "no-" * (not value) + name.replace("_", "-"))
        elif value is not None:
            words += [*(_option_names(name) or ("--" + name.replace("_", "-"),)), format_value(value)]
    return shlex.join(words)


def format_value(value: Any) -> str:
    """Returns a value as `parse_assignment` reads it back."""
    return value if isinstance(value, str) else json.dumps(value)
