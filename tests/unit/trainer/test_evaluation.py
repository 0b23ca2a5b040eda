import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trainer.dataset import ImageSplit
from trainer.evaluation import (
    COLUMNS,
    EvaluationResult,
    Evaluator,
    mean_loss_and_accuracy,
    predictions_table,
    summarise,
)


def split_of(rows: int) -> ImageSplit:
    """Rows that can be told apart: image i has the value i, label i modulo 3."""
    images = np.arange(rows, dtype=np.uint8).repeat(4).reshape(rows, 2, 2, 1)
    return ImageSplit(images, (np.arange(rows) % 3).astype(np.int32))


def eval_step(images: Any, labels: Any) -> np.ndarray:
    """The row's own number in every column but one."""
    labels = labels.numpy()
    value = images.numpy()[:, 0, 0, 0].astype(np.float32)
    return np.stack([value, labels.astype(np.float32), value, value], axis=1)


def evaluate_together(split: ImageSplit, batch_size: int, num_workers: int) -> list[np.ndarray]:
    """Runs every worker in a thread of its own; they meet in `gather` as they do in a cluster."""
    meeting, gathered = threading.Barrier(num_workers, timeout=30), [np.empty(0)] * num_workers

    def evaluate(rank: int) -> np.ndarray:
        def gather(values: np.ndarray) -> np.ndarray:
            gathered[rank] = values
            meeting.wait()
            return np.concatenate(gathered)

        return Evaluator(split, batch_size, rank, num_workers, eval_step, gather).evaluate()

    with ThreadPoolExecutor(num_workers) as workers:
        return list(workers.map(evaluate, range(num_workers)))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (12, 4), (13, 4), (23, 1), (7, 10), (40, 7)])
def test_every_worker_has_every_row_once_and_in_order(rows, batch_size, num_workers):
    split = split_of(rows)
    for outcomes in evaluate_together(split, batch_size, num_workers):
        assert outcomes.shape == (rows, len(COLUMNS))
        np.testing.assert_array_equal(outcomes[:, 0], np.arange(rows))
        np.testing.assert_array_equal(outcomes[:, COLUMNS.index("predicted")], split.labels)


def test_every_batch_has_the_same_size():
    sizes = []

    def eval_and_note(images, labels):
        sizes.append((len(images), len(labels)))
        return eval_step(images, labels)

    Evaluator(split_of(10), 4, 0, 1, eval_and_note, lambda values: values).evaluate()
    assert sizes == [(4, 4)] * 3


def outcomes_of(rows: list[tuple[float, int, float, int]]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_loss_and_accuracy_are_means_over_the_rows():
    outcomes = outcomes_of([(0.5, 1, 0.9, 0), (1.5, 2, 0.5, 1), (1.0, 0, 0.4, 0), (3.0, 1, 0.8, 2)])
    assert mean_loss_and_accuracy(outcomes, np.array([1, 0, 0, 2], np.int32)) == (1.5, 0.5)


def test_predictions_have_a_row_an_image():
    table = predictions_table(outcomes_of([(0.5, 1, 0.75, 0), (1.5, 2, 0.5, 1)]), np.array([1, 0], np.int32))
    types = {"label": "int32", "loss": "float", "predicted": "int32", "confidence": "float", "likelier": "int32"}
    assert dict(zip(table.schema.names, map(str, table.schema.types), strict=True)) == types
    assert table.to_pylist() == [
        {"label": 1, "loss": 0.5, "predicted": 1, "confidence": 0.75, "likelier": 0},
        {"label": 0, "loss": 1.5, "predicted": 2, "confidence": 0.5, "likelier": 1},
    ]


def predictions_of(labels, predicted, loss=0.5, confidence=0.9, likelier=None) -> pa.Table:
    count = len(labels)
    likelier = np.int32(np.asarray(labels) != np.asarray(predicted)) if likelier is None else likelier
    columns = {"loss": np.broadcast_to(loss, count), "confidence": np.broadcast_to(confidence, count)}
    return pa.table({"label": labels, "predicted": predicted, "likelier": likelier, **columns})


def summary(labels: list[int], predicted: list[int], names=("a", "b", "c")):
    return summarise("test", predictions_of(labels, predicted), list(names))


@pytest.mark.parametrize(("classes", "top_k", "correct"), [(2, 1, 2), (4, 2, 3), (10, 5, 5), (100, 5, 5)])
def test_the_true_label_may_be_among_the_likeliest_few(classes, top_k, correct):
    table = predictions_of([0] * 6, [0, 0, 1, 1, 1, 1], likelier=np.array([0, 0, 1, 3, 4, 5], np.int32))
    result = summarise("test", table, [str(label) for label in range(classes)])
    assert (result.top_k, result.top_k_correct) == (top_k, correct)


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


def test_the_numbers_read_as_in_the_notes(evaluation):
    assert str(evaluation) == "loss: 0.9315 - accuracy: 0.7727 (51 of 66, 95% interval 0.658-0.857)"


def test_a_large_split_has_an_exact_mean_loss():
    # A float32 sum of these stops growing.
    loss = np.full(3_000_000, 0.1, np.float32)
    outcomes = np.zeros((len(loss), len(COLUMNS)), np.float32)
    outcomes[:, 0] = loss
    labels = np.zeros(len(loss), np.int32)
    assert mean_loss_and_accuracy(outcomes, labels)[0] == pytest.approx(0.1, rel=1e-7)
    table = predictions_of(labels, labels, loss=loss)
    assert summarise("val", table, ["a", "b"]).loss == pytest.approx(0.1, rel=1e-7)
