"""Exact evaluation: every row of a split counts once, for any number of workers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.training.dataset import BatchFeed, ImageSplit

# The columns that `trainer.training.step.compile_eval_step` returns for each row.
COLUMNS = ("loss", "predicted", "confidence", "likelier")


@dataclass(frozen=True)
class Evaluator:
    """Evaluate a split on all workers together.

    A row's result does not depend on the other rows of its batch, so the numbers equal those of a single worker. The
    last batch is padded with rows that are dropped afterwards.
    """

    split: ImageSplit
    batch_size: int
    rank: int
    num_workers: int
    eval_step: Callable[[Any, Any], Any]
    gather: Callable[[Any], Any]

    def evaluate(self) -> npt.NDArray[np.float32]:
        """Return float32 ``[rows, len(COLUMNS)]`` in row order, on every worker; all workers must call it."""
        # Not at the top: reading a table of predictions needs no TensorFlow.
        import tensorflow as tf

        from trainer.training.batches import move_batch

        num_batches = -(-len(self.split) // self.batch_size)
        batches_per_worker = -(-num_batches // self.num_workers)
        own = range(self.rank, batches_per_worker * self.num_workers, self.num_workers)
        if len(own):
            self.split.expect(np.concatenate([self._rows(index) for index in own]))
        # Fetched at the end and in one copy, so that the device does not wait between batches.
        results = [self.eval_step(*batch) for batch in BatchFeed(move_batch).batches(self._batch, own)]
        gathered = np.asarray(self.gather(tf.concat(results, axis=0)))
        # From [worker, batch of the worker, row of the batch] back to row order.
        by_worker = gathered.reshape(self.num_workers, batches_per_worker, self.batch_size, -1)
        return by_worker.swapaxes(0, 1).reshape(-1, by_worker.shape[-1])[: len(self.split)]

    def _batch(self, index: int) -> tuple[Any, Any]:
        # Not at the top, as above.
        from trainer.training.batches import make_batch

        return make_batch(self.split, self._rows(index))

    def _rows(self, index: int) -> npt.NDArray[np.int64]:
        rows = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        return np.minimum(rows, len(self.split) - 1)


def mean_loss_and_accuracy(outcomes: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy of what `Evaluator.evaluate` returned."""
    loss = float(np.mean(outcomes[:, COLUMNS.index("loss")], dtype=np.float64))
    accuracy = float(np.mean(outcomes[:, COLUMNS.index("predicted")].astype(np.int32) == labels))
    return loss, accuracy


def predictions_table(outcomes: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]) -> pa.Table:
    """Return one row per image, with label, loss, predicted, confidence and likelier, in the split's row order."""
    columns: dict[str, Any] = {"label": pa.array(labels, pa.int32())}
    for index, name in enumerate(COLUMNS):
        kind = pa.int32() if name in ("predicted", "likelier") else pa.float32()
        columns[name] = pa.array(outcomes[:, index]).cast(kind)
    return pa.table(columns)
