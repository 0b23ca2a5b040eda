import math

import numpy as np
import pytest

from benchmarks.curve import Curve, find_difference, format_correct, is_correct, split_in_halves


def make_curve(
    correct: list[np.ndarray], seconds: list[float] | None = None, losses: list[float] | None = None
) -> Curve:
    """Return a curve of given correct answers; label 1, a wrong answer is 0."""
    shape = len(correct), len(correct[0]) if correct else 10
    return Curve(
        labels=np.ones(shape[1], np.int64),
        seconds=np.array(seconds or range(1, shape[0] + 1), np.float64),
        predicted=np.array(correct, np.int64).reshape(shape),
        losses=np.repeat(np.array(losses or [1.0] * shape[0])[:, None], shape[1], axis=1),
    )


def test_the_halves_are_random_equal_and_always_the_same():
    half = split_in_halves(101)
    assert (half.sum(), len(half)) == (50, 101)
    assert 10 < half[:50].sum() < 40
    np.testing.assert_array_equal(half, split_in_halves(101))


def test_an_epoch_is_counted_on_the_half_that_did_not_choose_it():
    half = split_in_halves(10)
    # The first epoch is right on one half only, the second on the other: each half chooses the epoch that fails on the
    # other one.
    curve = make_curve([half, ~half])
    assert is_correct(curve.best).sum() == 0


def test_a_jump_on_a_few_images_that_chooses_the_epoch_does_not_count():
    rng = np.random.default_rng(1)
    guesses = [rng.random(1000) < 0.5 for _ in range(50)]
    best = is_correct(make_curve(guesses).best).mean()
    assert max(guess.mean() for guess in guesses) > 0.53
    assert abs(best - 0.5) < 0.03


def test_of_two_equal_epochs_the_one_with_the_lower_loss_is_best():
    right, wrong = np.arange(10) < 5, np.arange(10) >= 5
    half = split_in_halves(10)
    # Balanced within both halves, so that accuracy does not choose.
    right[half], wrong[half] = np.arange(5) < 2, np.arange(5) >= 3
    right[~half], wrong[~half] = np.arange(5) < 2, np.arange(5) >= 3
    np.testing.assert_array_equal(is_correct(make_curve([right, wrong], losses=[2.0, 1.0]).best), wrong)
    np.testing.assert_array_equal(is_correct(make_curve([right, wrong], losses=[1.0, 2.0]).best), right)


def test_at_equal_seconds_later_epochs_do_not_count():
    none, some, all_right = np.arange(10) < 0, np.arange(10) < 4, np.arange(10) < 10
    curve = make_curve([none, some, all_right], seconds=[1.0, 2.5, 4.0])
    assert is_correct(curve.until(2.5).best).sum() == 4
    assert is_correct(curve.until(3.9).best).sum() == 4
    assert is_correct(curve.until(4.0).best).sum() == 10
    assert is_correct(curve.until(0.5).best).sum() == 0
    assert is_correct(curve.last).sum() == 10


def test_seconds_to_an_accuracy_are_those_of_the_first_epoch_that_has_it():
    curve = make_curve([np.arange(10) < count for count in (2, 7, 5, 9)], seconds=[3.0, 6.0, 9.0, 12.0])
    assert [curve.seconds_to(accuracy) for accuracy in (0.2, 0.5, 0.7, 0.9, 0.95)] == [3.0, 6.0, 6.0, 12.0, math.inf]


def test_one_seed_differs_as_far_as_images_tell():
    first, second = np.arange(100) < 60, np.arange(100) < 50
    mean, low, high = find_difference(first[None], second[None])
    # Ten ones and ninety zeros: standard deviation 0.3015, standard error 0.03015, and t(99) is 1.9842.
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - 0.05983, 0.1 + 0.05983), abs=1e-4)


def test_seeds_that_differ_widen_the_interval():
    second = np.zeros((2, 100), bool)
    first = np.stack([np.arange(100) < 60, np.arange(100) < 40])
    mean, low, high = find_difference(first, second)
    # Over images: 40 ones, 20 halves, 40 zeros. Over seeds: 0.6 and 0.4, standard error 0.1, and t(1) is 12.706.
    images = 1.9842 * math.sqrt((40 * 0.25 + 40 * 0.25) / 99 / 100)
    assert (mean, high - mean) == pytest.approx((0.5, math.hypot(images, 1.2706)), abs=1e-3)
    assert mean - low == pytest.approx(high - mean)


def test_correct_answers_are_shown_with_their_interval():
    assert format_correct(make_curve([np.arange(66) < 49]).last) == "49 of 66 [0.626-0.833]"
