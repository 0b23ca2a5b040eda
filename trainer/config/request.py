"""The request for a run, and the config that follows from it: the only way from options to a `TrainConfig`.

The command line, a config file, a study and Python all make a `RunRequest`. `resolve` fills what it leaves open from
the number of workers, the dataset and the measured batch.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.fields import FieldInfo

from trainer.architectures import ARCHITECTURES, family_arguments
from trainer.config.config import BatchRequest, Settings, TrainConfig, validate
from trainer.config.former import CONFIG_FORMAT, upgrade_config
from trainer.config.optimizers import drop_foreign_arguments
from trainer.config.pretrained import check_arch_of_published, find_published, resolve_init_from
from trainer.config.recipes import RECIPES, recipe_epochs, recipe_patience
from trainer.runtime import storage
from trainer.runtime.errors import InputError

if TYPE_CHECKING:
    # --help is quicker without.
    from data_prep.manifest import Manifest
    from trainer.config.batch_table import BatchChoice


class RunRequest(BaseModel):
    """A request for a run: every value that was given or that the recipe has, and which ones are left open."""

    # The text under each field is its help on the command line.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    arch: str
    """Architecture of the network; --list-archs lists them."""
    recipe: Literal["modern", "notes"] = "modern"
    """Recipe that supplies the values of options that are not given."""
    dataset: str = ""
    """URI of the prepared dataset, local or s3://. Default: 5,000 MNIST images."""
    num_workers: str = "auto"
    """Number of training workers: a number, MIN:MAX, or auto (one per GPU, or one without GPUs)."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the train split. The recipe has more of them if a small split would get too few steps."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps to train for instead of --epochs, rounded up to whole epochs."""
    patience: int | None = Field(None, ge=0)
    """Early stopping: epochs without an improvement in validation after which training ends; with --schedule plateau
    the learning rate falls to zero first. 0 trains all epochs. Default: that of the recipe, or 0 if --epochs or --steps
    is given."""
    batch: BatchRequest
    settings: Settings

    @field_validator("num_workers", mode="before")
    @classmethod
    def _take_a_number(cls, value: Any) -> str:
        return str(value)

    def on_dataset(self, uri: str) -> "RunRequest":
        """Return the request for another dataset, such as the embedded one."""
        return self.model_copy(update={"dataset": storage.resolve_uri(uri)})


_PARTS: Mapping[str, type[BaseModel]] = {"batch": BatchRequest, "settings": Settings}
_OWN = {name: field for name, field in RunRequest.model_fields.items() if name not in _PARTS}
OPTIONS: Mapping[str, FieldInfo] = {
    **_OWN,
    **{name: field for part in _PARTS.values() for name, field in part.model_fields.items()},
}
"""All options of a run, by name."""
ARGUMENTS = ("arch_arguments", "optimizer_arguments")
"""Options that are tables of NAME = VALUE."""
# Fields in the config of a run that are not options.
_NO_OPTIONS = {"dataset_fingerprint", "known_augmentation"}


def parse_request(options: Mapping[str, Any]) -> RunRequest:
    """Make the request that options describe.

    Args:
        options: values by names in OPTIONS; None leaves an option open, as if it were not given.

    Raises:
        InputError: a name is unknown, or a value is not allowed; names the option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            raise InputError(
                f"option {name!r} is unknown; "
                + (f"did you mean {near[0]!r}?" if near else f"use {', '.join(OPTIONS)}")
            )
    if "arch" not in given:
        raise InputError(f"--arch is missing; choose from {', '.join(ARCHITECTURES)}")
    arch, recipe = given["arch"], given.get("recipe", "modern")
    check_arch(arch)
    if "augment" not in given and any(name.startswith("augment_") for name in given):
        given["augment"] = "all"
    if "input_scaling" not in given and (published := find_published(given.get("init_from", ""))):
        given["input_scaling"] = published.input_scaling
    values = merge_options(_recipe_of(recipe, arch), given)
    check_arch(arch, values["arch_arguments"])
    for name, resolve_location in (("dataset", storage.resolve_uri), ("init_from", resolve_init_from)):
        if values.get(name):
            values[name] = resolve_location(values[name])
    check_arch_of_published(values.get("init_from", ""), arch)
    if {"epochs", "steps"} <= given.keys():
        raise InputError(f"--epochs {given['epochs']} and --steps {given['steps']}: give one of them")
    parts = {
        part: validate(model, {name: values[name] for name in model.model_fields if name in values})
        for part, model in _PARTS.items()
    }
    # The number of epochs of a recipe depends on the batch: see `resolve`.
    own = {name: values[name] for name in _OWN if name in given}
    return validate(RunRequest, own | parts)


def merge_options(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which the given ones replace the defaults; their arguments are merged one by one.

    Default arguments of an optimizer do not apply to another one that is given.

    Raises:
        InputError: the arguments are not a table.
    """
    merged = {**defaults, **given}
    for table in ARGUMENTS:
        for options in (defaults, given):
            if not isinstance(options.get(table, {}), Mapping):
                raise InputError(
                    f"{table} {options[table]!r} is not a table; give [{table}] with one NAME = VALUE per line"
                )
        arguments = defaults.get(table, {})
        if table == "optimizer_arguments" and given.get("optimizer") not in (None, defaults.get("optimizer")):
            arguments = drop_foreign_arguments(given["optimizer"], arguments)
        merged[table] = {**arguments, **given.get(table, {})}
    return merged


def read_options(path: str) -> dict[str, Any]:
    """Read the options of a TOML file, or those in the ``config.json`` of a run.

    Args:
        path: path or URI of the file, local or s3://.

    Raises:
        InputError: there is no such file, or it has another format.
    """
    uri = storage.resolve_uri(path)
    try:
        text = storage.read_bytes(uri).decode()
        options = _read_record(text) if uri.endswith(".json") else tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(
            f"--config {path}: there is no such file; give a TOML file or the config.json of a run"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"--config {path} is neither TOML nor the config.json of a run ({error}); write one NAME = VALUE per line"
        ) from error
    return {name: value for name, value in options.items() if name not in _NO_OPTIONS}


def _read_record(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if (number := record.get("format", 1)) > CONFIG_FORMAT:
        raise ValueError(f"it is of format {number}: update this program to read it")
    return upgrade_config(record["config"], number)


def merge_file(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a file, in which the given ones replace others.

    Raises:
        InputError: the file cannot be read; see `read_options`.
    """
    of_file = read_options(path)
    if {"epochs", "steps"} & given.keys():
        of_file = {name: value for name, value in of_file.items() if name not in ("epochs", "steps")}
    return merge_options(of_file, given)


def format_options(values: Mapping[str, Any]) -> str:
    """Format options as a TOML file that `read_options` reads back."""
    plain = {name: value for name, value in values.items() if name in OPTIONS and name not in ARGUMENTS}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    for table in ARGUMENTS:
        if arguments := values.get(table):
            lines += ["", f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in arguments.items())]
    return "\n".join(lines)


def check_arch(arch: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Raise InputError if there is no such architecture, or if its family has no such arguments."""
    if arch not in ARCHITECTURES:
        raise InputError(f"--arch {arch!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
    types = family_arguments(arch)
    for name, value in (arguments or {}).items():
        if name not in types:
            raise InputError(f"--arch-argument {name!r} is unknown; {arch} has {', '.join(types)}")
        try:
            TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"--arch-argument {name}={value}: {error.errors()[0]['msg']}") from error


def resolve(request: RunRequest, manifest: "Manifest", num_workers: int, batch: "BatchChoice") -> TrainConfig:
    """Fill in what a request leaves open. The same arguments always give the same config.

    Args:
        request: request for the run.
        manifest: manifest of the dataset.
        num_workers: number of workers, such as from `trainer.workers.groups.parse_num_workers` (docs/decisions/0013).
        batch: the given or measured batch.

    Returns:
        The complete config of the run.
    """
    steps_per_epoch = max(1, manifest.splits["train"].rows // batch.global_batch_size)
    epochs = request.epochs
    if epochs is None and request.steps is not None:
        epochs = math.ceil(request.steps / steps_per_epoch)
    return TrainConfig(
        **request.settings.model_dump(),
        arch=request.arch,
        recipe=request.recipe,
        dataset=request.dataset,
        dataset_fingerprint=manifest.fingerprint,
        num_workers=num_workers,
        global_batch_size=batch.global_batch_size,
        precision=batch.precision,
        epochs=epochs or recipe_epochs(request.recipe, request.arch, steps_per_epoch),
        patience=_settle_patience(request, epochs),
    )


def _settle_patience(request: RunRequest, epochs: int | None) -> int:
    if request.patience is not None:
        return request.patience
    return 0 if epochs else recipe_patience(request.recipe, request.settings.schedule)


def _recipe_of(recipe: str, arch: str) -> Mapping[str, Any]:
    if recipe not in RECIPES:
        raise InputError(f"--recipe {recipe!r} is unknown; choose from {', '.join(RECIPES)}")
    if arch not in RECIPES[recipe]:
        raise InputError(
            f"--recipe {recipe} has no {arch}, only {', '.join(RECIPES[recipe])}; give one of them or --recipe modern"
        )
    return RECIPES[recipe][arch]
