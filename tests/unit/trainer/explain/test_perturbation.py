"""The test of whether attribution maps mean anything, on a score that is known."""

import numpy as np
import pytest

from trainer.explain.perturbation import check_attribution

SIZE = 16


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images with one bright square each; maps that mark it; maps of noise."""
    random = np.random.default_rng(0)
    pixels = np.zeros((40, SIZE, SIZE, 1), np.float32)
    for image, (row, column) in zip(pixels, random.integers(0, SIZE - 4, (40, 2)), strict=True):
        image[row : row + 4, column : column + 4] = 1
    return pixels, pixels[..., 0], random.random((40, SIZE, SIZE)).astype(np.float32)


def brightness(pixels: np.ndarray) -> np.ndarray:
    return pixels.mean(axis=(1, 2, 3)) * 16


def test_maps_that_mark_what_counts_pass(samples):
    pixels, good, _ = samples
    found = check_attribution("good", good, pixels, brightness)
    assert found.passed
    assert (found.wins, found.images) == (40, 40)
    assert found.marked_fall == pytest.approx(1)
    assert found.random_fall == pytest.approx(0.25, abs=0.03)
    assert found.effect == pytest.approx(found.marked_fall - found.random_fall)
    assert 0.7 < found.effect_interval[0] < found.effect < found.effect_interval[1] < 0.8
    assert "in 40 of 40 images (sign test, p = 9.1e-13): it predicts" in str(found)


def test_maps_of_noise_do_not_pass(samples):
    pixels, _, noise = samples
    found = check_attribution("noise", noise, pixels, brightness)
    assert not found.passed
    assert found.effect_interval[0] < 0 < found.effect_interval[1]
    assert "do not read its maps as reasons" in str(found)


def test_a_large_effect_in_a_few_images_is_reported_as_that(samples):
    """Of 40 images 12 fall by 1 where they are marked; in the others a random quarter weighs a little more."""
    pixels, good, _ = samples
    decisive = np.arange(40) < 12

    away = np.where(decisive[:, None, None], good, 1 - good)
    found = check_attribution("few", away, pixels, lambda images: np.where(decisive, 1, 1e-3) * brightness(images))
    assert found.wins == 12
    assert found.passed
    assert found.p_value > 0.9
    assert f"an effect of {found.effect:.3f} (95% interval " in str(found)
    assert "in 12 of 40 images (sign test, p = 1): better than chance on average, but not in most images" in str(found)


def test_images_whose_maps_mark_nothing_do_not_count(samples):
    pixels, good, _ = samples
    some = np.where((np.arange(40) < 30)[:, None, None], good, 0)
    found, alone = (check_attribution("some", *maps, brightness) for maps in ((some, pixels), (good[:30], pixels[:30])))
    assert (found.wins, found.images, found.empty) == (30, 30, 10)
    assert found.marked_fall == pytest.approx(alone.marked_fall)
    assert str(found).endswith("; its map is empty for 10 more images, which do not count")
    nothing = check_attribution("none", 0 * good, pixels, brightness)
    assert (nothing.passed, nothing.effect, nothing.images, nothing.empty) == (False, 0, 0, 40)


def test_a_score_that_does_not_move_decides_nothing(samples):
    pixels, good, _ = samples
    found = check_attribution("good", good, pixels, lambda images: np.ones(len(images), np.float32))
    assert (found.images, found.p_value) == (0, 1.0)
    assert (found.effect_interval, found.passed) == ((0, 0), False)


def test_the_more_methods_are_tested_the_more_confident_each_must_be(samples):
    pixels, good, _ = samples
    alone, of_two = (check_attribution("good", good[:5], pixels[:5], brightness, 0.05 / count) for count in (1, 2))
    # Five wins of five: one half to the fifth power.
    assert alone.p_value == pytest.approx(1 / 32)
    assert "it predicts this network's behavior" in str(alone)
    assert "not in most images" in str(of_two)
    narrow, wide = alone.effect_interval, of_two.effect_interval
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_quarter_of_the_cells_is_blanked_with_zeros_whatever_the_size(samples):
    seen = []

    def score(images: np.ndarray) -> np.ndarray:
        seen.append(images.copy())
        return images.sum(axis=(1, 2, 3))

    images = np.ones((2, 24, 20, 3), np.float32)
    maps = np.zeros((2, 24, 20), np.float32)
    # The first image has its marks on the left, the second at the bottom.
    maps[0, :, :5], maps[1, 18:] = 1, 1
    check_attribution("marks", maps, images, score)
    before, marked, *random = seen
    assert before.all()
    np.testing.assert_array_equal(marked[0] == 0, np.broadcast_to(maps[0, ..., None] == 1, (24, 20, 3)))
    np.testing.assert_array_equal(marked[1] == 0, np.broadcast_to(maps[1, ..., None] == 1, (24, 20, 3)))
    assert len(random) == 8
    # Cells are 3 pixels high, and 2 or 3 wide: 16 of 64 cells.
    assert all(96 <= np.sum(one == 0) / 3 <= 144 for draw in random for one in draw)
    assert images.all()
