"""The study file: its contents, and errors that name the key."""

import pytest

from tests.conftest import REPOSITORY
from trainer.runtime.errors import InputError
from trainer.study.file import Range, find_warnings, load_study, parse_study
from trainer.study.search import suggest_values

STUDY = """
goal = "Which optimizer?"
trials = 8
steps = 100

[base]
arch = "cnn_softmax"
dataset = "/datasets/animals"
arch_arguments = { first_filters = 8 }

[scientific]
optimizer = ["sgd", "adamw"]

[nuisance]
weight_decay = { low = 1e-5, high = 1e-2, scale = "log" }
arch_arguments.dense_units = { low = 16, high = 64, integer = true }

[nuisance."optimizer=sgd"]
base_learning_rate = { low = 0.01, high = 1, scale = "log" }

[nuisance."optimizer=adamw"]
base_learning_rate = { low = 0.0001, high = 0.01, scale = "log" }
"""


GRID = """
goal = "Which optimizer?"
algorithm = "grid"
trials = 6
epochs = 1

[base]
arch = "alexnet"
dataset = "/datasets/animals"

[scientific]
optimizer = ["sgd", "adam"]

[nuisance]
momentum = { low = 0.1, high = 0.9, points = 3 }
"""


def parse(text: str = STUDY, **changes):
    return parse_study(text, "study.toml").model_copy(update=changes)


def test_a_study_names_what_it_varies():
    assert [(one.role, one.label) for one in parse().parameters] == [
        ("scientific", "optimizer"),
        ("nuisance", "weight_decay"),
        ("nuisance", "arch_arguments.dense_units"),
        ("nuisance", "base_learning_rate (optimizer=sgd)"),
        ("nuisance", "base_learning_rate (optimizer=adamw)"),
    ]


def test_the_example_is_a_study():
    assert load_study(REPOSITORY / "jobs" / "schedule" / "study.toml").trials == 16


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('goal = "Which optimizer?"', "", "goal: is missing"),
        ('"Which optimizer?"', '""', "goal: '': String should have at least 1 character"),
        ("trials = 8", "trials = 0", "trials: 0: Input should be greater than or equal to 1"),
        ("trials = 8", "trails = 8", "trails: is unknown; allowed are goal, base"),
        ("steps = 100", "", "give the budget of a trial: either epochs or steps"),
        ("steps = 100", "steps = 100\nepochs = 3", "either epochs or steps"),
        ("steps = 100", 'split = "test"\nsteps = 100', "split: 'test': Input should be 'val'"),
        ('arch = "cnn_softmax"', "", "base.arch is missing"),
        ('dataset = "/datasets/animals"', "", "base.dataset is missing"),
        ('arch = "cnn_softmax"', 'arch = "cnn_softmax"\nepoch = 3', "base.epoch is unknown; allowed are all_reduce"),
        ('arch = "cnn_softmax"', 'arch = "cnn_softmax"\nepochs = 3', "base.epochs: give the budget next to goal"),
        ('"adamw"]', '"adamx"]', r"scientific.optimizer: 'adamx': Input should be 'sgd'"),
        ("low = 1e-5", "low = 1", r"nuisance.weight_decay: .*low 1 must be less than high 0.01"),
        ("low = 1e-5", "low = 0", "low 0 must be more than 0 on a log scale"),
        ("low = 1e-5", "low = -1", r"nuisance.weight_decay: .*more than 0 on a log scale"),
        ("weight_decay = {", "decay = {", "nuisance.decay: is unknown; allowed are all_reduce"),
        ("weight_decay = {", "seed = {", "nuisance.seed: cannot be varied: the best of several seeds says nothing"),
        ("weight_decay = {", "epochs = {", "nuisance.epochs: cannot be varied"),
        ("weight_decay = {", "global_batch_size = {", "nuisance.global_batch_size: cannot be a nuisance parameter"),
        ("[nuisance]", '[nuisance]\narch = ["alexnet", "vgg16"]', "nuisance.arch: cannot be a nuisance parameter"),
        (
            'optimizer=sgd"]',
            'optimizer=nadam"]',
            "there is no parameter optimizer above it with nadam among its values",
        ),
        ('optimizer=sgd"]', 'schedule=cosine"]', "there is no parameter schedule above it"),
        ("[nuisance]", "[nuisance]\nbase_learning_rate = [0.1, 0.2]", "both with and without a condition"),
        ("dense_units = {", "dense_units = 3 #", r"nuisance.arch_arguments.dense_units: 3: .*give a list of values"),
        ("[base]", "[base]\nevaluate_test = true", "base.evaluate_test: trials are chosen by validation"),
        ("goal =", "goal ==", "study.toml is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(old, new, message):
    assert old in STUDY
    with pytest.raises(InputError, match=message):
        parse(STUDY.replace(old, new, 1))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "study.toml").write_bytes(b"goal = '\xff'")
    with pytest.raises(InputError, match=r"study.toml: 'utf-8' codec can't decode.*; give a study file"):
        load_study(tmp_path / "study.toml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.toml: No such file"):
        load_study(tmp_path / "none.toml")


def test_a_batch_size_can_be_forced():
    text = STUDY.replace("weight_decay = {", "global_batch_size = { integer = true,").replace("1e-5", "16")
    text = text.replace("1e-2", "64").replace("trials = 8", "trials = 8\nallow_batch_size = true")
    assert "global_batch_size" in suggest_values(parse(text), 0)


def test_a_grid_has_no_more_trials_than_points():
    with pytest.raises(InputError, match="the grid has 6 points, not 7"):
        parse(GRID.replace("trials = 6", "trials = 7"))


def test_more_parameters_than_trials_can_tune_are_warned_of():
    text = STUDY.replace("weight_decay = {", "optimizer_arguments.beta_1 = {").replace("1e-2", "0.9")
    assert find_warnings(parse(text)) == [
        "optimizer_arguments.beta_1 is worth tuning from 10 trials per scientific value, there are 4"
    ]
    assert find_warnings(parse(text, trials=20)) == []


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("base_learning_rate", 1),
        ("optimizer_arguments.beta_1", 10),
        ("optimizer_arguments.epsilon", 25),
        ("optimizer_arguments.beta_2", 50),
    ],
)
def test_each_parameter_has_the_least_trials_of_the_playbook(name, least):
    text = STUDY.partition("[nuisance]")[0] + f"[nuisance]\n{name} = {{ low = 0.1, high = 0.2 }}\n"
    assert find_warnings(parse(text, trials=2 * least)) == []
    counted = f"{least} trial{'s' * (least > 1)}"
    fewer = [f"{name} is worth tuning from {counted} per scientific value, there are {least - 1}"]
    assert find_warnings(parse(text, trials=max(1, 2 * least - 1))) == fewer


def test_a_point_depends_on_its_number_alone():
    study = parse()
    forwards = [suggest_values(study, index) for index in range(8)]
    more = parse(trials=64, concurrency=4)
    assert [suggest_values(more, index) for index in reversed(range(8))] == forwards[::-1]
    assert len({values["weight_decay"] for values in forwards}) == 4
    assert [suggest_values(parse(seed=1), index) for index in range(8)] != forwards


def test_scientific_values_take_turns_with_the_same_nuisance_points():
    first, second = (suggest_values(parse(), index) for index in range(2))
    assert (first["optimizer"], second["optimizer"]) == ("sgd", "adamw")
    assert first["weight_decay"] == second["weight_decay"]
    assert 0.01 <= first["base_learning_rate"] <= 1
    assert 0.0001 <= second["base_learning_rate"] <= 0.01


def test_quasi_random_points_fill_the_space_evenly():
    positions = [
        Range(low=1e-5, high=1e-2, scale="log").position(suggest_values(parse(), index)["weight_decay"])
        for index in range(0, 32, 2)
    ]
    assert sorted(int(position * 16) for position in positions) == list(range(16))


def test_a_grid_is_every_combination_once():
    points = [tuple(suggest_values(parse(GRID), index).values()) for index in range(6)]
    assert points == [(name, pytest.approx(at)) for name in ("sgd", "adam") for at in (0.1, 0.5, 0.9)]


def test_integers_and_logarithms_stay_within_their_range():
    assert {Range(low=1, high=3, integer=True).at(share / 10) for share in range(11)} == {1, 2, 3}
    logarithmic = Range(low=0.001, high=0.1, scale="log")
    assert logarithmic.at(0.5) == pytest.approx(0.01)
    assert logarithmic.position(0.01) == pytest.approx(0.5)
    assert (logarithmic.at(0), logarithmic.at(1)) == (0.001, 0.1)
