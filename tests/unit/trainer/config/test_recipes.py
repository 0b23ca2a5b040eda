import re
from typing import Any, get_args

import pytest

from trainer.architectures import ARCHITECTURES, family_arguments
from trainer.config.config import TrainConfig, validate
from trainer.config.recipes import RECIPES, describe_rescaling, recipe_epochs

ROWS = [(recipe, arch) for recipe, rows in RECIPES.items() for arch in rows]


def parse(recipe: str, arch: str, **given: Any) -> TrainConfig:
    values = {"arch": arch, "recipe": recipe, "dataset": "/d", "dataset_fingerprint": "f00d", "num_workers": 1}
    return validate(TrainConfig, {"global_batch_size": 64, **RECIPES[recipe][arch], **values, **given})


def test_the_recipes_are_those_that_a_config_allows():
    assert set(RECIPES) == set(get_args(TrainConfig.model_fields["recipe"].annotation))


def test_every_architecture_has_a_row_and_those_of_the_notes_two():
    assert RECIPES["modern"].keys() == ARCHITECTURES.keys()
    in_the_notes = {arch for arch, spec in ARCHITECTURES.items() if "training notes" in spec.source}
    assert RECIPES["notes"].keys() == in_the_notes | {"vgg19"}


@pytest.mark.parametrize(("recipe", "arch"), ROWS)
def test_every_row_gives_a_config_and_says_nothing_that_it_does_not_use(recipe, arch):
    config = parse(recipe, arch).model_dump()
    for name, value in RECIPES[recipe][arch].items():
        assert config[name] == value


@pytest.mark.parametrize(("recipe", "arch"), ROWS)
def test_every_row_sets_arguments_that_its_family_has(recipe, arch):
    assert RECIPES[recipe][arch].get("arch_arguments", {}).keys() <= set(family_arguments(arch))


@pytest.mark.parametrize("arch", RECIPES["notes"])
def test_the_notes_train_at_keras_default_rate_and_batch(arch):
    config = parse("notes", arch)
    assert config.peak_learning_rate == pytest.approx(0.001)
    assert config.global_batch_size == 32
    assert (config.schedule, config.warmup_epochs, config.input_scaling) == ("constant", 0.0, "unit")
    assert (config.weight_decay, config.clip_norm, config.label_smoothing) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("arch", "epochs", "optimizer"),
    [("cnn_sigmoid", 10, "adam"), ("cnn_deep", 20, "adam"), ("alexnet", 50, "sgd"), ("vgg19", 25, "adam")],
)
def test_the_notes_keep_their_epochs_and_optimizer(arch, epochs, optimizer):
    config = parse("notes", arch)
    assert (config.epochs, config.optimizer) == (epochs, optimizer)


@pytest.mark.parametrize(
    ("recipe", "arch", "steps_per_epoch", "epochs"),
    [
        ("modern", "alexnet", 100, 24),
        ("modern", "alexnet", 60, 34),
        ("modern", "alexnet", 1, 2000),
        ("modern", "cnn_tapered", 51, 40),
        ("notes", "cnn_sigmoid", 1, 10),
    ],
)
def test_a_small_dataset_gets_more_epochs_unless_the_notes_say_how_many(recipe, arch, steps_per_epoch, epochs):
    assert recipe_epochs(recipe, arch, steps_per_epoch) == epochs


@pytest.mark.parametrize(
    ("recipe", "arch", "given", "rule"),
    [
        ("modern", "cnn_tapered", {}, ""),
        (
            "modern",
            "cnn_tapered",
            {"global_batch_size": 256},
            "tuned at .* 64, .* 256: .* by the square root to 0.004",
        ),
        ("modern", "resnet18", {"global_batch_size": 256}, "at a batch of 64, .* 256: .* by the square root to 0.16,"),
        ("notes", "cnn_tapered", {}, ""),
        ("notes", "cnn_tapered", {"global_batch_size": 64}, "at a batch of 32, this run uses 64: "),
        # Nobody knows where this one was tuned.
        ("modern", "resnet18", {"global_batch_size": 128, "base_learning_rate": 0.1}, ""),
    ],
)
def test_a_batch_that_the_recipe_was_not_tuned_at_is_described(recipe, arch, given, rule):
    described = describe_rescaling(parse(recipe, arch, **given))
    assert re.search(rule, described) if rule else not described
