import math

import numpy as np
import pytest

from trainer.record.noise_scale import find_noise_scale


def test_the_scale_is_that_of_a_gaussian_gradient_of_known_mean_and_covariance():
    random, deviations, batch = np.random.default_rng(0), np.geomspace(0.1, 3, 50), 16
    mean = random.normal(size=50)
    # [steps, images, weights]
    gradients = mean + deviations * random.normal(size=(4000, batch, 50))
    of_batch, halves = gradients.mean(axis=1), gradients.reshape(4000, 2, batch // 2, 50).mean(axis=2)
    noises = np.sum((halves[:, 0] - halves[:, 1]) ** 2, axis=1) * batch / 4
    # Most steps measure no noise.
    noises[np.arange(4000) % 4 != 1] = np.nan
    expected = np.sum(deviations**2) / np.sum(mean**2)
    assert find_noise_scale(noises, np.linalg.norm(of_batch, axis=1), batch) == pytest.approx(expected, rel=0.05)


def test_gradients_that_are_all_noise_have_an_infinite_scale():
    assert find_noise_scale(np.array([8.0]), np.array([0.5, 0.5]), 16) == math.inf


def test_nothing_measured_is_nan_and_overflows_are_left_out():
    assert math.isnan(find_noise_scale(np.array([np.nan]), np.array([1.0]), 16))
    assert math.isnan(find_noise_scale(np.array([]), np.array([]), 16))
    # S = 8, G^2 = 1 - 8 / 16.
    assert find_noise_scale(np.array([np.nan, 8.0, np.inf]), np.array([1.0, np.inf, np.nan]), 16) == 16
