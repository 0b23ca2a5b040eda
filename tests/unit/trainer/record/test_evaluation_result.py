import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from trainer.record.evaluation_result import EvaluationResult, average_last, find_mistakes, summarise


def predictions_of(labels, predicted, loss=0.5, confidence=0.9, likelier=None) -> pa.Table:
    count = len(labels)
    likelier = np.int32(np.asarray(labels) != np.asarray(predicted)) if likelier is None else likelier
    columns = {"loss": np.broadcast_to(loss, count), "confidence": np.broadcast_to(confidence, count)}
    return pa.table({"label": labels, "predicted": predicted, "likelier": likelier, **columns})


def summary(labels: list[int], predicted: list[int], names=("a", "b", "c")):
    return summarise("test", predictions_of(labels, predicted), list(names))


def test_mistakes_are_the_wrong_predictions_with_the_highest_loss_in_order():
    table = predictions_of([0, 0, 0, 1, 1], [0, 1, 2, 1, 0], loss=np.array([9.0, 1.0, 3.0, 8.0, 3.0]))
    assert find_mistakes(table).tolist() == [2, 4, 1]
    assert find_mistakes(predictions_of([0, 1], [0, 1])).tolist() == []
    many = predictions_of([0] * 40, [1] * 40, loss=np.arange(40.0))
    assert find_mistakes(many).tolist() == list(range(39, 23, -1))


@pytest.mark.parametrize(("classes", "top_k", "correct"), [(2, 1, 2), (4, 2, 3), (10, 5, 5), (100, 5, 5)])
def test_the_true_label_may_be_among_the_likeliest_few(classes, top_k, correct):
    table = predictions_of([0] * 6, [0, 0, 1, 1, 1, 1], likelier=np.array([0, 0, 1, 3, 4, 5], np.int32))
    result = summarise("test", table, [str(label) for label in range(classes)])
    assert (result.top_k, result.top_k_correct) == (top_k, correct)
    # The top one is the accuracy.
    assert (f"top {top_k}: {correct} of 6" in result.details) == (top_k > 1)


def test_calibration_is_how_far_confidence_is_from_accuracy():
    # Four rows 0.95 sure of which two are right, one row 0.4 sure that is right: 4/5 x 0.45 + 1/5 x 0.6.
    table = predictions_of([0] * 5, [0, 0, 1, 1, 0], confidence=np.array([0.95] * 4 + [0.4]))
    assert summarise("test", table, ["a", "b"]).calibration_error == pytest.approx(0.8 * 0.45 + 0.2 * 0.6)


def test_full_confidence_in_what_is_right_is_perfect_calibration():
    assert summarise("test", predictions_of([0, 1], [0, 1], confidence=1.0), ["a", "b"]).calibration_error == 0


def test_the_summary_counts_right_and_wrong_by_class():
    result = summary([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 1, 0])
    assert (result.correct, result.total) == (4, 6)
    assert result.accuracy == pytest.approx(4 / 6)
    cells = sorted(zip(*(column.tolist() for column in result.confusion), strict=True))
    assert cells == [(0, 0, 2), (0, 1, 1), (1, 1, 2), (2, 0, 1)]
    assert [one.taken_for for one in result.per_class] == [{"b": 1}, {}, {"a": 1}]
    assert [(one.name, one.correct, one.total) for one in result.per_class] == [("a", 2, 3), ("b", 2, 2), ("c", 0, 1)]
    assert (result.split, result.loss) == ("test", 0.5)


def test_each_class_has_precision_recall_and_f1():
    # Of class b nothing is predicted but one image of a; nothing is of class d or predicted as it.
    result = summary([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 0, 2, 2], names=("a", "b", "c", "d"))
    cells = {name: scores.cells for name, scores in result.scores.items()}
    assert cells["a"] == ("0.750", "0.750", "0.750")
    assert cells["b"] == ("0.000", "0.000", "0.000")
    assert cells["c"] == ("0.500", "1.000", "0.667")
    assert cells["d"] == ("", "", "")


def test_a_record_with_the_whole_matrix_is_read_as_the_same_result():
    result = summary([0, 0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 0, 1])
    record = result.model_dump(mode="json")
    for one in record["per_class"]:
        del one["taken_for"]
    record["confusion"] = [[2, 1, 0], [0, 2, 0], [1, 1, 0]]
    assert EvaluationResult.model_validate_json(json.dumps(record)) == result


def test_of_many_classes_the_weakest_and_the_most_confused_are_listed():
    # Ten images of each of 60 classes: 5 of the last are taken for the first, 2 of the one before for the last.
    labels = np.repeat(np.arange(60), 10)
    predicted = labels.copy()
    predicted[-5:], predicted[-12:-10] = 0, 59
    names = [f"class {label}" for label in range(60)]
    result = summary(labels, predicted, names)
    assert len(result.listed) == 20
    assert [(one.name, one.correct) for one in result.listed[:3]] == [("class 59", 5), ("class 58", 8), ("class 0", 10)]
    assert result.most_confused == [("class 59", "class 0", 5), ("class 58", "class 59", 2)]
    few = summary([0, 0, 1], [0, 1, 1])
    assert few.listed == few.per_class


def test_ten_thousand_classes_are_summarised_without_a_matrix():
    labels = np.arange(10_000)
    tracemalloc.start()
    result = summary(labels, np.roll(labels, 1), [str(label) for label in labels])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (result.correct, len(result.most_confused)) == (0, 20)
    # The matrix would be 800 MB.
    assert peak < 50e6


def test_a_class_that_is_not_in_the_split_has_none_of_none():
    result = summary([0, 1], [0, 2])
    assert [(one.correct, one.total) for one in result.per_class] == [(1, 1), (0, 1), (0, 0)]


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3 (Wilson's score).
@pytest.mark.parametrize(
    ("correct", "total", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0000, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_interval_is_wilsons(correct, total, interval):
    result = summary([0] * total, [0] * correct + [1] * (total - correct), ("a", "b"))
    assert result.accuracy_interval == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(("accuracies", "epochs", "accuracy"), [([0.9, 0.7, 0.8, 0.9], 3, 0.8), ([0.6, 0.8], 2, 0.7)])
def test_the_last_epochs_are_averaged_whichever_was_best(accuracies, epochs, accuracy):
    late = average_last(
        [{"epoch": epoch, "val_accuracy": one, "val_loss": 1 - one} for epoch, one in enumerate(accuracies, 1)], 100
    )
    assert (late.epochs, late.accuracy, late.loss) == (epochs, pytest.approx(accuracy), pytest.approx(1 - accuracy))
    assert (
        late.accuracy_interval
        == summary([0] * 100, [0] * round(100 * accuracy) + [1] * round(100 - 100 * accuracy)).accuracy_interval
    )


def test_the_mean_of_the_last_epochs_reads_like_the_other_numbers():
    rows = [{"epoch": epoch, "val_accuracy": 0.75, "val_loss": 0.5} for epoch in (1, 4, 5)]
    numbers = "loss: 0.5000 - accuracy: 0.7500 (95% interval 0.657-0.825)"
    # The weights of epoch 4 came from those of epoch 1.
    assert str(average_last(rows, 100)) == f"mean of the last 2 epochs: {numbers}"
    assert str(average_last(rows[:2], 100)) == f"last epoch: {numbers}"


def test_the_numbers_read_as_in_the_notes(evaluation):
    assert str(evaluation) == "loss: 0.9315 - accuracy: 0.7727 (51 of 66, 95% interval 0.658-0.857)"


def test_a_large_split_has_an_exact_mean_loss():
    # A float32 sum of these stops growing.
    labels = np.zeros(3_000_000, np.int32)
    table = predictions_of(labels, labels, loss=np.full(len(labels), 0.1, np.float32))
    assert summarise("val", table, ["a", "b"]).loss == pytest.approx(0.1, rel=1e-7)
