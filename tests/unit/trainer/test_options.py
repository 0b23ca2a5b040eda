import inspect

import pytest
import typer
from typer.testing import CliRunner

from trainer.config import BatchRequest, TrainConfig
from trainer.options import add_config_options, parse_assignment


@pytest.fixture
def received():
    return {}


@pytest.fixture
def invoke(received):
    """Returns a function that runs a command with the options of the config and one of its own."""
    app = typer.Typer()

    @app.command()
    @add_config_options
    def command(seed: int = 7, **options) -> None:
        received.update(options, seed=seed)

    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_every_field_of_config_and_request_is_an_option():
    def command(**options) -> None: ...

    added = inspect.signature(add_config_options(command)).parameters.keys()
    fields = TrainConfig.model_fields.keys() | BatchRequest.model_fields.keys()
    assert added == fields - {"dataset_fingerprint", "arch_arguments"}


def test_an_option_is_named_without_the_unit_that_its_help_tells(invoke, received):
    assert invoke("--memory-limit", "2.5").exit_code == 0
    assert received["memory_limit_gib"] == 2.5


def test_what_is_not_given_is_left_to_the_recipe(invoke, received):
    assert invoke().exit_code == 0
    assert received.pop("seed") == 7
    assert set(received.values()) == {None}


def test_values_arrive_with_their_types(invoke, received):
    result = invoke("--epochs", "3", "--clip-norm", "0.5", "--optimizer", "adamw", "--augment-flip", "--seed", "1")
    assert result.exit_code == 0
    given = {name: value for name, value in received.items() if value is not None}
    assert given == {"epochs": 3, "clip_norm": 0.5, "optimizer": "adamw", "augment_flip": True, "seed": 1}


def test_a_value_that_is_not_one_of_a_few_is_refused_with_all_of_them(invoke):
    result = invoke("--optimizer", "lion")
    assert result.exit_code == 2
    assert "adamw" in result.output


def test_the_text_under_a_field_is_its_help(invoke):
    output = " ".join(invoke("--help").output.replace("│", " ").split())
    assert "Largest angle in degrees, either way." in output


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("width=0.5", 0.5),
        ("filters=[8, 16]", [8, 16]),
        ("batch_norm=true", True),
        ("kernel_initializer=he_normal", "he_normal"),
        ("note=a=b", "a=b"),
    ],
)
def test_an_assignment_is_json_where_it_is_json(text, value):
    assert parse_assignment(text) == (text.partition("=")[0], value)


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(typer.BadParameter, match="'width': give NAME=VALUE"):
        parse_assignment("width")
