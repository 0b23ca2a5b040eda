"""Whether one run is better than another, as far as the validation images can tell."""

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from trainer.runtime.markdown import format_count

# A difference that is rarer than this by chance counts.
_SIGNIFICANCE = 0.05


class Comparison(BaseModel):
    """An exact paired test of two runs on the same images."""

    model_config = ConfigDict(frozen=True)

    first_only: int
    """Images that only the first run classified correctly."""
    second_only: int
    """Images that only the second run classified correctly."""
    total: int
    p_value: float

    @property
    def is_distinguishable(self) -> bool:
        """Whether the difference is more than chance."""
        return self.p_value < _SIGNIFICANCE

    def describe(self, first: str, second: str) -> str:
        """Return the verdict in words, given the names of the runs."""
        counts = (
            f"correct only in {first}: {self.first_only}, only in {second}: {self.second_only}; p = {self.p_value:.2g}"
        )
        images = format_count(self.total, "image")
        if not self.is_distinguishable:
            return f"{first} and {second} are not distinguishable on {images} ({counts})"
        better, worse = (first, second) if self.first_only > self.second_only else (second, first)
        return f"{better} is better than {worse} on {images} ({counts})"


def compare_predictions(first: pa.Table, second: pa.Table) -> Comparison:
    """Apply the exact test of McNemar (1947) to two runs' predictions of the same images in the same order.

    Only images that exactly one of the runs classified correctly count: if the runs were equally good, each such image
    would be as likely to be on either side.

    Args:
        first: columns label and predicted of one run.
        second: the same columns of the other run, in the same order.
    """
    from scipy.stats import binomtest

    right, other_right = (np.asarray(table["label"]) == np.asarray(table["predicted"]) for table in (first, second))
    first_only, second_only = int(np.sum(right & ~other_right)), int(np.sum(other_right & ~right))
    discordant = first_only + second_only
    p_value = float(binomtest(first_only, discordant).pvalue) if discordant else 1.0
    return Comparison(first_only=first_only, second_only=second_only, total=len(right), p_value=p_value)
