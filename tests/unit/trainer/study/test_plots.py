"""Pictures of a study, also of one that has just started."""

import re
import warnings

import pytest

from tests.unit.trainer.study.test_analysis import STUDY, trial
from trainer.notes.plots import to_svg
from trainer.record.evaluation_result import accuracy_interval
from trainer.study.analysis import Importance, isolate
from trainer.study.plots import draw_axes, draw_best_of_k, draw_curves, draw_importance, draw_isolation

TRIALS = [trial(0, 70), trial(1, 80, rate=0.5), trial(2, status="infeasible", rate=0.9)]


@pytest.mark.parametrize("trials", [TRIALS[:1], TRIALS])
def test_each_parameter_has_its_axes_over_its_whole_range(trials):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, rate, decay = draw_axes(STUDY, trials).axes
    assert [label.get_text() for label in optimizer.get_xticklabels()] == ["sgd", "adamw"]
    assert rate.get_xscale() == "log"
    low, high = rate.get_xlim()
    assert low < 0.001 < 1 < high
    assert decay.get_xlabel() == "weight_decay"


def test_a_trial_without_result_is_a_red_cross():
    rate = draw_axes(STUDY, TRIALS).axes[1]
    (cross,) = (line for line in rate.lines if line.get_marker() == "x")
    assert cross.get_color() == "red"
    assert list(cross.get_xdata()) == [0.9]


def points_of(line) -> list[tuple[float, float]]:
    return list(zip(*map(list, line.get_data()), strict=True))


def test_each_trial_is_a_point_and_the_best_a_star():
    optimizer, rate, _ = draw_axes(STUDY, TRIALS).axes
    points, star = (
        next(points_of(line) for line in rate.lines if line.get_marker() == marker) for marker in ("o", "*")
    )
    assert points == [(0.03, 0.7), (0.5, 0.8)]
    assert star == [(0.5, 0.8)]
    assert points_of(optimizer.lines[0]) == [(0, 0.7), (1, 0.8)]


def test_the_best_of_each_value_stands_over_its_name_and_number_of_trials():
    trials = [*TRIALS, trial(4, 75)]
    (axes,) = draw_isolation(STUDY, {"optimizer": isolate(STUDY, STUDY.parameters[0], trials)}).axes
    assert points_of(axes.lines[0]) == [(0, 0.75), (1, 0.8)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["sgd\n(3)", "adamw\n(1)"]
    assert axes.get_ylabel() == "best val_accuracy"


def test_every_color_of_a_picture_is_one_of_its_page():
    figures = (
        draw_axes(STUDY, TRIALS),
        draw_isolation(STUDY, {"optimizer": isolate(STUDY, STUDY.parameters[0], TRIALS)}),
    )
    colors = {color for figure in figures for color in re.findall(r"(?:fill|stroke): ([^;\"]+)", to_svg(figure))}
    # Red crosses are seen on light and on dark.
    assert {one for one in colors if not one.startswith("var(--")} == {"currentColor", "none", "#ff0000"}


def test_the_best_of_k_never_falls_and_ends_at_the_best():
    (axes,) = draw_best_of_k(STUDY, [trial(0, 70), trial(1, 80), trial(2, 90)]).axes
    (means,) = (points_of(line) for line in axes.lines if line.get_label() == "mean")
    assert [k for k, _ in means] == [1, 2, 3]
    # Drawn with replacement.
    assert [value for _, value in means] == pytest.approx([0.8, 7.6 / 9, 23.4 / 27], abs=0.01)
    assert axes.get_xlabel() == "trials"


def test_both_splits_of_each_trial_are_drawn_in_its_colour():
    histories = {
        name: [
            {"epoch": epoch, "loss": 9 * scale / epoch, "val_loss": 10 * scale / epoch}
            | {"accuracy": 0.1 * scale * epoch, "val_accuracy": 0.09 * scale * epoch}
            for epoch in (1, 2)
        ]
        for name, scale in (("trial-0000", 1), ("trial-0001", 2))
    }
    for axes, name in zip(draw_curves(histories).axes, ("loss", "accuracy"), strict=True):
        assert axes.get_ylabel() == f"{name} (dashed: train)"
        assert len(axes.lines) == 4
        for (train, val), (run, history) in zip(
            zip(axes.lines[::2], axes.lines[1::2], strict=True), histories.items(), strict=True
        ):
            assert points_of(train) == [(row["epoch"], row[name]) for row in history]
            assert points_of(val) == [(row["epoch"], row[f"val_{name}"]) for row in history]
            assert (train.get_linestyle(), val.get_linestyle(), val.get_label()) == ("--", "-", run)
            assert train.get_color() == val.get_color()


def test_each_accuracy_has_its_interval():
    rate = draw_axes(STUDY, TRIALS).axes[1]
    (bars,) = rate.collections
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx(accuracy_interval(correct, 100)) for correct in (70, 80)]
    losses = STUDY.model_copy(update={"objective": "val_loss"})
    assert not draw_axes(losses, TRIALS).axes[1].collections


def test_the_most_important_parameter_is_on_top():
    (axes,) = draw_importance([Importance("rate", 0.7, 0.01), Importance("decay", 0.1, 0.4)]).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True)) == {"rate": 0.7, "decay": 0.1}
    assert names[-1] == "rate"
    assert [text.get_text() for text in axes.texts] == ["10%, p = 0.4", "70%, p = 0.01"]


def test_axes_of_whole_numbers_have_whole_numbers():
    (of_trials,) = draw_best_of_k(STUDY, [trial(0, 70), trial(1, 80)]).axes
    history = [{"epoch": n, "loss": 1.0, "val_loss": 1.0, "accuracy": 0.5, "val_accuracy": 0.5} for n in (1, 2)]
    for axes in (of_trials, *draw_curves({"first": history}).axes):
        assert all(tick == int(tick) for tick in axes.get_xticks())
