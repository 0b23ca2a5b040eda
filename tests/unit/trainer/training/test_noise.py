import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.record.checkpoint import read_variables
from trainer.training.network import build_network
from trainer.training.noise import FIRST_STEP, STEPS_BETWEEN, add_noise, compile_noise
from trainer.training.step import STEP_GRAD_NOISE, build_gradients, compile_execution

SIZE, ROWS, BATCH = 22, 20, 8
NETWORK = {"first_filters": 3, "later_filters": [4], "dense_units": 8}


@pytest.fixture
def dataset(write_dataset):
    return write_dataset(rows=(ROWS, 1, 1), image_size=SIZE)


@pytest.fixture
def build(make_config, dataset):
    """Return a function that builds a config and its network."""

    def build(manifest=dataset.manifest, **values):
        config = make_config(**{"global_batch_size": BATCH, "arch_arguments": NETWORK, **values})
        return config, build_network(manifest, config, steps_per_epoch=10)

    return build


def test_the_noise_is_that_of_the_gradients_of_single_images(build, dataset):
    batch = BATCH + 1  # of which the last image is in neither half
    config, network = build(global_batch_size=batch)
    alone, _ = build(global_batch_size=1)
    images, labels = dataset.images["train"][:batch], dataset.labels["train"][:batch]
    gradients_of = tf.function(build_gradients(network, dataset.manifest, alone))
    of_image = []
    for image, label in zip(images, labels, strict=True):
        gradients, _ = gradients_of(
            image[None].astype(np.float32), tf.one_hot(label[None], dataset.manifest.num_classes), []
        )
        of_image.append(np.concatenate([one.numpy().ravel() for one in gradients]))
    first, second = np.float64(of_image[: BATCH // 2]), np.float64(of_image[BATCH // 2 : BATCH])
    # The difference of two means of BATCH / 2 images has twice the variance of one, which is S / (BATCH / 2).
    expected = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2) * (BATCH // 2) / 2
    noise = compile_noise(network, dataset.manifest, config)(tf.constant(images), tf.constant(labels)).numpy()
    assert noise == pytest.approx(expected, rel=1e-3)


def test_both_halves_have_their_own_part_of_augmentation_and_dropout(build, dataset):
    # The same image in all rows: without random numbers of their own, the halves would be equal.
    images, labels = np.repeat(dataset.images["train"][:1], BATCH, axis=0), np.zeros(BATCH, np.int32)
    plain = build()
    assert compile_noise(plain[1], dataset.manifest, plain[0])(images, labels).numpy() == pytest.approx(0, abs=1e-9)
    for values in ({"augment_rotation": 20.0}, {"arch_arguments": {**NETWORK, "dropout": 0.3}}):
        config, network = build(**values)
        assert compile_noise(network, dataset.manifest, config)(images, labels) > 1e-6


def test_the_halves_mix_no_image_of_the_other(build, dataset):
    # Halves of three: a pair of the batch would be in both.
    batch = 6
    images = np.stack([dataset.images["train"][0]] * 3 + [dataset.images["train"][1]] * 3)
    labels = np.array([0] * 3 + [1] * 3, np.int32)
    plain, mixed = (build(global_batch_size=batch, **values) for values in ({}, {"augment_mixup": 1.0}))
    noises = [
        compile_noise(network, dataset.manifest, config)(images, labels).numpy() for config, network in (plain, mixed)
    ]
    # Within a half, the mixtures of equal images are these images.
    assert noises[1] == pytest.approx(noises[0], rel=1e-3)


def test_measuring_changes_nothing(build, dataset):
    values = {"arch_arguments": {**NETWORK, "batch_norm": True, "dropout": 0.3}}
    batch = dataset.images["train"][:BATCH], dataset.labels["train"][:BATCH]
    runs = []
    for number in (FIRST_STEP, 0):
        config, network = build(dataset.manifest, **values)
        execute = compile_execution(network, dataset.manifest, config, repeats=True)
        take = add_noise(execute, network, dataset.manifest, config)
        stats = take(*(tf.constant(np.stack([one] * 2)) for one in batch), number).numpy()
        runs.append((stats, read_variables(network.model.variables)))
    (measured, weights), (plain, plain_weights) = runs
    assert np.isfinite(measured[0, STEP_GRAD_NOISE])
    assert np.isnan([measured[1, STEP_GRAD_NOISE], *plain[:, STEP_GRAD_NOISE]]).all()
    np.testing.assert_array_equal(measured[:, :STEP_GRAD_NOISE], plain[:, :STEP_GRAD_NOISE])
    for name, array in weights.items():
        np.testing.assert_array_equal(array, plain_weights[name], err_msg=name)


def test_less_than_one_in_a_hundred_steps_is_measured_and_a_batch_of_one_never(build, dataset):
    assert STEPS_BETWEEN > 100
    config, network = build(global_batch_size=1)
    take = add_noise(lambda *_: tf.zeros([1, 5]), network, dataset.manifest, config)
    assert take(dataset.images["train"][None, :1], dataset.labels["train"][None, :1], FIRST_STEP)[0, -1] == 0


def test_another_precision_measures_about_the_same(build, dataset):
    batch = dataset.images["train"][:BATCH], dataset.labels["train"][:BATCH]
    config, network = build()
    exact = compile_noise(network, dataset.manifest, config)(*batch).numpy()
    config, network = build(precision="mixed_bfloat16")
    assert compile_noise(network, dataset.manifest, config)(*batch).numpy() == pytest.approx(exact, rel=0.1)
    keras.mixed_precision.set_global_policy("float32")
