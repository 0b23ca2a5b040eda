from typing import get_args

import pytest

from trainer.config.config import Settings
from trainer.config.optimizers import (
    complete_arguments,
    drop_foreign_arguments,
)

ADAM = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}


@pytest.mark.parametrize("optimizer", get_args(Settings.model_fields["optimizer"].annotation))
def test_every_optimizer_of_a_run_has_its_arguments(optimizer):
    assert complete_arguments(optimizer, {}) == ({"nesterov": True} if optimizer == "sgd" else ADAM)


def test_given_arguments_replace_the_defaults():
    assert complete_arguments("nadam", {"beta_2": 0.9}) == {**ADAM, "beta_2": 0.9}


@pytest.mark.parametrize(
    ("optimizer", "given", "message"),
    [
        ("sgd", {"beta_1": 0.5}, "'beta_1' is unknown; sgd has nesterov"),
        ("sgd", {"nesterov": "perhaps"}, "nesterov=perhaps: Input should be a valid boolean"),
        ("adam", {"beta_1": -0.1}, "beta_1=-0.1: Input should be greater than or equal to 0"),
        ("adam", {"epsilon": float("inf")}, "epsilon=inf: Input should be a finite number"),
    ],
)
def test_an_argument_that_is_not_allowed_is_refused_with_what_is(optimizer, given, message):
    with pytest.raises(ValueError, match=message):
        complete_arguments(optimizer, given)


def test_only_arguments_of_other_optimizers_are_dropped():
    arguments = {"nesterov": True, "epsilon": 1e-3, "epsylon": 1}
    assert drop_foreign_arguments("adam", arguments) == {"epsilon": 1e-3, "epsylon": 1}
    assert drop_foreign_arguments("sgd", arguments) == {"nesterov": True, "epsylon": 1}
    # The optimizer itself is refused elsewhere.
    assert drop_foreign_arguments("lion", arguments) == arguments
