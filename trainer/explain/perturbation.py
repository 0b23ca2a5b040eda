"""A test of whether attribution maps predict what a network does: marked cells are blanked, and random ones.

Complete and linear attribution methods can be no better than guessing at this (Bilodeau et al. 2024, "Impossibility
theorems for feature attribution"), so each method is tested for each network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.runtime.markdown import format_count

_CELLS = 8
_BLANKED_SHARE = 0.25
_RANDOM_DRAWS = 8


@dataclass(frozen=True)
class PerturbationTest:
    """The result for one method."""

    method: str
    wins: int
    """Images whose score falls more when the marked cells are blanked than when random ones are."""
    images: int
    """Images tested, without ties."""
    marked_fall: float
    """Mean fall of the class's probability when the marked cells are blanked."""
    random_fall: float
    """Mean fall of the class's probability when as many random cells are blanked."""
    p_value: float
    """Probability of at least as many wins if the marks were random: exact, one-sided."""
    threshold: float
    """The p-value below which the method passes."""

    @property
    def passed(self) -> bool:
        """Whether the maps predict the network's behavior better than chance."""
        return self.p_value < self.threshold

    def __str__(self) -> str:
        verdict = (
            "it predicts this network's behavior better than chance"
            if self.passed
            else "no better than chance here: do not read its maps as reasons"
        )
        return (
            f"{self.method}: blanking the quarter of the image that it marks lowers the class's probability by "
            f"{self.marked_fall:.3f} on average, a random quarter by {self.random_fall:.3f}; more in {self.wins} of "
            f"{format_count(self.images, 'image')} (sign test, p = {self.p_value:.2g}): {verdict}"
        )


def check_attribution(
    method: str,
    maps: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    score: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    threshold: float = 0.05,
) -> PerturbationTest:
    """Test whether blanking the cells that the maps mark lowers the scores more than blanking as many at random.

    Args:
        method: name of the method that made the maps.
        maps: float32 ``[images, height, width]``.
        images: float32 ``[images, height, width, channels]``; zero is the mean pixel.
        score: returns the score of each image, float32 ``[images]``.
        threshold: the p-value below which the method passes; smaller if several methods are tested.
    """
    from scipy.stats import binomtest

    random = np.random.default_rng(0)
    before = score(images)
    cells = _cell_of_pixel(maps.shape[1:3])
    marks = np.stack([np.bincount(cells.ravel(), one.ravel().astype(np.float64)) for one in maps])
    order = np.argsort(-marks, axis=1, kind="stable")
    blanked = round(_BLANKED_SHARE * marks.shape[1])
    marked_fall = before - score(_blank(images, cells, order[:, :blanked]))
    draws = []
    for _ in range(_RANDOM_DRAWS):
        chosen = np.stack([random.permutation(marks.shape[1])[:blanked] for _ in images])
        draws.append(before - score(_blank(images, cells, chosen)))
    random_fall = np.mean(draws, axis=0)
    wins, losses = int(np.sum(marked_fall > random_fall)), int(np.sum(marked_fall < random_fall))
    p_value = float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0
    falls = float(marked_fall.mean()), float(random_fall.mean())
    return PerturbationTest(method, wins, wins + losses, *falls, p_value, threshold)


def _cell_of_pixel(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    rows, columns = (np.arange(length) * min(_CELLS, length) // length for length in shape)
    cells: npt.NDArray[np.int64] = rows[:, None] * (columns.max() + 1) + columns
    return cells


def _blank(
    images: npt.NDArray[np.float32], cells: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    blanked = images.copy()
    for image, of_image in zip(blanked, chosen, strict=True):
        image[np.isin(cells, of_image)] = 0
    return blanked
