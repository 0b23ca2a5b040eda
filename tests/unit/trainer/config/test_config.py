import json

import pytest

from trainer.config.config import (
    BatchRequest,
    TrainConfig,
    check_shares,
    find_differences,
    resize_batch,
    validate,
)
from trainer.runtime.errors import InputError

REQUIRED = {
    "arch": "alexnet",
    "dataset": "/datasets/cats",
    "dataset_fingerprint": "f00d",
    "num_workers": 2,
    "global_batch_size": 64,
    "base_learning_rate": 0.1,
}


def test_the_values_that_are_needed_are_enough():
    config = validate(TrainConfig, REQUIRED)
    assert config.arch == "alexnet"
    assert config.epochs == 10


def test_a_config_survives_as_json_with_nothing_left_out():
    config = validate(
        TrainConfig, {**REQUIRED, "arch_arguments": {"width": 0.5, "dense_units": 64, "filters": [8, 16]}}
    )
    written = config.model_dump_json()
    assert json.loads(written).keys() == TrainConfig.model_fields.keys()
    assert TrainConfig.model_validate_json(written) == config


@pytest.mark.parametrize(
    ("batch_norm", "num_workers", "global_batch_size", "is_synchronized"),
    [
        ("auto", 2, 62, True),
        ("auto", 2, 64, False),
        ("auto", 4, 64, True),
        ("auto", 1, 8, False),
        ("global", 2, 64, True),
        ("global", 1, 64, False),
        ("replica", 2, 8, False),
    ],
)
def test_batch_norm_is_synchronized_where_a_replica_has_too_few_images(
    batch_norm, num_workers, global_batch_size, is_synchronized
):
    values = {"batch_norm": batch_norm, "num_workers": num_workers, "global_batch_size": global_batch_size}
    assert validate(TrainConfig, REQUIRED | values).synchronizes_batch_norm is is_synchronized


def test_the_arguments_of_the_optimizer_are_complete():
    adam = {"optimizer": "adam", "optimizer_arguments": {"beta_1": 0.5}}
    assert validate(TrainConfig, REQUIRED).optimizer_arguments == {"nesterov": True}
    assert validate(TrainConfig, {**REQUIRED, **adam}).optimizer_arguments == {
        "beta_1": 0.5,
        "beta_2": 0.999,
        "epsilon": 1e-7,
    }
    with pytest.raises(
        InputError, match=r"^--optimizer-argument \{'beta_1': 0.5\}: .*'beta_1' is unknown; sgd has nest"
    ):
        validate(TrainConfig, {**REQUIRED, **adam, "optimizer": "sgd"})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        validate(TrainConfig, REQUIRED).seed = 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "nadam"])
def test_the_learning_rate_grows_with_the_square_root_of_the_global_batch(optimizer):
    config = validate(
        TrainConfig, {**REQUIRED, "optimizer": optimizer, "base_learning_rate": 0.1, "global_batch_size": 64}
    )
    assert config.peak_learning_rate == pytest.approx(0.05)
    assert config.per_replica_batch_size == 32


@pytest.mark.parametrize("value", ["auto", "max", "knee", "1", "4096"])
def test_a_batch_is_auto_max_or_knee_or_a_number(value):
    request = validate(BatchRequest, {"global_batch_size": value})
    assert request.given_size == (int(value) if value.isdecimal() else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("global_batch_size", "0"), ("global_batch_size", "-8"), ("global_batch_size", "largest"), ("precision", "half"),
     ("min_steps_per_epoch", 0)],
)  # fmt: skip
def test_a_request_that_is_not_allowed_is_refused_with_its_option(name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: "):
        validate(BatchRequest, {name: value})


def test_the_option_of_the_memory_limit_is_named_without_its_unit():
    with pytest.raises(InputError, match=r"^--memory-limit 0: "):
        validate(BatchRequest, {"memory_limit_gib": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_workers", 0),
        ("global_batch_size", 0),
        ("epochs", 0),
        ("base_learning_rate", 0.0),
        ("base_learning_rate", -1.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("warmup_epochs", -1.0),
        ("clip_norm", -1.0),
        ("label_smoothing", 1.0),
        ("keep_best", 0),
        ("optimizer", "lion"),
        ("schedule", "linear"),
        ("precision", "float16"),
        ("input_scaling", "none"),
        ("epochs", 2.5),
        ("seed", "a"),
        ("colour", "red"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_option(name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: "):
        validate(TrainConfig, {**REQUIRED, name: value})


@pytest.mark.parametrize("name", ["base_learning_rate", "weight_decay", "clip_norm", "warmup_epochs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: "):
        validate(TrainConfig, {**REQUIRED, name: value})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_value_that_is_needed_cannot_be_left_out(name):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} .*Field required"):
        validate(TrainConfig, {key: value for key, value in REQUIRED.items() if key != name})


@pytest.mark.parametrize(("batch", "suggested"), [(65, "64 or 66"), (1, "2 or 2")])
def test_a_batch_that_cannot_be_divided_is_refused_with_those_that_can(batch, suggested):
    with pytest.raises(
        InputError, match=f"--global-batch-size {batch} cannot be divided over 2 workers.* {suggested}$"
    ):
        check_shares(batch, 2)


def test_of_a_fingerprint_the_first_digits_are_shown():
    old, new = (validate(TrainConfig, {**REQUIRED, "dataset_fingerprint": digit * 64}) for digit in "ab")
    assert find_differences(old, new) == [f"dataset_fingerprint: {'a' * 12} -> {'b' * 12}"]


def test_equal_configs_have_no_differences():
    assert find_differences(validate(TrainConfig, REQUIRED), validate(TrainConfig, REQUIRED)) == []


def test_each_difference_is_named_with_both_values():
    config = validate(TrainConfig, REQUIRED)
    other = validate(
        TrainConfig, {**REQUIRED, "seed": 3, "base_learning_rate": 0.008**0.5, "arch_arguments": {"width": 0.5}}
    )
    assert find_differences(config, other) == [
        "arch_arguments: {} -> {'width': 0.5}",
        f"base_learning_rate: {config.base_learning_rate:g} -> 0.0894427",
        "seed: 0 -> 3",
    ]


@pytest.mark.parametrize(
    ("num_workers", "largest", "batch"),
    [(2, None, 64), (4, None, 64), (1, None, 64), (3, None, 63), (1, 48, 48), (3, 10, 30), (100, None, 100)],
)
def test_another_number_of_workers_keeps_the_batch_if_it_can_share_it(num_workers, largest, batch):
    resized = resize_batch(validate(TrainConfig, REQUIRED), num_workers, largest)
    assert (resized.num_workers, resized.global_batch_size) == (num_workers, batch)
