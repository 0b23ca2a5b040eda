import numpy as np
import pyarrow as pa
import pytest

from trainer.diagnostics import find_symptoms
from trainer.evaluation_result import EvaluationResult, summarise


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
    assert line.startswith(f"did not train: {right} of 66 right")
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
    assert line.startswith("unsteady: val_accuracy went between 0.500 and 0.900")


def test_a_training_loss_that_rises_is_told():
    (line,) = find_symptoms(history([2.3] * 4, loss=[2.3, 2.5, 2.8, 3.0]), GOOD)
    assert line.startswith("training loss rose from 2.300 (epoch 1) to 3.000 (epoch 4)")


def test_divergence_is_told_with_its_steps():
    line, *_ = find_symptoms(history(SOUND), GOOD, "the loss became nan somewhere within steps [51, 100]")
    assert line.startswith("diverged: the loss became nan somewhere within steps [51, 100]; try")


def test_trends_are_not_read_from_a_few_epochs():
    assert find_symptoms(history([0.5, 0.9, 1.2]), GOOD) == []
