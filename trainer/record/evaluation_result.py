"""The evaluation of a model on a split: what is computed from a table of predictions, and its record."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, model_validator

from trainer.record.epoch_row import Metrics
from trainer.runtime.markdown import MOST_CLASSES, format_count, format_loss
from trainer.runtime.record_format import Record

_CALIBRATION_BINS = 15

_MOST_LISTED = 20
_MOST_MISTAKES = 16
# Enough to even out a lucky epoch, few enough to be about the network as it ended.
_LATE_EPOCHS = 3


class ClassResult(BaseModel):
    """How many images of one class were predicted correctly."""

    model_config = ConfigDict(frozen=True)

    name: str
    correct: int
    total: int
    taken_for: dict[str, int] = {}
    """Number of wrong predictions by the predicted class, most frequent first."""


@dataclass(frozen=True)
class ClassScores:
    """Measures from a class's row and column of the confusion matrix; NaN if there is nothing to divide by."""

    precision: float
    """Share of the images predicted as this class that are of it."""
    recall: float
    """Share of the images of this class that are predicted as it."""
    f1: float
    """Harmonic mean of both."""

    @property
    def cells(self) -> tuple[str, str, str]:
        """Each in the form in which tables show it; empty for NaN."""
        precision, recall, f1 = (
            "" if math.isnan(one) else f"{one:.3f}" for one in (self.precision, self.recall, self.f1)
        )
        return precision, recall, f1


class LateEpochs(BaseModel):
    """Mean validation of the last epochs: unlike that of the best epoch, it was not chosen for being high."""

    model_config = ConfigDict(frozen=True)

    epochs: int
    """Number of epochs that the means are over."""
    loss: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95% Wilson score interval for as many images as one epoch validates."""

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        epochs = "last epoch" if self.epochs == 1 else f"mean of the last {format_count(self.epochs, 'epoch')}"
        return (
            f"{epochs}: loss: {format_loss(self.loss)} - accuracy: "
            f"{self.accuracy:.4f} (95% interval {low:.3f}-{high:.3f})"
        )


class EvaluationResult(Record):
    """The evaluation of a model on a split."""

    ADDED: ClassVar[Mapping[str, Any]] = {
        "top_k": 1,
        "top_k_correct": lambda old: old.get("correct"),
        # Not measured.
        "calibration_error": math.nan,
    }

    split: str
    loss: float
    """Mean cross-entropy in nats."""
    correct: int
    total: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95% Wilson score interval."""
    top_k: int
    """5, or half of the number of classes if there are fewer than ten."""
    top_k_correct: int
    """Number of rows whose true label is among the ``top_k`` most likely."""
    calibration_error: float
    """Expected calibration error with 15 equal bins of confidence (Guo et al. 2017, section 2)."""
    per_class: list[ClassResult]

    @model_validator(mode="before")
    @classmethod
    def _read_matrix(cls, values: Any) -> Any:
        """Read an older record, in which the confusion matrix was a separate field."""
        if not isinstance(values, dict) or "confusion" not in values:
            return values
        values = dict(values)
        labels, predicted = np.nonzero(matrix := np.array(values.pop("confusion")))
        names = [one["name"] for one in values["per_class"]]
        counts = (labels, predicted, matrix[labels, predicted])
        return values | {"per_class": _count_by_class(names, *counts)}

    @property
    def confusion(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """True labels, predicted labels and counts of the nonzero entries of the confusion matrix."""
        labels = {one.name: label for label, one in enumerate(self.per_class)}
        cells = [(labels[one.name], labels[one.name], one.correct) for one in self.per_class if one.correct]
        for one in self.per_class:
            cells += [(labels[one.name], labels[name], count) for name, count in one.taken_for.items()]
        of_true, of_predicted, counts = np.array(cells, np.int64).reshape(-1, 3).T
        return of_true, of_predicted, counts

    @property
    def scores(self) -> dict[str, ClassScores]:
        """Precision, recall and F1 of each class, by its name."""
        predicted_as = Counter({one.name: one.correct for one in self.per_class})
        for one in self.per_class:
            predicted_as.update(one.taken_for)
        return {
            one.name: ClassScores(
                precision=_divide(one.correct, predicted_as[one.name]),
                recall=_divide(one.correct, one.total),
                f1=_divide(2 * one.correct, one.total + predicted_as[one.name]),
            )
            for one in self.per_class
        }

    @property
    def chance(self) -> float:
        """The accuracy of always predicting the most frequent class."""
        return max(one.total for one in self.per_class) / self.total

    @property
    def listed(self) -> list[ClassResult]:
        """The classes that a list shows: all, or, if there are many, those with the lowest accuracy."""
        if len(self.per_class) <= MOST_CLASSES:
            return self.per_class
        seen = [one for one in self.per_class if one.total]
        return sorted(seen, key=lambda one: (one.correct / one.total, -one.total))[:_MOST_LISTED]

    @property
    def most_confused(self) -> list[tuple[str, str, int]]:
        """Name of the true class, name of the predicted class, and number of images; most frequent first."""
        pairs = [(one.name, name, count) for one in self.per_class for name, count in one.taken_for.items()]
        return sorted(pairs, key=lambda pair: -pair[2])[:_MOST_LISTED]

    @property
    def details(self) -> list[str]:
        """What the accuracy leaves out: the top k, if there are enough classes, and the calibration, if measured."""
        top = [f"top {self.top_k}: {self.top_k_correct} of {self.total}"] if self.top_k > 1 else []
        return top if math.isnan(self.calibration_error) else [*top, f"calibration error {self.calibration_error:.3f}"]

    def __str__(self) -> str:
        return f"loss: {format_loss(self.loss)} - {describe_accuracy(self.correct, self.total)}"


def _divide(count: int, total: int) -> float:
    return count / total if total else math.nan


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval (Wilson 1927) of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def average_last(history: Sequence[Metrics], total: int) -> LateEpochs:
    """Average validation over the last three epochs, or over fewer if those before did not lead to the weights.

    Args:
        history: one row of metrics for each epoch that led to the last weights.
        total: number of validation images.
    """
    end = history[-1]["epoch"]
    last = [row for row in history[-_LATE_EPOCHS:] if row["epoch"] > end - _LATE_EPOCHS]
    loss, accuracy = (float(np.mean([row[name] for row in last])) for name in ("val_loss", "val_accuracy"))
    interval = accuracy_interval(round(accuracy * total), total)
    return LateEpochs(epochs=len(last), loss=loss, accuracy=accuracy, accuracy_interval=interval)


def describe_accuracy(correct: int, total: int) -> str:
    """Return the form in which every accuracy is shown."""
    low, high = accuracy_interval(correct, total)
    return f"accuracy: {correct / total:.4f} ({correct} of {total}, 95% interval {low:.3f}-{high:.3f})"


def summarise(split: str, predictions: pa.Table, class_names: list[str]) -> EvaluationResult:
    """Evaluate a table of predictions, as `predictions_table` makes it."""
    labels, predicted = predictions["label"].to_numpy(), predictions["predicted"].to_numpy()
    correct, total = int(np.sum(labels == predicted)), len(labels)
    pairs, counts = np.unique(labels.astype(np.int64) * len(class_names) + predicted, return_counts=True)
    per_class = _count_by_class(class_names, *np.divmod(pairs, len(class_names)), counts)
    top_k = max(1, min(5, len(class_names) // 2))
    return EvaluationResult(
        split=split,
        loss=float(np.mean(predictions["loss"].to_numpy(), dtype=np.float64)),
        correct=correct,
        total=total,
        accuracy=correct / total,
        accuracy_interval=accuracy_interval(correct, total),
        top_k=top_k,
        top_k_correct=int(np.sum(predictions["likelier"].to_numpy() < top_k)),
        calibration_error=_calibration_error(predictions["confidence"].to_numpy(), labels == predicted),
        per_class=per_class,
    )


def find_mistakes(predictions: pa.Table, most: int | None = _MOST_MISTAKES) -> npt.NDArray[np.int64]:
    """Return the rows of the wrong predictions with the highest loss, worst first: ``most`` of them, or all if None."""
    wrong = np.flatnonzero(predictions["label"].to_numpy() != predictions["predicted"].to_numpy())
    losses = predictions["loss"].to_numpy()[wrong]
    return wrong[np.argsort(-losses, kind="stable")][:most]


def _count_by_class(
    class_names: list[str], labels: npt.NDArray[Any], predicted: npt.NDArray[Any], counts: npt.NDArray[Any]
) -> list[ClassResult]:
    """Return one result per class from entries of the confusion matrix, each given at most once."""
    totals = np.bincount(labels, counts, len(class_names))
    correct = [0] * len(class_names)
    taken_for: list[dict[str, int]] = [{} for _ in class_names]
    for cell in np.argsort(-counts, kind="stable"):
        label, other, count = int(labels[cell]), int(predicted[cell]), int(counts[cell])
        if label == other:
            correct[label] = count
        else:
            taken_for[label][class_names[other]] = count
    return [
        ClassResult(name=name, correct=correct[label], total=int(totals[label]), taken_for=taken_for[label])
        for label, name in enumerate(class_names)
    ]


def _calibration_error(confidence: npt.NDArray[np.float32], is_correct: npt.NDArray[np.bool_]) -> float:
    """Return the mean over all rows of the gap between accuracy and mean confidence in their bin of confidence."""
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(np.int64), _CALIBRATION_BINS - 1)
    excess = np.bincount(bins, weights=is_correct - confidence.astype(np.float64), minlength=_CALIBRATION_BINS)
    return float(np.abs(excess).sum() / len(confidence))
