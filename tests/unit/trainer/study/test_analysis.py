"""The conclusions from the trials of a study, on records with a known answer."""

import pytest

from trainer.study.analysis import (
    best_of_k,
    check_boundaries,
    check_infeasible,
    check_points,
    check_points_of_each,
    check_steps,
    decide_adoption,
    find_best,
    find_no_difference,
    find_rivals,
    isolate,
    rank_parameters,
)
from trainer.study.file import parse_study
from trainer.study.folder import Trial

STUDY = parse_study(
    """
goal = "Which optimizer?"
trials = 8
epochs = 10
[base]
arch = "cnn_softmax"
dataset = "/datasets/animals"
[scientific]
optimizer = ["sgd", "adamw"]
[nuisance]
base_learning_rate = { low = 0.001, high = 1, scale = "log" }
weight_decay = { low = 0, high = 0.1 }
""",
    "study.toml",
)
DIVERGED = "the loss or its gradient became nan or inf in one of the steps 1 to 50"


def trial(index: int, correct: int = 0, rate: float = 0.03, status: str = "completed", **changes) -> Trial:
    values = {"optimizer": ["sgd", "adamw"][index % 2], "base_learning_rate": rate, "weight_decay": 0.05}
    values |= changes.pop("values", {})
    found = {"objective": correct / 100, "correct": correct, "total": 100, "best_step": 60, "steps": 100}
    return Trial(
        **{
            "run_name": f"trial-{index:04d}",
            "kind": "search",
            "index": index,
            "values": values,
            "status": status,
            **(found if status == "completed" else {}),
            **changes,
        }
    )


def test_the_best_is_the_first_of_equals():
    trials = [trial(0, 70), trial(1, 90), trial(2, 90), trial(3, status="infeasible")]
    assert find_best(STUDY, trials).index == 1
    losses = STUDY.model_copy(update={"objective": "val_loss"})
    assert find_best(losses, trials).index == 0
    assert find_best(STUDY, [trial(0, status="failed")]) is None


def test_a_loss_that_is_no_number_is_the_worst():
    assert find_best(STUDY, [trial(0, 10, objective=float("nan")), trial(1, 10)]).index == 1


def test_each_scientific_value_has_its_best():
    optimizer, rate, _ = STUDY.parameters
    trials = [trial(0, 70), trial(1, 80, rate=0.5), trial(2, 75), trial(3, status="infeasible", rate=0.9)]
    assert [(one.label, one.best.index, one.trials) for one in isolate(STUDY, optimizer, trials)] == [
        ("sgd", 2, 2),
        ("adamw", 1, 2),
    ]
    assert [(one.best and one.best.index, one.trials) for one in isolate(STUDY, rate, trials)] == [
        (None, 0),
        (2, 2),
        (None, 0),
        (1, 2),
    ]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.03, []),
        (0.9, ["at the high end of 0.001 to 1 (log); expand it to 0.0316 to 31.6 and"]),
        (0.0011, ["at the low end of 0.001 to 1 (log); expand it to 3.16e-05 to 0.0316 and"]),
    ],
)
def test_a_best_value_at_an_end_asks_for_more_room(rate, expected):
    lines = check_boundaries(STUDY, [trial(0, 90, rate=rate), trial(1, 80, rate=0.001)], 0.1)
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert text in line


def test_there_is_no_room_below_zero():
    assert check_boundaries(STUDY, [trial(0, 90, values={"weight_decay": 0.001})], 0.1) == []
    (line,) = check_boundaries(STUDY, [trial(0, 90, values={"weight_decay": 0.099})], 0.1)
    assert "expand it to 0.05 to 0.15" in line


def test_the_best_of_k_rises_to_the_best():
    k, means, (low, high) = best_of_k(STUDY, [trial(index, 50 + index) for index in range(10)])
    assert list(k) == list(range(1, 11))
    assert means[0] == pytest.approx(0.545, abs=0.005)
    assert (means[1:] >= means[:-1]).all()
    assert 0.58 < means[-1] <= 0.59
    assert (low <= means).all()
    assert (means <= high).all()


def test_a_lower_loss_is_better_in_the_best_of_k():
    losses = STUDY.model_copy(update={"objective": "val_loss"})
    _, means, (low, high) = best_of_k(losses, [trial(index, 50 + index) for index in range(10)])
    assert (means[1:] <= means[:-1]).all()
    assert (low <= high).all()


def test_one_lucky_trial_is_not_enough():
    assert "too few" in check_points(STUDY, [trial(0, 95), *(trial(index, 30) for index in range(1, 8))], 0.1)
    assert check_points(STUDY, [*(trial(index, 90 - index % 3) for index in range(7)), trial(7, 50)], 0.1).endswith(
        ": enough"
    )
    assert check_points(STUDY, [trial(0, status="failed")], 0.1) == "no trial has completed"


def test_each_scientific_value_needs_enough_trials_of_its_own():
    """Nine trials are as good as the best, but only one with sgd, which has the even numbers."""
    trials = [trial(index, 90 if index % 2 or not index else 30) for index in range(16)]
    assert check_points(STUDY, trials, 0.1).endswith(": enough")
    of_sgd, of_adamw = check_points_of_each(STUDY, trials, 0.1)
    assert of_sgd.startswith("optimizer sgd: 1 of 8 completed trials")
    assert "too few" in of_sgd
    # All eight are tied.
    assert of_adamw.startswith("optimizer adamw: all 8 completed trials are as good as the best")
    nuisance = STUDY.model_copy(update={"scientific": {}})
    assert check_points_of_each(nuisance, trials, 0.1) == [check_points(nuisance, trials, 0.1)]


# 90 of 100: the 95% interval begins at 0.826; 18 of 100: at 0.117, and 17 of 100 at 0.109.
@pytest.mark.parametrize(
    ("correct", "chance", "reason"),
    [
        ((18, 10), 0.11, ""),
        ((17, 10), 0.11, "no trial is above chance (0.11)"),
        ((17, 10), 0.0, ""),
        ((90, 82), 0.11, ""),
        ((90, 83), 0.11, "all 2 completed trials are as good as the best within 0.0744"),
        ((90,), 0.11, ""),
        ((), 0.11, ""),
    ],
)
def test_nothing_is_concluded_from_trials_at_chance_or_tied(correct, chance, reason):
    trials = [trial(index, one, rate=0.9) for index, one in enumerate(correct)]
    assert find_no_difference(STUDY, trials, chance) == reason
    if reason:
        assert check_points(STUDY, trials, chance) == f"{reason}: more trials of these ranges will not help"
        assert check_boundaries(STUDY, trials, chance) == [
            f"not judged: {reason}, so the values of the best trial are not significant"
        ]


def test_the_rivals_of_the_best_are_the_best_of_the_other_scientific_values():
    trials = [trial(0, 70), trial(1, 90), trial(2, 80), trial(3, 90), trial(4, 80)]
    assert [one.index for one in find_rivals(STUDY, trials)] == [2]
    assert find_rivals(STUDY, [trial(1, 90), trial(3, 90)]) == []


def test_where_nothing_is_scientific_the_rivals_have_the_same_objective_unless_all_are_as_good():
    nuisance = STUDY.model_copy(update={"scientific": {}})
    trials = [trial(0, 90), trial(1, 89), trial(2, 90), trial(3, 50)]
    assert [one.index for one in find_rivals(nuisance, trials)] == [2]
    # Of 100 images, 89 are as good as 90.
    assert [one.index for one in find_rivals(nuisance, trials[:3])] == [2, 1]
    assert find_rivals(nuisance, []) == []


def test_trials_without_result_are_counted_with_their_reason():
    trials = [
        trial(0, 80),
        trial(1, status="infeasible", reason="nan", rate=0.9),
        trial(2, status="failed", reason="x"),
    ]
    assert check_infeasible(STUDY, trials) == [
        "1 of 3 trials were infeasible, 1 failed",
        "trial-0001 infeasible: nan",
        "trial-0002 failed: x",
    ]


def test_an_optimum_beside_divergence_is_a_stability_problem():
    trials = [trial(0, 80, rate=0.3), trial(1, status="infeasible", reason=DIVERGED, rate=0.4)]
    assert "held down by instability" in check_infeasible(STUDY, trials)[-1]


@pytest.mark.parametrize(
    ("reason", "rate"), [(DIVERGED, 0.002), (DIVERGED, 0.9), ("a batch of 64 does not fit into the memory", 0.4)]
)
def test_a_trial_that_failed_elsewhere_or_otherwise_is_none(reason, rate):
    trials = [trial(0, 80, rate=0.3), trial(1, status="infeasible", reason=reason, rate=rate)]
    assert not any("instability" in line for line in check_infeasible(STUDY, trials))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((5, 8), "far too long"), ((80, 100), "too short"), ((5, 100), "between 5% and 100%")],
)
def test_where_the_best_checkpoints_fell_judges_the_budget(steps, expected):
    assert expected in check_steps(STUDY, [trial(index, 80, best_step=step) for index, step in enumerate(steps)])


def repeat(kind: str, *correct: int) -> list[Trial]:
    return [trial(0, one, kind=kind, run_name=f"{kind}-{number}") for number, one in enumerate(correct)]


def test_a_change_is_adopted_beyond_the_variance_of_both():
    best = [trial(0, 90)]
    assert decide_adoption(STUDY, best).startswith("not decided: --characterize 5")
    close = decide_adoption(STUDY, [*best, *repeat("best", 90, 86, 88), *repeat("incumbent", 86, 84, 88)])
    assert close.startswith("do not adopt: the best config is 0.0200 better")
    clear = decide_adoption(STUDY, [*best, *repeat("best", 90, 89, 91), *repeat("incumbent", 80, 81, 79)])
    assert clear.startswith("adopt: the best config is 0.1000 better than the incumbent")
    assert "best: mean 0.9000, standard deviation 0.0100 (0.9000, 0.8900, 0.9100)" in clear


def rate_at(position: float) -> float:
    """The learning rate at a position of its range, from 0 (low) to 1 (high)."""
    return 10 ** (3 * position - 3)


@pytest.mark.parametrize(("position", "is_at_an_end"), [(0.09, True), (0.11, False), (0.89, False), (0.91, True)])
def test_the_last_tenth_at_either_end_is_an_end(position, is_at_an_end):
    assert bool(check_boundaries(STUDY, [trial(0, 90, rate=rate_at(position))], 0.1)) is is_at_an_end


@pytest.mark.parametrize(("distance", "is_unstable"), [(-0.01, False), (0.0, True), (0.09, True), (0.11, False)])
def test_divergence_within_a_tenth_above_the_best_rate_holds_it_down(distance, is_unstable):
    diverged = trial(1, status="infeasible", reason=DIVERGED, rate=rate_at(0.5 + distance))
    lines = check_infeasible(STUDY, [trial(0, 80, rate=rate_at(0.5)), diverged])
    assert any("instability" in line for line in lines) is is_unstable


@pytest.mark.parametrize(("loss", "good"), [(1.04, 2), (1.06, 1)])
def test_a_loss_within_5_percent_is_as_good(loss, good):
    losses = STUDY.model_copy(update={"objective": "val_loss"})
    trials = [trial(0, 50, objective=1.0), trial(1, 50, objective=loss), trial(2, 50, objective=2.0)]
    assert check_points(losses, trials, 0.1).startswith(
        f"{good} of 3 completed trials are as good as the best within 0.05;"
    )


@pytest.mark.parametrize(("correct", "good"), [(83, 2), (82, 1)])
def test_an_accuracy_within_the_interval_of_the_best_is_as_good(correct, good):
    """The 95% interval of 90 of 100 begins at 0.826."""
    line = check_points(STUDY, [trial(0, 90), trial(1, correct), trial(2, 50)], 0.1)
    assert line.startswith(f"{good} of 3 completed trials are as good as the best within 0.0744;")


@pytest.mark.parametrize(("good", "verdict"), [(2, "too few"), (4, "enough")])
def test_trials_are_enough_where_half_of_them_would_have_done(good, verdict):
    """90 of 100 in 2 or 4 of 16 trials: half of them would lose 0.13 or 0.05 on average; 0.074 is noise."""
    trials = [trial(index, 90 if index < good else 30) for index in range(16)]
    assert verdict in check_points(STUDY, trials, 0.1)


def test_a_single_best_trial_is_never_enough():
    assert "too few" in check_points(STUDY, [trial(0, 90), *(trial(index, 82) for index in range(1, 16))], 0.1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((2, 10), "far too long"),
        ((2, 11), "between 2% and 11%"),
        ((75, 90), "too short"),
        ((74, 90), "between 74% and 90%"),
    ],
)
def test_the_budget_is_judged_by_the_first_tenth_and_the_last_quarter(steps, expected):
    assert expected in check_steps(STUDY, [trial(index, 80, best_step=step) for index, step in enumerate(steps)])


@pytest.mark.parametrize(
    ("of_best", "of_incumbent", "verdict"),
    [
        # Deviations of 0.01 and 0.03, whichever is whose: a gain of 0.03 is noise, one of 0.05 is none.
        ((89, 90, 91), (84, 87, 90), "do not adopt"),
        ((87, 90, 93), (86, 87, 88), "do not adopt"),
        ((91, 92, 93), (84, 87, 90), "adopt"),
        ((89, 92, 95), (86, 87, 88), "adopt"),
        # Worse by more than the noise.
        ((79, 80, 81), (89, 90, 91), "do not adopt"),
    ],
)
def test_a_gain_counts_beyond_the_deviations_of_both_together(of_best, of_incumbent, verdict):
    trials = [trial(0, 90), *repeat("best", *of_best), *repeat("incumbent", *of_incumbent)]
    assert decide_adoption(STUDY, trials).startswith(f"{verdict}: ")


def test_a_lower_loss_is_a_gain():
    losses = STUDY.model_copy(update={"objective": "val_loss"})
    trials = [trial(0, 20), *repeat("best", 19, 20, 21), *repeat("incumbent", 39, 40, 41)]
    assert decide_adoption(losses, trials).startswith("adopt: the best config is 0.2000 better")


def test_two_repetitions_are_needed_of_each():
    best = [trial(0, 90)]
    assert decide_adoption(STUDY, [*best, *repeat("best", 90)]).startswith("not decided")
    one_incumbent = decide_adoption(STUDY, [*best, *repeat("best", 90, 91), *repeat("incumbent", 90)])
    assert "there is no incumbent" in one_incumbent


def test_the_parameter_that_makes_the_difference_explains_it():
    # The learning rate decides, the optimizer does nothing.
    rates = (0.002, 0.02, 0.1, 0.5)
    trials = [
        trial(2 * i + j, 50 + 10 * i + k, rate=rate) for i, rate in enumerate(rates) for j in (0, 1) for k in (0, 1)
    ]
    first, *others = rank_parameters(STUDY, trials)
    assert (first.label, first.share > 0.9, first.p_value < 0.01) == ("base_learning_rate", True, True)
    assert [(one.label, one.share) for one in others] == [("optimizer", 0.0)]
    assert str(others[0]).startswith("optimizer explains 0% of the differences between trials (p = ")
    assert "may be luck" in str(others[0])


def test_a_trial_that_diverged_counts_as_the_worst():
    rates = [0.002] * 4 + [0.9] * 4
    trials = [trial(i, 70 + i % 2, rate=rate) for i, rate in enumerate(rates)]
    assert {one.label: one.share for one in rank_parameters(STUDY, trials)}["base_learning_rate"] < 0.2
    diverged = [*trials[:4], *(trial(i, rate=0.9, status="infeasible", reason=DIVERGED) for i in range(4, 8))]
    (first, *_) = rank_parameters(STUDY, diverged)
    assert (first.label, first.share > 0.7) == ("base_learning_rate", True)


def test_of_few_trials_nothing_is_said_about_what_matters():
    assert rank_parameters(STUDY, [trial(i, 70 + i) for i in range(5)]) == []
    assert rank_parameters(STUDY, [trial(i, 70) for i in range(8)]) == []
