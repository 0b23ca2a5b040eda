import numpy as np
import pyarrow as pa
import pytest

from trainer.notes.diagnostics import find_symptoms
from trainer.record.evaluation_result import EvaluationResult, summarise


def judge(right: int, loss: float, total: int = 66) -> EvaluationResult:
    """A validation of ten classes of nearly the same size."""
    labels = np.arange(total) % 10
    predicted = np.where(np.arange(total) < right, labels, (labels + 1) % 10)
    columns = {
        "label": labels,
        "predicted": predicted,
        "confidence": np.full(total, 0.5),
        "likelier": np.int32(labels != predicted),
        "loss": np.full(total, loss),
    }
    return summarise("val", pa.table(columns), [str(label) for label in range(10)])


def history(val_loss, loss=None, val_accuracy=None) -> list[dict[str, float]]:
    loss = np.geomspace(2.3, 0.1, len(val_loss)) if loss is None else loss
    val_accuracy = [0.8] * len(val_loss) if val_accuracy is None else val_accuracy
    columns = {"loss": loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# Falls, then stays.
SOUND = [2.0, 1.4, 1.0, 0.8, 0.72, 0.7, 0.69, 0.69, 0.685, 0.685, 0.684, 0.684]
GOOD = judge(60, 0.68)


def test_a_sound_run_has_no_symptom():
    assert find_symptoms(history(SOUND), GOOD) == []


@pytest.mark.parametrize(("right", "loss"), [(10, 2.2375), (10, 2.2358), (5, 2.9)])
def test_chance_is_told(right, loss):
    (line,) = find_symptoms(history([2.3] * 6), judge(right, loss))
    assert line.startswith(f"did not train: {right} of 66 correct")
    assert "2.30" in line


@pytest.mark.parametrize(("right", "loss"), [(27, 1.78), (51, 0.93), (10, 1.2), (30, 2.3)])
def test_more_than_chance_in_either_number_is_training(right, loss):
    assert not any("did not train" in line for line in find_symptoms(history(SOUND), judge(right, loss)))


def test_always_naming_the_most_frequent_class_is_chance():
    labels = np.array([0] * 90 + [1] * 10)
    columns = {"label": labels, "predicted": np.zeros(100, int), "confidence": np.full(100, 0.9)}
    columns |= {"likelier": np.int32(labels == 1), "loss": np.full(100, 0.33)}
    (line,) = find_symptoms(history(SOUND), summarise("val", pa.table(columns), ["a", "b"]))
    assert line.startswith("did not train: 90 of 100")


def test_overfitting_is_told_with_the_epochs():
    rising = [2.0, 1.2, 0.7, 0.52, 0.55, 0.6, 0.66, 0.72, 0.8, 0.84, 0.88, 0.9]
    (line,) = find_symptoms(history(rising), GOOD)
    assert line.startswith("overfitting: val_loss rose from 0.520 (epoch 4) to 0.900")


def test_a_loss_near_zero_may_double_and_halve():
    assert (
        find_symptoms(history([2.0, 0.5, 0.1, 0.03, 0.017, 0.009, 0.008, 0.004, 0.003, 0.006, 0.004, 0.004]), GOOD)
        == []
    )


def test_a_validation_loss_that_rises_with_the_training_loss_is_not_overfitting():
    rising = [2.0, 1.2, 0.7, 0.52, 0.55, 0.6, 0.66, 0.72, 0.8, 0.84, 0.88, 0.9]
    loss = [2.3, 1.0, 0.5, 0.3, *[0.31] * 8]
    assert find_symptoms(history(rising, loss), GOOD) == []


def test_a_run_that_was_cut_short_is_told():
    (line,) = find_symptoms(history(np.geomspace(2.3, 0.5, 12)), GOOD)
    assert line.startswith("still improving: mean val_loss fell from 0.")
    assert "--epochs 24" in line


def test_a_run_that_was_best_at_once_is_told():
    (line,) = find_symptoms(history([0.7, *[0.72] * 11]), GOOD)
    assert line.startswith("saturated early: val_loss was lowest (0.700) in epoch 1 of 12")


def test_a_validation_accuracy_that_jumps_late_is_told():
    (line,) = find_symptoms(history(SOUND, val_accuracy=[0.8] * 10 + [0.5, 0.9]), judge(600, 0.68, total=660))
    assert line.startswith("unsteady: val_accuracy ranged from 0.500 to 0.900")


def test_a_training_loss_that_rises_is_told():
    (line,) = find_symptoms(history([2.3] * 4, loss=[2.3, 2.5, 2.8, 3.0]), GOOD)
    assert line.startswith("training loss rose from 2.300 (epoch 1) to 3.000 (epoch 4)")


def test_divergence_is_told_with_its_steps():
    line, *_ = find_symptoms(history(SOUND), GOOD, "the loss became nan somewhere within steps [51, 100]")
    assert line.startswith("diverged: the loss became nan somewhere within steps [51, 100]; try")


def test_trends_are_not_read_from_a_few_epochs():
    assert find_symptoms(history([0.5, 0.9, 1.2]), GOOD) == []


def finds(symptom: str, *arguments) -> bool:
    return any(line.startswith(symptom) for line in find_symptoms(*arguments))


# Of guessing by class frequency, among ten classes of nearly the same size.
PRIOR_LOSS = 2.3


@pytest.mark.parametrize(
    ("right", "loss", "is_chance"),
    [
        # Always naming the most frequent class is right for 7 of 66; the interval of 12 begins above that.
        (11, PRIOR_LOSS, True),
        (12, PRIOR_LOSS, False),
        (10, 0.96 * PRIOR_LOSS, True),
        (10, 0.94 * PRIOR_LOSS, False),
    ],
)
def test_chance_ends_at_the_interval_and_at_95_percent_of_the_loss_of_guessing(right, loss, is_chance):
    assert finds("did not train", history(SOUND), judge(right, loss)) is is_chance


@pytest.mark.parametrize(
    ("lowest", "last", "is_overfitted"),
    [(1.0, 1.14, False), (1.0, 1.16, True), (0.05, 0.069, False), (0.05, 0.071, True)],
)
def test_a_loss_that_rose_by_15_percent_and_by_more_than_2_hundredths_is_overfitted(lowest, last, is_overfitted):
    assert finds("overfitting", history([2.0, 1.8, lowest, *[last] * 9]), GOOD) is is_overfitted


@pytest.mark.parametrize(
    ("before", "last", "is_improving"), [(1.0, 0.96, False), (1.0, 0.94, True), (0.1, 0.081, False), (0.1, 0.079, True)]
)
def test_a_loss_that_fell_by_5_percent_and_by_more_than_2_hundredths_is_still_improving(before, last, is_improving):
    losses = history([2.0, *[before] * 8, *[last] * 3])
    assert finds("still improving", losses, GOOD) is is_improving


@pytest.mark.parametrize(("epochs", "is_read"), [(7, False), (8, True)])
def test_trends_are_read_from_eight_epochs(epochs, is_read):
    assert finds("overfitting", history([1.0, *[2.0] * (epochs - 1)]), GOOD) is is_read
    assert finds("saturated early", history([1.0, *[2.0] * (epochs - 1)]), GOOD) is is_read


@pytest.mark.parametrize(
    ("best", "epochs", "is_early"), [(2, 20, True), (3, 20, False), (1, 19, True), (2, 19, False), (1, 8, True)]
)
def test_a_best_epoch_within_the_first_tenth_is_early(best, epochs, is_early):
    losses = [1.0 if epoch == best else 1.01 for epoch in range(1, epochs + 1)]
    assert finds("saturated early", history(losses), GOOD) is is_early


@pytest.mark.parametrize(
    ("late", "total", "is_unsteady"),
    [
        # Of 66 images the sampling error is 0.035: four of it.
        ([0.80, 0.80, 0.93], 66, False),
        ([0.80, 0.80, 0.95], 66, True),
        # Of so many images it is nothing.
        ([0.80, 0.80, 0.849], 66_000, False),
        ([0.80, 0.80, 0.851], 66_000, True),
        # Only the last quarter counts.
        ([0.10, 0.80, 0.80, 0.80], 66_000, False),
    ],
)
def test_late_accuracies_five_hundredths_and_four_sampling_errors_apart_are_unsteady(late, total, is_unsteady):
    accuracies = [0.80] * (12 - len(late)) + late
    judged = judge(round(60 / 66 * total), 0.68, total)
    assert finds("unsteady", history(SOUND, val_accuracy=accuracies), judged) is is_unsteady


def test_a_training_loss_that_ends_where_it_began_did_not_rise():
    assert not finds("training loss rose", history([2.3] * 4, loss=[2.3, 2.4, 2.4, 2.3]), GOOD)
    assert finds("training loss rose", history([2.3] * 4, loss=[2.3, 2.4, 2.4, 2.301]), GOOD)
