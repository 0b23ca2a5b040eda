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
_BOOTSTRAP_SAMPLES = 4000

EXPLAINED = [
    "A map claims that the pixels it marks are what the network decides by. To test that, the quarter of an image that "
    "a method marks is blanked (set to the mean pixel), and, for comparison, quarters drawn at random. If the maps are "
    "right, the probability of the predicted class falls further in the first case.",
    "The effect is how much further it falls, averaged over validation images. Where its 95% interval (for all methods "
    "together) includes 0, the difference may be luck: the method fails, and its maps below are marked. The sign test "
    "asks in how many images it falls further, by however little; p is the probability of so many if the marks were "
    "random. A method can have a large effect in some images and none in most: then no single map is evidence.",
]
"""What the test means, in plain words."""


@dataclass(frozen=True)
class PerturbationTest:
    """The result for one method."""

    method: str
    effect: float
    """Mean over the images of how much further the probability falls: `marked_fall` less `random_fall`."""
    effect_interval: tuple[float, float]
    """Bootstrap interval of the effect, at 95% for all methods that are tested together."""
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
    """The p-value below which the sign test is not luck; the interval has the same confidence."""
    empty: int = 0
    """Images whose map marks nothing; they are not tested."""

    @property
    def passed(self) -> bool:
        """Whether the maps predict the network's behavior better than chance, averaged over the images."""
        return self.effect_interval[0] > 0

    def __str__(self) -> str:
        if not self.passed:
            verdict = "no better than chance here: do not read its maps as reasons"
        elif self.p_value < self.threshold:
            verdict = "it predicts this network's behavior better than chance"
        else:
            verdict = "better than chance on average, but not in most images: no single map is evidence"
        low, high = self.effect_interval
        if self.empty:
            verdict += f"; its map is empty for {format_count(self.empty, 'more image')}, which do not count"
        return (
            f"{self.method}: blanking the quarter of the image that it marks lowers the class's probability by "
            f"{self.marked_fall:.3f} on average, a random quarter by {self.random_fall:.3f}: an effect of "
            f"{self.effect:.3f} (95% interval {low:.3f} to {high:.3f}); it falls further in {self.wins} of "
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
        threshold: one less the confidence; smaller if several methods are tested.
    """
    from scipy.stats import binomtest

    random = np.random.default_rng(0)
    before = score(images)
    cells = _cell_of_pixel(maps.shape[1:3])
    marks = np.stack([np.bincount(cells.ravel(), one.ravel().astype(np.float64)) for one in maps])
    # A map that is the same everywhere has no quarter that it marks.
    tested = np.ptp(marks, axis=1) > 0
    order = np.argsort(-marks, axis=1, kind="stable")
    blanked = round(_BLANKED_SHARE * marks.shape[1])
    marked_fall = before - score(_blank(images, cells, order[:, :blanked]))
    draws = []
    for _ in range(_RANDOM_DRAWS):
        chosen = np.stack([random.permutation(marks.shape[1])[:blanked] for _ in images])
        draws.append(before - score(_blank(images, cells, chosen)))
    marked_fall, random_fall = marked_fall[tested], np.mean(draws, axis=0)[tested]
    if not len(marked_fall):
        marked_fall = random_fall = np.zeros(1)
    wins, losses = int(np.sum(marked_fall > random_fall)), int(np.sum(marked_fall < random_fall))
    p_value = float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0
    effects = (marked_fall - random_fall).astype(np.float64)
    means = random.choice(effects, (_BOOTSTRAP_SAMPLES, len(effects))).mean(axis=1)
    low, high = np.percentile(means, [50 * threshold, 100 - 50 * threshold])
    return PerturbationTest(
        method=method,
        effect=float(effects.mean()),
        effect_interval=(float(low), float(high)),
        wins=wins,
        images=wins + losses,
        marked_fall=float(marked_fall.mean()),
        random_fall=float(random_fall.mean()),
        p_value=p_value,
        threshold=threshold,
        empty=int(np.sum(~tested)),
    )


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
