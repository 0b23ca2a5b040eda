import math

import numpy as np
import pyarrow as pa
import pytest

from trainer.config.batch_table import ASSUMED_NOISE_SCALE
from trainer.config.config import Settings
from trainer.record.noise_scale import find_noise_scale, recall_noise_scale, remember_noise_scale, summarize_noise


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


def make_steps(noises: list[float], norms: list[float]) -> pa.Table:
    return pa.table({"grad_noise": noises, "grad_norm": norms})


def test_the_scale_of_a_run_is_that_of_its_second_half():
    # S = 8, G^2 = 1 - 8 / 16 there.
    assert summarize_noise(make_steps([100.0, np.nan, np.nan, 8.0], [9.0, 9.0, 1.0, 1.0]), 16) == 16
    # Nothing was measured in the second half: S = 8, G^2 = (9 + 9 + 1 + 1) / 4 - 8 / 16.
    steps = make_steps([8.0, np.nan, np.nan, np.nan], [3.0, 3.0, 1.0, 1.0])
    assert summarize_noise(steps, 16) == pytest.approx(8 / 4.5)


def test_a_run_that_measured_nothing_has_none():
    assert summarize_noise(make_steps([np.nan], [1.0]), 16) is None
    assert summarize_noise(pa.table({"grad_norm": [1.0]}), 16) is None


@pytest.mark.parametrize("scale", [48.5, math.inf])
def test_a_storage_remembers_the_scale_of_the_last_run_that_trained_alike(tmp_path, scale):
    settings = Settings(base_learning_rate=0.1)
    assert recall_noise_scale("alexnet", settings, "f00d", str(tmp_path)) == (ASSUMED_NOISE_SCALE, "assumed")
    for run, value in (("first", 7.0), ("second", scale)):
        values = {"run": run, "noise_scale": value, "global_batch_size": 64}
        remember_noise_scale("alexnet", settings, "f00d", str(tmp_path), **values)
    same = settings.model_copy(update={"seed": 7, "keep_best": 3})
    assert recall_noise_scale("alexnet", same, "f00d", str(tmp_path)) == (scale, "measured by second")
    other = settings.model_copy(update={"weight_decay": 0.1})
    for kind in (("vgg16", settings, "f00d"), ("alexnet", other, "f00d"), ("alexnet", settings, "beef")):
        assert recall_noise_scale(*kind, str(tmp_path)) == (ASSUMED_NOISE_SCALE, "assumed")
