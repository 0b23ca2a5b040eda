"""Findings, each with cases on both sides of its threshold."""

import itertools
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.config.options import OPTIONS
from trainer.config.request import parse_request
from trainer.notes.diagnostics import find_symptoms
from trainer.record.evaluation_result import EvaluationResult, summarise


def judge(right: int, loss: float, total: int = 660, classes: int = 10) -> EvaluationResult:
    """A validation of ten classes of nearly the same size."""
    labels = np.arange(total) % classes
    predicted = np.where(np.arange(total) < right, labels, (labels + 1) % classes)
    return summarise("val", table(labels, predicted, loss), [str(label) for label in range(classes)])


def table(labels: np.ndarray, predicted: np.ndarray, loss: float) -> pa.Table:
    columns = {"label": labels, "predicted": predicted, "confidence": np.full(len(labels), 0.5)}
    columns |= {"likelier": np.int32(labels != predicted), "loss": np.full(len(labels), loss)}
    return pa.table(columns)


def history(val_loss, loss=None, val_accuracy=None, **others) -> list[dict]:
    """Rows of metrics; 50 steps per epoch."""
    count = len(val_loss)
    columns = {
        "epoch": list(range(1, count + 1)),
        "step": [50 * epoch for epoch in range(1, count + 1)],
        "loss": np.geomspace(2.3, 0.1, count) if loss is None else loss,
        "accuracy": [0.97] * count,
        "val_loss": val_loss,
        "val_accuracy": [0.8] * count if val_accuracy is None else val_accuracy,
        "learning_rate": [0.001] * count,
        "stage": ["train"] * count,
        "augmentation": ["none"] * count,
        **others,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# Falls, then stays.
SOUND = [2.0, 1.4, 1.0, 0.8, 0.72, 0.7, 0.69, 0.69, 0.685, 0.685, 0.684, 0.684]
RISING = [2.0, 1.2, 0.7, 0.52, 0.55, 0.6, 0.66, 0.72, 0.8, 0.84, 0.88, 0.9]
FALLING = np.geomspace(2.3, 0.5, 12)
GOOD = judge(600, 0.68)
# Of guessing by class frequency, among ten classes of nearly the same size.
PRIOR_LOSS = 2.3


@pytest.fixture
def find(make_config):
    """Return a function that finds the symptoms of a run that took all its epochs, unless the config says more."""

    def find(rows, val=GOOD, reason="", **config) -> list[str]:
        values = {"epochs": rows[-1]["epoch"], "schedule": "constant", "base_learning_rate": 0.002}
        return find_symptoms(rows, val, make_config(**{**values, **config}), reason)

    return find


@pytest.fixture
def names(find):
    """Return a function that finds the names of the symptoms."""

    def names(*arguments, **config) -> list[str]:
        return [re.match(r"[a-z ]+?(?= from|:)", line)[0] for line in find(*arguments, **config)]

    return names


def test_a_sound_run_has_no_symptom(find):
    assert find(history(SOUND)) == []


def test_divergence_is_reported_with_its_steps_and_nothing_else(find):
    (line,) = find(history(RISING), reason="the loss became nan in one of the steps 51 to 100")
    assert line == (
        "diverged: the loss became nan in one of the steps 51 to 100; try --base-learning-rate 0.0002 --clip-norm 1"
    )


# Did not train.


@pytest.mark.parametrize(
    ("right", "loss", "is_chance"),
    [
        # Always naming the most frequent class is right for 66 of 660; the interval of 82 begins above that.
        (81, PRIOR_LOSS, True),
        (82, PRIOR_LOSS, False),
        (66, 0.96 * PRIOR_LOSS, True),
        (66, 0.94 * PRIOR_LOSS, False),
        (50, 2.9, True),
    ],
)
def test_chance_ends_at_the_interval_and_at_95_percent_of_the_loss_of_guessing(names, right, loss, is_chance):
    found = names(history([2.3] * 12, loss=[2.3] * 12), judge(right, loss))
    assert ("did not train" in found) is is_chance


def test_chance_is_reported_with_its_numbers_and_a_rate_to_try(find):
    (line,) = find(history([2.3] * 12, loss=[2.3] * 12), judge(66, 2.24))
    assert line.startswith("did not train: 66 of 660 correct (0.08-0.13) is no better than always predicting")
    assert "the loss 2.240 is no better than that of guessing by class frequency (2.303)" in line
    assert line.endswith("; try --base-learning-rate 0.0002, then --base-learning-rate 0.02")


def test_chance_at_a_rate_far_from_the_recipe_s_asks_for_that(find):
    config = {"optimizer": "adamw", "base_learning_rate": 1e-6}
    (line,) = find(history([2.3] * 12, loss=[2.3] * 12), judge(66, 2.3), **config)
    assert line.endswith("; the base learning rate is 1e-06, the recipe's 0.004; try --base-learning-rate 0.004")


def test_always_naming_the_most_frequent_class_is_chance(find):
    labels = np.array([0] * 90 + [1] * 10)
    val = summarise("val", table(labels, np.zeros(100, int), 0.33), ["a", "b"])
    (line,) = find(history(SOUND, loss=[0.33] * 12), val)
    assert line.startswith("did not train: 90 of 100")


def test_chance_after_few_steps_asks_for_more_of_them(find):
    (line,) = find(history([2.3] * 5, loss=[2.3] * 5), judge(66, 2.3))
    assert "its weights took 250 steps, and fewer than 300 rarely suffice; try --epochs 40 --patience 4" in line


def test_chance_by_the_recipe_of_the_notes_asks_for_the_other(find):
    (line,) = find(history([2.3] * 12, loss=[2.3] * 12), judge(66, 2.3), recipe="notes")
    assert line.endswith("; try --recipe modern")


@pytest.mark.parametrize(("loss", "is_said"), [(2.19, False), (2.17, True)])
def test_chance_though_the_training_loss_fell_somewhat_is_a_matter_of_the_labels(find, loss, is_said):
    (line,) = find(history([2.3] * 12, loss=[2.3] * 11 + [loss]), judge(66, 2.4))
    assert ("are the labels right" in line) is is_said


@pytest.mark.parametrize(("loss", "is_alien"), [(1.16, False), (1.14, True)])
def test_chance_beside_a_low_training_loss_is_a_matter_of_the_images(find, loss, is_alien):
    (line,) = find(history([2.3] * 12, loss=[2.3] * 11 + [loss]), judge(66, 2.4))
    assert ("the validation images or their labels are not like those of training" in line) is is_alien


@pytest.mark.parametrize(("total", "names_expected"), [(4, ["few validation images"]), (40, ["did not train"])])
def test_of_a_few_images_chance_is_no_evidence_against_a_network_that_learned(names, total, names_expected):
    val = judge(total // 2, 0.8, total, classes=2)
    assert names(history(SOUND, loss=np.geomspace(0.7, 0.5, 12)), val) == names_expected


# The training loss rose.


@pytest.mark.parametrize(
    ("first", "last", "has_risen"),
    [(2.3, 2.52, False), (2.3, 2.54, True), (0.05, 0.069, False), (0.05, 0.071, True), (0.210, 0.218, False)],
)
def test_a_training_loss_that_rose_by_a_tenth_and_2_hundredths_is_reported(names, first, last, has_risen):
    rows = history([2.3] * 4, loss=[first, first, first, last])
    assert ("training loss rose" in names(rows)) is has_risen


def test_a_training_loss_that_rose_asks_for_a_lower_rate(find):
    (line,) = find(history([2.3] * 4, loss=[2.3, 2.5, 2.8, 3.0]), judge(66, 2.9))
    assert line == (
        "training loss rose from 2.300 (epoch 1) to 3.000 (epoch 4), and val_loss did not fall: the learning rate is "
        "too high; try --base-learning-rate 0.0002"
    )


def test_a_training_loss_that_rose_while_validation_improved_is_none(names):
    assert "training loss rose" not in names(history([2.3, 2.2, 2.1, 2.0], loss=[2.3, 2.5, 2.8, 3.0]))


def test_a_harder_augmentation_raises_no_training_loss(names):
    rows = history(
        [0.5] * 6,
        loss=[0.2, 0.1, 0.9, 0.8, 0.7, 0.1],
        augmentation=["none", "none", *["rotation"] * 3, "none"],
        stage=["plain", "plain", "train", "train", "decay", "clean"],
    )
    assert "training loss rose" not in names(rows)


# The curve.


@pytest.mark.parametrize(
    ("lowest", "last", "is_overfitted"),
    [(1.0, 1.14, False), (1.0, 1.16, True), (0.05, 0.069, False), (0.05, 0.071, True)],
)
def test_a_loss_that_rose_by_15_percent_and_by_more_than_2_hundredths_is_overfitted(names, lowest, last, is_overfitted):
    assert ("overfitting" in names(history([2.0, 1.8, lowest, *[last] * 9]))) is is_overfitted


@pytest.mark.parametrize(
    ("end", "is_overfitted"), [([0.5, 0.5, 0.9], False), ([0.9, 0.5, 0.9], False), ([0.9] * 3, True)]
)
def test_a_jump_of_one_epoch_is_not_overfitting(names, end, is_overfitted):
    found = names(history([2.0, 1.2, 0.8, 0.6, 0.52, 0.5, 0.5, 0.5, 0.5, *end]))
    assert ("overfitting" in found) is is_overfitted


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"augment": "none"}, "--augment auto"),
        ({"augment": "all"}, "--label-smoothing 0.1"),
        ({"label_smoothing": 0.1}, "--weight-decay 0.01"),
        ({"label_smoothing": 0.1, "weight_decay": 0.02}, "--weight-decay 0.2"),
    ],
)
def test_overfitting_is_reported_with_its_epochs_and_what_the_run_did_not_try(find, config, remedy):
    rows = history(RISING, epoch=[1, 2, 3, 4, *range(9, 17)], augmentation=["rotation"] * 12)
    (line,) = find(rows, **config)
    assert line.startswith("overfitting: val_loss rose from 0.520 (epoch 4) to 0.900 (epoch 16) while loss fell")
    assert line.endswith(f"; try {remedy}")


def test_a_validation_loss_that_rises_with_the_training_loss_is_not_overfitting(find):
    assert find(history(RISING, [2.3, 1.0, 0.5, 0.3, *[0.31] * 8])) == []


def test_training_losses_of_different_augmentations_are_not_compared(names):
    """A last epoch without augmentation has a lower training loss for that alone."""
    loss = [2.3, 1.0, 0.5, 0.3, *[0.31] * 7, 0.05]
    rows = history(RISING, loss, augmentation=["shift"] * 11 + ["none"], stage=["train"] * 11 + ["clean"])
    assert "overfitting" not in names(rows)


def test_a_loss_near_zero_may_double_and_halve(find):
    assert find(history([2.0, 0.5, 0.1, 0.03, 0.017, 0.009, 0.008, 0.004, 0.003, 0.006, 0.004, 0.004])) == []


@pytest.mark.parametrize(
    ("before", "last", "is_improving"),
    [(1.0, 0.952, False), (1.0, 0.948, True), (0.1, 0.081, False), (0.1, 0.079, True)],
)
def test_a_loss_5_percent_and_2_hundredths_below_all_before_is_still_improving(names, before, last, is_improving):
    assert ("still improving" in names(history([2.0, *[before] * 8, *[last] * 3]))) is is_improving


def test_a_run_that_was_cut_short_is_reported_with_its_epochs(find):
    (line,) = find(history(FALLING))
    assert line == (
        "still improving: mean val_loss of epochs 10 to 12 is 0.578, the lowest before them was 0.758; try --epochs 24"
    )


def test_a_curve_that_rose_within_the_last_quarter_is_not_improving(names):
    """Its mean is below the quarter before, but it has turned."""
    assert "still improving" not in names(history([2.0, *[0.9] * 8, 0.5, 0.55, 0.62], loss=[1.0] * 12))


def test_a_curve_that_falls_as_the_rate_comes_down_is_not_improving(names):
    rates = 0.001 * (1 + np.cos(np.pi * np.arange(1, 13) / 12)) / 2
    assert names(history(FALLING, learning_rate=rates)) == []
    assert names(history(FALLING, learning_rate=np.linspace(0.001, 0.00049, 12))) == []
    assert names(history(FALLING, learning_rate=np.linspace(0.001, 0.00051, 12))) == ["still improving"]


def test_a_run_that_its_epochs_cut_off_before_the_decay_is_improving(find):
    rows = history([*FALLING, 0.45, 0.4], stage=["train"] * 12 + ["decay"] * 2)
    rows[-2]["learning_rate"], rows[-1]["learning_rate"] = 0.0005, 6e-8
    (line,) = find(rows, patience=4)
    assert line.endswith("try --epochs 28")
    assert find(rows, patience=4, epochs=15) == []  # its patience ended it


@pytest.mark.parametrize(("epochs", "is_read"), [(7, False), (8, True)])
def test_trends_are_read_from_eight_epochs(names, epochs, is_read):
    assert ("overfitting" in names(history([1.0, *[2.0] * (epochs - 1)]))) is is_read
    assert ("saturated early" in names(history([1.0, *[1.05] * (epochs - 1)]))) is is_read
    assert ("unsteady" in names(history([0.7] * epochs, val_accuracy=[*[0.8] * (epochs - 2), 0.9, 0.5]))) is False
    assert ("still improving" in names(history(np.geomspace(2.3, 0.5, epochs)))) is is_read


@pytest.mark.parametrize(
    ("best", "epochs", "is_early"), [(2, 20, True), (3, 20, False), (1, 19, True), (2, 19, False), (1, 8, True)]
)
def test_a_best_epoch_within_the_first_tenth_is_early(names, best, epochs, is_early):
    losses = [1.0 if epoch == best else 1.01 for epoch in range(1, epochs + 1)]
    assert ("saturated early" in names(history(losses))) is is_early


def test_a_run_that_was_best_at_once_is_reported(find):
    (line,) = find(history([0.7, *[0.72] * 11]))
    assert line == (
        "saturated early: val_loss was lowest (0.700) in epoch 1 of 12, within the first tenth; try "
        "--base-learning-rate 0.0002"
    )
    assert find(history([0.019, *[0.02] * 11])) == []  # there is nothing left to gain


@pytest.mark.parametrize(
    ("late", "total", "is_unsteady"),
    [
        # Of 66 images the sampling error is 0.035: four of it.
        ([0.93, 0.80, 0.80], 66, False),
        ([0.95, 0.80, 0.80], 66, True),
        # Of so many images it is nothing.
        ([0.849, 0.80, 0.80], 66_000, False),
        ([0.851, 0.80, 0.80], 66_000, True),
        # A rise is none, and only the last quarter counts.
        ([0.60, 0.80, 0.95], 66_000, False),
        ([0.95, 0.80, 0.80, 0.80], 66_000, False),
    ],
)
def test_a_late_fall_by_five_hundredths_and_four_sampling_errors_is_unsteady(names, late, total, is_unsteady):
    accuracies = [0.80] * (12 - len(late)) + late
    judged = judge(round(60 / 66 * total), 0.68, total)
    assert ("unsteady" in names(history(SOUND, val_accuracy=accuracies), judged)) is is_unsteady


def test_what_was_unsteady_before_the_decay_is_over(find):
    rows = history(SOUND, val_accuracy=[0.8] * 9 + [0.9, 0.5, 0.9])
    (line,) = find(rows)
    assert line.startswith(
        "unsteady: val_accuracy fell from 0.900 to 0.500 (epoch 11) within the last 3 epochs, by 36 "
    )
    assert line.endswith("try --schedule plateau")
    rows[-1]["stage"] = "decay"
    assert find(rows) == []


# Steps, augmentation, classes, the size of the split.


@pytest.mark.parametrize(
    ("epochs", "accuracy", "config", "is_told"),
    [
        (5, 0.94, {}, True),
        (6, 0.94, {}, False),
        (5, 0.95, {}, False),
        (5, 0.94, {"init_from": "runs/other"}, False),
        (5, 0.94, {"patience": 3, "epochs": 9}, False),
        (5, 0.94, {"patience": 3, "epochs": 5}, True),
    ],
)
def test_fewer_than_300_steps_are_few_if_the_images_are_not_fitted(names, epochs, accuracy, config, is_told):
    rows = history([0.7] * epochs, accuracy=[accuracy] * epochs)
    assert ("too few steps" in names(rows, **config)) is is_told


@pytest.mark.parametrize(
    ("rate", "accuracy", "config", "is_told"),
    [
        (0.041, 0.94, {}, True),
        (0.039, 0.94, {}, False),
        (0.00039, 0.94, {}, True),
        (0.00041, 0.94, {}, False),
        (0.041, 0.95, {}, False),
        (0.041, 0.94, {"init_from": "runs/other"}, False),
        # The recipe has no rate for it.
        (0.041, 0.94, {"optimizer": "sgd"}, False),
    ],
)
def test_a_rate_ten_times_the_recipe_s_or_a_tenth_is_unusual_if_the_images_are_not_fitted(
    names, rate, accuracy, config, is_told
):
    rows = history(SOUND, accuracy=[accuracy] * 12)
    found = names(rows, **{"optimizer": "adamw", "base_learning_rate": rate, **config})
    assert ("unusual rate" in found) is is_told


def test_the_steps_of_what_was_tried_and_lost_do_not_count(find):
    """Five epochs of 50 steps led to the weights of epoch 9."""
    rows = history([0.7] * 5, accuracy=[0.9] * 5, epoch=[1, 2, 3, 8, 9], step=[50, 100, 150, 400, 450])
    (line,) = find(rows)
    assert line == (
        "too few steps: only 0.90 of the training images are correct; its weights took 250 steps, and fewer than 300 "
        "rarely suffice; try --epochs 40 --patience 4"
    )


@pytest.mark.parametrize(
    ("right", "accuracy", "augmentation", "augment", "costs"),
    [
        # The interval of 460 of 660 begins at 0.661.
        (460, 0.65, "shift", "all", True),
        (460, 0.67, "shift", "all", False),
        (460, 0.65, "none", "all", False),
        (460, 0.65, "shift", "auto", False),
        # A mixture shows two things, and one of them is correct.
        (460, 0.65, "shift+cutmix", "all", False),
        (593, 0.65, "shift", "all", True),
        (594, 0.65, "shift", "all", False),
    ],
)
def test_an_augmentation_costs_where_training_is_below_validation_and_both_are_low(
    names, right, accuracy, augmentation, augment, costs
):
    rows = history(SOUND, accuracy=[accuracy] * 12, augmentation=[augmentation] * 12)
    assert ("augmentation costs" in names(rows, judge(right, 0.9), augment=augment)) is costs


def test_a_last_epoch_without_augmentation_does_not_hide_what_it_costs(find):
    rows = history(SOUND, accuracy=[0.5] * 11 + [0.9], augmentation=["shift"] * 11 + ["none"])
    rows[-1]["stage"] = "clean"
    (line,) = find(rows, judge(460, 0.9))
    assert line.startswith("augmentation costs: with shift, 0.50 of the training images are correct, and 0.70 of the ")
    assert line.endswith("try --augment auto")


def judge_classes(*counts: tuple[int, int]) -> EvaluationResult:
    """A validation with so many correct, of so many, in each class; the others are predicted as the first."""
    labels = np.repeat(np.arange(len(counts)), [total for _, total in counts])
    place = np.concatenate([np.arange(total) for _, total in counts])
    predicted = np.where(place < np.array([right for right, _ in counts])[labels], labels, 1 * (labels == 0))
    return summarise("val", table(labels, predicted, 0.4), ["cat", "dog", "eel", "fox"][: len(counts)])


@pytest.mark.parametrize(
    ("of_eel", "is_told"), [((0, 1), False), ((0, 2), True), ((1, 30), False), ((0, 30), True), ((0, 0), False)]
)
def test_a_class_is_never_correct_where_that_is_no_accident(names, of_eel, is_told):
    """At 0.9, as of the other two, a class of one image is missed by chance in 1 of 10 runs, one of two in 1 of 100."""
    found = names(history(SOUND), judge_classes((90, 100), (90, 100), of_eel))
    assert ("never correct" in found) is is_told


def test_a_class_that_is_never_correct_is_reported_with_what_it_is_taken_for(find):
    (line,) = find(history(SOUND), judge_classes((90, 100), (90, 100), (0, 90)))
    assert line.startswith("never correct: eel (0 of 90, 90 predicted as cat); look at their images, on the page that")
    (line,) = find(history(SOUND), judge_classes((90, 100), (90, 100), (0, 20)))
    assert line.endswith("; they have few images; try --class-weights balanced")
    (line,) = find(history(SOUND), judge_classes((90, 100), (90, 100), (0, 20)), class_weights="balanced")
    assert "look at their images" in line


@pytest.mark.parametrize(
    ("right", "total", "is_told"), [(51, 66, False), (50, 66, True), (20, 20, False), (8, 20, True)]
)
def test_an_interval_wider_than_a_fifth_says_little(names, right, total, is_told):
    assert ("few validation images" in names(history(SOUND), judge(right, 0.9, total))) is is_told


def test_a_small_validation_split_is_reported_with_the_size_that_would_do(find):
    (line,) = find(history(SOUND), judge(33, 0.9, 66))
    assert line.startswith("few validation images: of 66, the interval 0.38-0.62 is 0.23 wide")
    assert "about 363 would show five points" in line


# All together.


def test_findings_that_exclude_each_other_never_stand_together(names):
    """Whatever the curve: it improves, has turned, jumps or was cut off, but one of these only."""
    together = [
        {
            "overfitting",
            "still improving",
            "saturated early",
            "unsteady",
            "too few steps",
            "unusual rate",
            "augmentation costs",
        },
        {"did not train", "training loss rose", "diverged"},
    ]
    curves = [SOUND, RISING, FALLING, [0.5, *[1.0] * 11], [2.0, *[0.9] * 8, 0.5, 0.55, 0.62], [2.3] * 12]
    losses = [np.geomspace(2.3, 0.1, 12), np.linspace(1, 2, 12), np.full(12, 2.3)]
    accuracies = [[0.8] * 12, [0.8] * 10 + [0.9, 0.4]]
    seen = set()
    for curve, loss, accuracy, val in itertools.product(curves, losses, accuracies, (GOOD, judge(66, 2.4))):
        for steps in (10, 50):
            rows = history(curve, loss, accuracy, step=[steps * epoch for epoch in range(1, 13)], accuracy=[0.5] * 12)
            found = names(rows, val)
            seen |= {*found}
            assert all(len(group & {*found}) <= 1 for group in together), found
    assert seen >= {"overfitting", "still improving", "saturated early", "did not train", "training loss rose"}


def test_what_a_finding_says_to_try_are_options_with_values_that_are_allowed(find):
    lines = [
        *find(history(SOUND), reason="nan"),
        *find(history([2.3] * 12, loss=[2.3] * 12), judge(66, 2.3)),
        *find(history([2.3] * 12, loss=[2.3] * 12), judge(66, 2.3), recipe="notes"),
        *find(history([2.3] * 4, loss=[2.3, 2.5, 2.8, 3.0]), judge(66, 2.9)),
        *(line for augment in ("none", "all") for line in find(history(RISING), augment=augment)),
        *find(history(RISING), label_smoothing=0.1),
        *find(history([0.7] * 5, accuracy=[0.9] * 5)),
        *find(history(SOUND, accuracy=[0.9] * 12), optimizer="adamw", base_learning_rate=0.2),
        *find(history(FALLING)),
        *find(history([0.7, *[0.72] * 11])),
        *(
            line
            for one in ({}, {"schedule": "plateau"}, {"schedule": "plateau", "ema_momentum": 0.99})
            for line in find(history(SOUND, val_accuracy=[0.8] * 9 + [0.9, 0.5, 0.9]), **one)
        ),
        *find(history(SOUND, accuracy=[0.5] * 12, augmentation=["shift"] * 12), judge(460, 0.9)),
        *find(history(SOUND), judge_classes((90, 100), (90, 100), (0, 20))),
    ]
    tried = {option for line in lines for option in re.findall(r"--([a-z-]+) ([\w.-]+\w)", line)}
    assert len(tried) >= 12
    for name, value in tried:
        field = name.replace("-", "_")
        assert field in OPTIONS
        parse_request({"arch": "alexnet", field: value})


def test_the_guide_explains_each_finding():
    text = (Path(__file__).parents[4] / "docs" / "guide.md").read_text()
    table = text.partition("## Findings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z ]+) \|", table, re.MULTILINE)[1:]
    source = Path(find_symptoms.__code__.co_filename).read_text()
    told = re.findall(r'f"([a-z ]+?)(?:: \{| from \{|: val_|: only|: mean|: with|: of)', source)
    assert sorted(rows) == sorted(told)


# Epochs that did not lead to the weights.


def lose(losses: list[float], stage: str = "train") -> list[dict]:
    """Return rows of which the second and third did not lead to the weights of the last."""
    rows = history([2.2, 2.5, 9.9, *SOUND], loss=[2.29 if losses[1] > losses[0] else 6.3, *losses, *FALLING])
    for row in rows[1:3]:
        row["stage"] = stage
    rows[3]["started_from"] = 1
    return rows


@pytest.mark.parametrize(
    ("losses", "stage", "expected"),
    [
        ([3.6, 376.6], "train", ["lost epochs"]),
        ([2.4, 2.5], "train", []),
        ([3.6, 376.6], "trial", []),
        # It began there, with weights from elsewhere, and fell.
        ([4.2, 3.4], "train", []),
    ],
)
def test_epochs_above_guessing_that_the_run_left_are_a_rate_too_high(names, losses, stage, expected):
    assert names(lose(losses, stage), schedule="plateau") == expected


def test_lost_epochs_are_reported_with_the_worst_and_a_tenth_of_the_rate(find):
    (line,) = find(lose([3.6, 4.8e12]), schedule="plateau")
    assert "with a training loss of 4.8e+12 (epoch 3), above that of guessing by class frequency (2.3" in line
    assert line.endswith("try --base-learning-rate 0.0002")


@pytest.mark.parametrize(
    ("config", "augmentation", "stage", "remedy"),
    [
        ({"augment": "none"}, "none", "train", "--augment auto"),
        # Too few epochs to try any.
        ({"augment": "auto", "augment_zoom": 0.1}, "none", "train", "--augment all"),
        # The recipe of the notes.
        ({"augment": "all"}, "none", "train", "--augment-rotation 10 --augment-zoom 0.1"),
        ({"augment": "auto"}, "none", "trial", "--label-smoothing 0.1"),
        ({"augment": "auto", "known_augmentation": "none"}, "none", "train", "--label-smoothing 0.1"),
        ({"augment": "auto"}, "rotation", "trial", "--label-smoothing 0.1"),
        ({"augment": "all"}, "rotation", "train", "--label-smoothing 0.1"),
    ],
)
def test_overfitting_is_answered_by_augmentation_unless_the_run_had_or_tried_it(
    find, config, augmentation, stage, remedy
):
    rows = history(RISING, loss=FALLING, augmentation=[augmentation] * 12, stage=[stage, *["train"] * 11])
    (line,) = find(rows, **config)
    assert line.startswith("overfitting")
    assert line.endswith(remedy)


def test_a_fine_tuned_run_at_chance_is_told_to_take_more_steps(find):
    (line,) = find(history([2.3] * 3, loss=[2.3] * 3, accuracy=[0.1] * 3), judge(66, 2.3), init_from="/runs/first")
    assert line.startswith("did not train")
    assert "its weights took 150 steps, and fewer than 300 rarely suffice; try --epochs" in line
