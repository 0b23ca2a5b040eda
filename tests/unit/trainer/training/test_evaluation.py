import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import OnDevice
from trainer.training.dataset import ImageSplit
from trainer.training.evaluation import COLUMNS, Evaluator, mean_loss_and_accuracy, predictions_table


def split_of(rows: int) -> ImageSplit:
    """Rows that can be distinguished: image i has the value i, label i modulo 3."""
    images = np.arange(rows, dtype=np.uint8).repeat(4).reshape(rows, 2, 2, 1)
    return ImageSplit.hold(images, (np.arange(rows) % 3).astype(np.int32))


def eval_step(images: Any, labels: Any) -> np.ndarray:
    """The row's own number in every column but one."""
    labels = labels.numpy()
    value = images.numpy()[:, 0, 0, 0].astype(np.float32)
    return np.stack([value, labels.astype(np.float32), value, value], axis=1)


def evaluate_together(split: ImageSplit, batch_size: int, num_workers: int) -> list[np.ndarray]:
    """Run every worker in a thread of its own; they meet in `gather` as they do in a cluster."""
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


def test_no_batch_is_fetched_by_itself():
    copies = []

    def eval_on_device(images, labels):
        return OnDevice(tf.constant(eval_step(images, labels)), lambda: copies.append(len(images)))

    outcomes = Evaluator(split_of(10), 4, 0, 1, eval_on_device, lambda values: values).evaluate()
    np.testing.assert_array_equal(outcomes[:, 0], np.arange(10))
    assert copies == []


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


def test_a_large_split_has_an_exact_mean_loss():
    # A float32 sum of these stops growing.
    outcomes = np.zeros((3_000_000, len(COLUMNS)), np.float32)
    outcomes[:, 0] = 0.1
    assert mean_loss_and_accuracy(outcomes, np.zeros(len(outcomes), np.int32))[0] == pytest.approx(0.1, rel=1e-7)
