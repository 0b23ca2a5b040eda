"""Suggestions by Optuna, results and replays: earlier trials decide, whichever job ran them."""

import pytest

from trainer.study.file import parse_study
from trainer.study.search import OptunaSearch, nest_values

STUDY = parse_study(
    """
goal = "Which rate?"
trials = 30
epochs = 9
algorithm = "tpe"
early_stopping = "asha"
[base]
arch = "cnn_softmax"
dataset = "/datasets/animals"
[scientific]
optimizer = ["sgd", "adamw"]
arch_arguments.later_filters = [[8], [8, 16]]
[nuisance."optimizer=sgd"]
base_learning_rate = { low = 0.01, high = 1, scale = "log" }
[nuisance."optimizer=adamw"]
base_learning_rate = { low = 0.0001, high = 0.01, scale = "log" }
""",
    "study.toml",
)


def test_suggestions_are_of_the_study():
    search = OptunaSearch(STUDY)
    for index in range(10):
        values = search.start(index)
        low, high = {"sgd": (0.01, 1), "adamw": (0.0001, 0.01)}[values["optimizer"]]
        assert low <= values["base_learning_rate"] <= high
        assert values["arch_arguments.later_filters"] in ([8], [8, 16])
        search.end(index, 0.5)


def test_tpe_learns_which_value_is_good():
    search = OptunaSearch(STUDY)
    chosen = []
    for index in range(30):
        values = search.start(index)
        chosen.append(values["optimizer"])
        # The other one diverges.
        search.end(index, 0.9 if values["optimizer"] == "adamw" else None)
    assert chosen[15:].count("adamw") > 10


def test_asha_ends_the_worse_two_thirds():
    search = OptunaSearch(STUDY)
    ended = []
    for index, value in enumerate([0.9, 0.1, 0.2, 0.95, 0.3]):
        search.start(index)
        ended.append(search.report(index, 1, value))
        search.end(index, None if ended[-1] else value)
    assert ended == [False, True, True, False, True]


def test_asha_looks_after_one_three_and_nine_epochs():
    search = OptunaSearch(STUDY)
    search.start(0)
    for epoch in range(1, 10):
        assert not search.report(0, epoch, 0.5)
    search.end(0, 0.5)
    for index, epoch in enumerate((1, 3, 9), start=1):
        search.start(index)
        # Better than the first, and then worse.
        ended = [search.report(index, one, 0.9 if one < epoch - 1 else 0.1) for one in range(1, epoch + 1)]
        assert ended == [False] * (epoch - 1) + [True]
        search.end(index, None)


def test_a_loss_is_better_when_it_is_lower():
    search = OptunaSearch(STUDY.model_copy(update={"objective": "val_loss"}))
    search.start(0)
    assert not search.report(0, 1, 0.1)
    search.start(1)
    assert search.report(1, 1, 2.0)


@pytest.mark.parametrize("algorithm", ["tpe", "sobol"])
def test_a_search_that_is_replayed_goes_on_as_if_it_had_not_ended(algorithm):
    study = STUDY.model_copy(update={"algorithm": algorithm})
    first, second = OptunaSearch(study), OptunaSearch(study)
    trials = []
    for index in range(6):
        values = first.start(index)
        first.report(index, 1, index / 10)
        first.end(index, index / 10)
        trials.append((index, values, [index / 10], index / 10))
    for trial in trials:
        second.replay(*trial)
    # The sampler's random numbers are its own, but what it has learned is the same.
    first.start(6)
    second.start(6)
    assert first.report(6, 1, 0.0) is second.report(6, 1, 0.0) is True


def test_values_with_dotted_names_are_in_tables():
    assert nest_values({"arch_arguments.width": 2, "seed": 1, "arch_arguments.dropout": 0.5}) == {
        "arch_arguments": {"width": 2, "dropout": 0.5},
        "seed": 1,
    }
