import inspect
import shlex

import pytest
import typer
from typer.testing import CliRunner

from trainer.config.config import TrainConfig
from trainer.config.options import GroupedCommand, add_run_options, format_command, parse_assignment, parse_command
from trainer.config.request import ARGUMENTS, OPTIONS, parse_request
from trainer.runtime.errors import InputError


@pytest.fixture
def received():
    return {}


@pytest.fixture
def invoke(received):
    """Return a function that runs a command with the options of the config and one of its own."""
    app = typer.Typer(rich_markup_mode=None)

    @app.command(cls=GroupedCommand)
    @add_run_options
    def command(seed: int = 7, **options) -> None:
        received.update(options, seed=seed)

    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_every_option_of_a_run_is_one_of_its_commands():
    def command(**options) -> None: ...

    added = inspect.signature(add_run_options(command)).parameters.keys()
    assert added == OPTIONS.keys() - set(ARGUMENTS) | {"arch_argument", "optimizer_argument", "config"}
    assert TrainConfig.model_fields.keys() - {"dataset_fingerprint", "known_augmentation"} <= OPTIONS.keys()


def test_an_option_is_named_without_the_unit_that_its_help_says(invoke, received):
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


def test_a_former_word_of_a_value_is_taken_and_not_shown(invoke, received):
    shown = " ".join(invoke("--help").output.split())
    assert "--input-scaling <image|standardize|unit|imagenet|symmetric>" in shown
    assert "standardise" not in shown
    assert invoke("--input-scaling", "standardise").exit_code == 0
    assert parse_command({**received, "arch": "alexnet"}).settings.input_scaling == "standardize"
    assert invoke("--input-scaling", "whiten").exit_code == 0
    with pytest.raises(InputError, match=r"^--input-scaling whiten: Input should be 'image', 'standardize', "):
        parse_command({**received, "arch": "alexnet"})


def test_the_text_under_a_field_is_its_help(invoke):
    output = " ".join(invoke("--help").output.replace("│", " ").split())
    assert "Maximum rotation of training images in degrees, in either direction. [default: from the recipe]" in output


@pytest.mark.parametrize(
    "words",
    [
        *("early stopping", "transfer learning", "pretrained", "fine-tuning", "mixed precision", "gradient clipping"),
        *("data augmentation", "label smoothing", "imbalance", "weight decay", "warmup", "moving average"),
    ],
)
def test_help_has_the_words_that_people_look_for(invoke, words):
    assert words in " ".join(invoke("--help").output.split()).lower()


def test_help_groups_the_options_and_says_each_default(invoke):
    lines = invoke("--help").output.splitlines()
    assert [line for line in lines if line.endswith(":") and not line.startswith(" ")] == [
        "Network:", "Batch:", "Optimizer:", "Augmentation:", "Cluster:", "Run:"
    ]  # fmt: skip
    texts = " ".join(" ".join(lines).split())
    assert texts.index("Augmentation:") < texts.index("--augment ") < texts.index("Cluster:")
    assert "beta_2 (default 0.999)" in texts
    assert "Undefined" not in texts


def test_options_go_before_those_of_a_config_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('arch = "cnn_deep"\nepochs = 4\nseed = 3\n[arch_arguments]\ndense_units = 8\nfirst_filters = 4\n')
    given = {"config": str(file), "seed": 5, "steps": 100, "optimizer": None, "arch_argument": ["dense_units=16"]}
    request = parse_command(given)
    assert (request.arch, request.settings.seed, request.epochs, request.steps) == ("cnn_deep", 5, None, 100)
    assert request.settings.arch_arguments == {"dense_units": 16, "first_filters": 4}


def test_a_command_line_gives_the_request_that_its_options_give(tmp_path):
    options = {"arch": "alexnet", "arch_arguments": {"dropout": 0.25}, "augment_flip": False, "memory_limit_gib": 2.5}
    options |= {"optimizer_arguments": {"beta_1": 0.5, "epsilon": 1e-3}}
    words = shlex.split(format_command("train.py", options))[2:]
    received = {}
    app = typer.Typer()
    app.command(cls=GroupedCommand)(add_run_options(lambda **given: received.update(given)))
    assert CliRunner().invoke(app, words).exit_code == 0
    assert parse_command(received) == parse_request(options)


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"--config nowhere.toml: there is no such file; give a TOML file or"):
        parse_command({"config": "nowhere.toml"})


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
    with pytest.raises(InputError, match="--optimizer-argument 'epsilon': give NAME=VALUE"):
        parse_assignment("epsilon", "optimizer_argument")
