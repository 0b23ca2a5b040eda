"""What a run predicted of the validation images after each epoch, and which epoch counts where epochs are chosen."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.record.checkpoint import rank_epoch
from trainer.record.evaluation_result import accuracy_interval

NO_CLASS = -1


@dataclass(frozen=True)
class Curve:
    """What one run predicted of the validation images after each of its epochs."""

    labels: npt.NDArray[np.int64]
    """[images]"""
    seconds: npt.NDArray[np.float64]
    """[epochs], since the shell."""
    predicted: npt.NDArray[np.int64]
    """[epochs, images]"""
    losses: npt.NDArray[np.float64]
    """[epochs, images], in nats."""

    def until(self, seconds: float) -> "Curve":
        """Return the epochs that had ended by then."""
        count = int(np.sum(self.seconds <= seconds))
        return Curve(self.labels, self.seconds[:count], self.predicted[:count], self.losses[:count])

    @property
    def last(self) -> pa.Table:
        """Label and prediction of each image after the last epoch."""
        return _predictions(self.labels, self.predicted[-1])

    @property
    def best(self) -> pa.Table:
        """Label and prediction of each image after the best epoch, which the other half of the images chose.

        Without epochs nothing is predicted, and no answer is correct.
        """
        predicted = np.full(len(self.labels), NO_CLASS)
        half = split_in_halves(len(self.labels))
        for chosen_on in (half, ~half) if len(self.seconds) else ():
            predicted[~chosen_on] = self.predicted[self._best_epoch(chosen_on)][~chosen_on]
        return _predictions(self.labels, predicted)

    def _best_epoch(self, images: npt.NDArray[np.bool_]) -> int:
        accuracies = (self.predicted == self.labels)[:, images].mean(axis=1)
        losses = self.losses[:, images].mean(axis=1)
        rows = [
            {"epoch": epoch, "val_accuracy": accuracy, "val_loss": loss}
            for epoch, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True))
        ]
        return int(max(rows, key=rank_epoch)["epoch"])

    def seconds_to(self, accuracy: float) -> float:
        """Return when an epoch first reached an accuracy on all images; infinite if none did."""
        reached = (self.predicted == self.labels).mean(axis=1) >= accuracy
        return float(self.seconds[reached][0]) if reached.any() else math.inf


def split_in_halves(count: int) -> npt.NDArray[np.bool_]:
    """Return which of the images are in the first half: the same for every run on a dataset."""
    half = np.zeros(count, np.bool_)
    half[np.random.default_rng(0).permutation(count)[: count // 2]] = True
    return half


def _predictions(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> pa.Table:
    return pa.table({"label": labels, "predicted": predicted})


def is_correct(predictions: pa.Table) -> npt.NDArray[np.bool_]:
    """Return whether the prediction of each image is correct."""
    correct: npt.NDArray[np.bool_] = predictions["label"].to_numpy() == predictions["predicted"].to_numpy()
    return correct


def find_difference(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return the mean difference of two accuracies and its 95% interval, over images and seeds.

    The variances of the means over images and over seeds are added, which counts the images' share in the latter twice:
    a cautious interval. Of one seed there is the one over images alone.

    Args:
        first: [seeds, images], whether the answer is correct.
        second: the same of the other side; the difference is first - second.
    """
    from scipy.stats import t

    difference = first.astype(float) - second
    half_widths = [0.0]
    for means in (difference.mean(axis=0), difference.mean(axis=1)):
        if len(means) > 1:
            error = means.std(ddof=1) / math.sqrt(len(means))
            half_widths.append(float(t.ppf(0.975, len(means) - 1) * error))
    mean, half_width = float(difference.mean()), math.hypot(*half_widths)
    return mean, mean - half_width, mean + half_width


def format_correct(predictions: pa.Table) -> str:
    """Return how many answers are correct, with the 95% interval of their share."""
    correct = is_correct(predictions)
    low, high = accuracy_interval(count := int(correct.sum()), len(correct))
    return f"{count} of {len(correct)} [{low:.3f}-{high:.3f}]"
