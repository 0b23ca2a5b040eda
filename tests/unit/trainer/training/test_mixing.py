import numpy as np
import pytest
import tensorflow as tf

from trainer.training.mixing import mix

BATCH, SIZE = 6, 16
STEPS = 200


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (BATCH, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture
def mixed(make_config):
    """Return a function that mixes the images of one optimizer step, each of which is of a class of its own."""

    def run(images: np.ndarray, step: int = 0, mixup: float = 0, cutmix: float = 0, **values):
        config = make_config(global_batch_size=len(images), **values)
        numbers = tf.constant(step, tf.int64), tf.constant(mixup, tf.float32), tf.constant(cutmix, tf.float32)
        return [one.numpy() for one in mix(tf.constant(images), tf.eye(BATCH)[: len(images)], *numbers, config)]

    return run


def test_nothing_switched_on_changes_nothing(images, mixed):
    varied, targets = mixed(images)
    np.testing.assert_array_equal(varied, images)
    np.testing.assert_array_equal(targets, np.eye(BATCH))


def test_mixup_blends_neighbors_in_the_shares_of_their_targets(images, mixed):
    for step in range(5):
        varied, targets = mixed(images, step, mixup=0.4)
        np.testing.assert_allclose(varied, np.einsum("nc,chwd->nhwd", targets, images), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
        assert (targets.argmax(axis=1) == np.arange(BATCH)).all()
        assert (np.delete(targets[0], [0, 1]) == 0).all()


def test_cutmix_takes_each_pixel_from_one_of_two_images_in_the_shares_of_their_targets(images, mixed):
    shares = []
    for step in range(5):
        varied, targets = mixed(images, step, cutmix=1)
        is_own = (varied == images).all(axis=-1)
        assert (is_own | (varied == images[[1, 0, 3, 2, 5, 4]]).all(axis=-1)).all()
        np.testing.assert_allclose(targets[range(BATCH), range(BATCH)], is_own.mean(axis=(1, 2)), rtol=1e-6)
        # What is not its own is a box.
        rows, columns = np.nonzero(~is_own[0])
        assert not is_own[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].any()
        shares.append(targets[0, 0])
    assert len(set(shares)) == len(shares)


def test_a_small_alpha_mixes_little_and_the_proportion_is_of_beta(images, mixed):
    pixels = images[:2, :2, :2]
    even, low = (np.array([mixed(pixels, step, mixup=alpha)[1][0, 0] for step in range(STEPS)]) for alpha in (1, 0.1))
    # Beta(1, 1) is uniform, and the larger of a share and the rest is uniform from 1/2 to 1.
    assert even.mean() == pytest.approx(0.75, abs=0.04)
    assert np.quantile(even, 0.1) == pytest.approx(0.55, abs=0.03)
    assert np.median(low) > 0.99


def test_an_alpha_near_zero_keeps_every_image_whole(images, mixed):
    shares = [mixed(images[:2, :2, :2], step, mixup=0.001)[1][0, 0] for step in range(50)]
    assert min(shares) > 0.95


def test_a_box_has_the_size_that_beta_says(images, mixed):
    shares = np.array([mixed(images[:2], step, cutmix=1)[1][0, 0] for step in range(STEPS)])
    # A box is cut where it reaches over the edge: E[own] = 1 - E[(s - s^2 / 4)^2] for a side s, s^2 of U(0, 1).
    sides = np.sqrt(np.linspace(0, 1, 10_001))
    assert shares.mean() == pytest.approx(1 - np.mean((sides - sides**2 / 4) ** 2), abs=0.05)


def test_where_both_are_on_each_step_takes_one(images, mixed):
    is_blended = [len(np.unique(mixed(images, step, 1, 1)[0][0] == images[0])) == 1 for step in range(40)]
    assert 8 < sum(is_blended) < 32


def test_a_step_draws_the_same_again_and_another_step_or_seed_draws_others(images, mixed):
    once = mixed(images, 7, mixup=1)[1]
    np.testing.assert_array_equal(mixed(images, 7, mixup=1)[1], once)
    assert (mixed(images, 8, mixup=1)[1] != once).any()
    assert (mixed(images, 7, mixup=1, seed=1)[1] != once).any()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_shares_of_several_workers_are_mixed_as_one_batch_and_an_image_without_a_neighbor_stays(
    images, mixed, kind
):
    whole, _ = mixed(images, 3, **{kind: 1})
    np.testing.assert_array_equal(mixed(images[:4], 3, **{kind: 1})[0], whole[:4])
    varied, targets = mixed(images[:3], 3, **{kind: 1})
    np.testing.assert_array_equal(varied[:2], whole[:2])
    np.testing.assert_allclose(varied[2], images[2], rtol=1e-6)
    np.testing.assert_allclose(targets[2], np.eye(BATCH)[2], rtol=1e-6)
