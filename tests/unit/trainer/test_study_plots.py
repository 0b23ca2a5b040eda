"""Pictures of a study, also of one that has hardly begun."""

import warnings

import pytest

from tests.unit.trainer.test_study_analysis import STUDY, trial
from trainer.study_analysis import isolate
from trainer.study_plots import draw_axes, draw_best_of_k, draw_curves, draw_isolation

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


def test_the_best_of_k_and_of_each_value_and_the_curves_are_drawn():
    assert draw_best_of_k(STUDY, TRIALS).axes[0].get_xlabel() == "trials"
    groups = {"optimizer": isolate(STUDY, STUDY.parameters[0], TRIALS)}
    assert draw_isolation(STUDY, groups).axes[0].get_ylabel() == "best val_accuracy"
    row = {"epoch": 1, "loss": 1.0, "accuracy": 0.5, "val_loss": 1.1, "val_accuracy": 0.4}
    assert len(draw_curves({"trial-0000": [row, {**row, "epoch": 2}]}).axes) == 2
