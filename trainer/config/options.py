"""Command-line options of a run, made from the fields of a `RunRequest`, so that they cannot differ."""

import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

import typer

from trainer.config.config import FORMER_WORDS
from trainer.config.recipes import RECIPES
from trainer.config.request import ARGUMENTS, OPTIONS, RunRequest, merge_file, parse_request
from trainer.runtime.commands import JobCommand
from trainer.runtime.errors import InputError

Wait = Annotated[int, typer.Option("--wait", min=0, help="Seconds to wait for a node if none has joined yet.")]

_GROUPS = {
    "Network": {"arch", "init_from", "freeze_trunk"},
    "Batch": {"global_batch_size", "precision", "min_steps_per_epoch", "memory_limit_gib"},
    "Optimizer": {
        *("optimizer", "base_learning_rate", "momentum", "weight_decay"),
        *("schedule", "warmup_epochs", "clip_norm", "label_smoothing", "class_weights", "ema_momentum"),
    },
    "Augmentation": {name for name in OPTIONS if name.startswith("augment")} | {"input_scaling"},
    "Cluster": {"num_workers", "batch_norm", "all_reduce", "gradient_exchange", "xla", "steps_per_execution"},
}
_OTHERS = "Run"
_OWN = {
    "config": (
        str,
        _OTHERS,
        "TOML file, or the config.json of a run, to read options from; options on the command line replace them.",
    ),
    "arch_argument": (list[str], "Network", "NAME=VALUE: argument of the architecture's family, such as dropout=0.3."),
    "optimizer_argument": (
        list[str],
        "Optimizer",
        "NAME=VALUE: argument of the optimizer. sgd has nesterov (true or false, default true); the others have beta_1 "
        "(default 0.9), beta_2 (default 0.999) and epsilon (default 1e-7).",
    ),
}


class GroupedCommand(JobCommand):
    """A command whose help shows its options in groups, without boxes."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group, the job's own options last."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in (*_GROUPS, _OTHERS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups[getattr(parameter, "rich_help_panel", None) or _OTHERS].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def add_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a run to a typer command with ``**options``; `parse_command` makes a request from them.

    An option that is not given is None. The text under a field is its help. Parameters of the command are not replaced.
    """
    signature = inspect.signature(command)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    described = {
        name: (
            field.annotation | None,  # type: ignore[operator]
            typer.Option(
                *_option_names(name),
                help=f"{field.description}{_describe_default(name)}",
                rich_help_panel=next((group for group, names in _GROUPS.items() if name in names), _OTHERS),
                **_take_former_words(name),
            ),
        )
        for name, field in OPTIONS.items()
        if name not in ARGUMENTS and name not in signature.parameters
    }
    for name, (kind, group, text) in _OWN.items():
        described[name] = (kind | None, typer.Option(help=text, rich_help_panel=group))
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        for name, (kind, option) in described.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return command


def parse_command(options: Mapping[str, Any]) -> RunRequest:
    """Make a request from the options of `add_run_options`, which take precedence over those of a config file.

    Raises:
        InputError: the file cannot be read, a name is unknown, or a value is not allowed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for table in ARGUMENTS:
        flag = table.removesuffix("s")
        given[table] = dict(parse_assignment(text, flag) for text in given.pop(flag, []))
    config = given.pop("config", "")
    return parse_request(merge_file(config, given) if config else given)


def _describe_default(name: str) -> str:
    if any(name in row for recipe in RECIPES.values() for row in recipe.values()):
        return " [default: from the recipe]"
    field = OPTIONS[name]
    return "" if field.is_required() or field.default in (None, "") else f" [default: {field.default}]"


def _take_former_words(name: str) -> dict[str, Any]:
    """Return how typer leaves the check of a word to the field, which also takes former ones."""
    if name not in FORMER_WORDS:
        return {}
    return {"parser": str, "metavar": f"<{'|'.join(get_args(OPTIONS[name].annotation))}>"}


def _option_names(field: str) -> tuple[str, ...]:
    """Return the command-line option of a field if it is not the field's name."""
    return ("--memory-limit",) if field == "memory_limit_gib" else ()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_assignment(text: str, flag: str = "arch_argument") -> tuple[str, Any]:
    """Return the name and the value of ``NAME=VALUE``; the value is parsed as JSON if it is valid JSON, else text.

    Args:
        text: the argument as given.
        flag: name of the option, for the message.

    Raises:
        InputError: there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{_flag(flag)} {text!r}: give NAME=VALUE, such as dropout=0.3")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def format_command(job: str, options: Mapping[str, Any]) -> str:
    """Return the command line of a job with these options by field name; those that are None are left out."""
    words = ["python", f"jobs/{job}"]
    for name, value in options.items():
        if name in ARGUMENTS:
            for argument, of_argument in value.items():
                words += [_flag(name.removesuffix("s")), f"{argument}={format_value(of_argument)}"]
        elif isinstance(value, bool):
            words.append("--" + "no-" * (not value) + name.replace("_", "-"))
        elif value is not None:
            words += [*(_option_names(name) or (_flag(name),)), format_value(value)]
    return shlex.join(words)


def format_value(value: Any) -> str:
    """Return a value as `parse_assignment` reads it back."""
    return value if isinstance(value, str) else json.dumps(value)
