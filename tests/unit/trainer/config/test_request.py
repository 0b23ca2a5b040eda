import re
from typing import Any

import pytest

from data_prep.manifest import Manifest
from trainer.architectures import ARCHITECTURES
from trainer.config.batch_table import given_batch
from trainer.config.config import TrainConfig
from trainer.config.request import (
    OPTIONS,
    check_arch,
    format_options,
    merge_options,
    parse_request,
    read_options,
    resolve,
)
from trainer.record.run_folder import describe_run
from trainer.runtime.errors import InputError


@pytest.fixture
def manifest(write_dataset) -> Manifest:
    """Of 100 images to train on."""
    return write_dataset(rows=(100, 10, 0), image_size=24, rows_per_shard=100).manifest


def settle(manifest: Manifest, batch: int = 50, num_workers: int = 1, **options: Any) -> TrainConfig:
    request = parse_request({"arch": "cnn_softmax", "dataset": "/data", **options})
    return resolve(request, manifest, num_workers, given_batch(request.batch, batch, "float32"))


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="option 'base_learning_rates' is unknown; did you mean 'base_learning_rate'"):
        parse_request({"arch": "alexnet", "base_learning_rates": 0.1})
    with pytest.raises(InputError, match="option 'qqq' is unknown; use arch, recipe, "):
        parse_request({"arch": "alexnet", "qqq": 1})


def test_an_option_that_is_none_is_left_open():
    everything = dict.fromkeys(OPTIONS)
    assert parse_request({**everything, "arch": "alexnet"}) == parse_request({"arch": "alexnet"})


def test_places_are_absolute_since_workers_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = parse_request({"arch": "alexnet", "dataset": "prepared", "init_from": "runs/old"})
    assert (request.dataset, request.settings.init_from) == (str(tmp_path / "prepared"), str(tmp_path / "runs/old"))
    assert parse_request({"arch": "alexnet"}).dataset == ""


@pytest.mark.parametrize("options", [{}, {"arch": None}])
def test_an_architecture_is_needed(options):
    with pytest.raises(InputError, match=f"--arch is missing; choose from {', '.join(ARCHITECTURES)}"):
        parse_request(options)


@pytest.mark.parametrize("arch", ["", "vgg", "AlexNet"])
def test_an_unknown_architecture_is_refused_with_those_there_are(arch):
    with pytest.raises(InputError, match=f"--arch '{arch}' is unknown; choose from {', '.join(ARCHITECTURES)}"):
        parse_request({"arch": arch})


def test_every_architecture_is_known():
    for arch in ARCHITECTURES:
        check_arch(arch, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 3}, "--arch-argument 'depth' is unknown; alexnet has width,"),
        ({"width": "wide"}, "--arch-argument width=wide: Input should be a valid number"),
        ({"kernel_initializer": 3}, "--arch-argument kernel_initializer=3: Input should be a valid string"),
        ({"dropout": 1.5}, "--arch-argument dropout=1.5: Input should be less than 1"),
        ({"width": 0}, "--arch-argument width=0: Input should be greater than 0"),
        ({"dense_units": -5}, "--arch-argument dense_units=-5: Input should be greater than or equal to 1"),
    ],
)
def test_arguments_that_the_family_does_not_take_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_request({"arch": "alexnet", "arch_arguments": arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "old"}, "--recipe 'old' is unknown; choose from notes, modern"),
        ({"recipe": "notes", "arch": "resnet18"}, "--recipe notes has no resnet18, only cnn_sigmoid, "),
        ({"epochs": 0}, "--epochs 0: "),
        ({"epochs": 2, "steps": 9}, "--epochs 2 and --steps 9: give one of them"),
        ({"seed": -1}, "--seed -1: "),
        (
            {"init_from": "keras:alexnet"},
            "--init-from keras:alexnet: there are no such weights; ",
        ),
        ({"init_from": "keras:vgg19"}, "--init-from keras:vgg19 has the weights of vgg19, not of --arch alexnet; "),
        ({"global_batch_size": "many"}, "--global-batch-size many: "),
        ({"global_batch_size": 0}, "--global-batch-size 0: "),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_option(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        parse_request({"arch": "alexnet", **options})


@pytest.mark.parametrize(
    ("options", "batch", "precision"),
    [
        ({}, "auto", "auto"),
        ({"recipe": "notes"}, "32", "float32"),
        ({"recipe": "notes", "precision": "auto"}, "32", "auto"),
        ({"global_batch_size": 48}, "48", "auto"),
        ({"global_batch_size": "knee", "precision": "mixed_bfloat16"}, "knee", "mixed_bfloat16"),
    ],
)
def test_batch_and_precision_are_left_open_unless_the_notes_or_an_option_say_them(options, batch, precision):
    asked = parse_request({"arch": "cnn_softmax", **options}).batch
    assert (asked.global_batch_size, asked.precision) == (batch, precision)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"optimizer": "adamw", "epochs": 1000, "weight_decay": 0.01, "recipe": "modern", "patience": 4}),
        ({"recipe": "notes"}, {"optimizer": "adam", "epochs": 10, "input_scaling": "unit", "patience": 0}),
        ({"optimizer": "sgd", "epochs": 3, "weight_decay": 0.0}, {"optimizer": "sgd", "epochs": 3, "weight_decay": 0}),
        ({"steps": 99}, {"epochs": 50, "global_batch_size": 50}),
        ({"steps": 100, "batch": 100}, {"epochs": 100}),
        ({"steps": 100, "batch": 100}, {"patience": 0}),
        ({"epochs": 3}, {"patience": 0}),
        ({"epochs": 3, "patience": 2}, {"patience": 2}),
        ({"schedule": "cosine"}, {"patience": 0}),
        ({}, {"augment": "auto", "augment_rotation": 10.0}),
        ({"augment_rotation": 5.0}, {"augment": "all", "augment_rotation": 5.0, "augment_zoom": 0.1}),
        ({"augment_rotation": 5.0, "augment": "auto"}, {"augment": "auto", "augment_rotation": 5.0}),
        ({"augment": "none"}, {"augment": "none"}),
        ({"batch": 20, "num_workers": 2}, {"num_workers": 2, "global_batch_size": 20, "epochs": 400}),
        ({"arch_arguments": {"dense_units": 8}}, {"arch_arguments": {"dense_units": 8}}),
    ],
)
def test_what_is_left_open_is_settled_by_recipe_dataset_and_batch(manifest, options, expected):
    config = settle(manifest, **options).model_dump()
    assert {name: config[name] for name in expected} == expected
    assert config["dataset_fingerprint"] == manifest.fingerprint
    assert config["dataset"] == "/data"


def test_published_weights_choose_the_scaling_of_the_pixels_unless_it_is_given():
    settings = parse_request({"arch": "xception", "init_from": "keras:xception"}).settings
    assert (settings.init_from, settings.input_scaling) == ("keras:xception", "symmetric")
    settings = parse_request({"arch": "vgg16", "init_from": "keras:vgg16", "input_scaling": "unit"}).settings
    assert settings.input_scaling == "unit"


def test_arguments_of_the_recipe_and_of_an_option_are_put_together():
    request = parse_request({"arch": "alexnet", "arch_arguments": {"dropout": 0.1}})
    assert request.settings.arch_arguments == {"batch_norm_momentum": 0.9, "dropout": 0.1}


@pytest.mark.parametrize(
    ("defaults", "given", "arguments"),
    [
        ({}, {"nesterov": False}, {"nesterov": False}),
        ({"optimizer": "sgd", "nesterov": True}, {"nesterov": False}, {"nesterov": False}),
        ({"optimizer": "adam", "beta_1": 0.5}, {"beta_2": 0.9}, {"beta_1": 0.5, "beta_2": 0.9}),
        ({"optimizer": "adam", "beta_1": 0.5}, {"optimizer": "nadam"}, {"beta_1": 0.5}),
        ({"optimizer": "sgd", "nesterov": True}, {"optimizer": "adam", "beta_1": 0.5}, {"beta_1": 0.5}),
        # As the base of a study that compares optimizers.
        ({"nesterov": True}, {"optimizer": "adam"}, {}),
        # What no optimizer has, or not the one that was given, is left to be refused.
        ({"optimizer": "sgd", "nestrov": True}, {"optimizer": "adam"}, {"nestrov": True}),
        ({}, {"optimizer": "adam", "nesterov": True}, {"nesterov": True}),
    ],
)
def test_default_arguments_do_not_apply_to_another_optimizer(defaults, given, arguments):
    def nest(values: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in values.items() if name == "optimizer"}
        return {**own, "optimizer_arguments": {name: value for name, value in values.items() if name not in own}}

    assert merge_options(nest(defaults), nest(given))["optimizer_arguments"] == arguments


def test_another_optimizer_than_that_of_the_recipe_has_its_own_arguments():
    request = parse_request({"arch": "alexnet", "recipe": "notes", "optimizer": "adam"})
    assert request.settings.optimizer_arguments == {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}
    assert parse_request({"arch": "alexnet", "recipe": "notes"}).settings.optimizer_arguments == {"nesterov": False}


@pytest.mark.parametrize("table", ["arch_arguments", "optimizer_arguments"])
def test_arguments_that_are_no_table_are_refused(table):
    with pytest.raises(InputError, match=rf"{table} 3 is not a table; give \[{table}\] with one NAME = VALUE per line"):
        parse_request({"arch": "alexnet", table: 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nesterov": True}, "'nesterov' is unknown; adamw has beta_1, beta_2, epsilon"),
        ({"beta_2": 1.0}, "beta_2=1.0: Input should be less than 1"),
        ({"epsilon": 0}, "epsilon=0: Input should be greater than 0"),
        ({"beta_1": float("nan")}, "beta_1=nan: Input should be a finite number"),
    ],
)
def test_arguments_that_the_optimizer_does_not_take_are_refused(arguments, message):
    with pytest.raises(InputError, match=rf"^--optimizer-argument .*: .*{message}"):
        parse_request({"arch": "alexnet", "optimizer_arguments": arguments})


@pytest.mark.parametrize("name", ["run.toml", "config.json"])
def test_the_config_of_a_run_gives_the_same_run_again(manifest, tmp_path, name):
    config = settle(manifest, arch_arguments={"dense_units": 8}, seed=3, clip_norm=0.5)
    text = format_options(config.model_dump()) if name == "run.toml" else describe_run(config, "1").model_dump_json()
    (tmp_path / name).write_text(text)
    request = parse_request(read_options(str(tmp_path / name)))
    assert resolve(request, manifest, 1, given_batch(request.batch, 50, "float32")) == config
    assert (request.batch.given_size, request.batch.precision) == (50, "float32")


@pytest.mark.parametrize(("name", "text"), [("a.toml", "arch = "), ("a.json", "{"), ("b.json", "{}"), ("c.json", "[]")])
def test_a_file_that_holds_no_options_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"is neither TOML nor the config.json of a run"):
        read_options(str(tmp_path / name))
