import numpy as np
import pytest
import tensorflow as tf

from trainer.record.checkpoint import read_variables
from trainer.training.batch_norm import compile_estimate, count_estimate_steps, find_idle_biases
from trainer.training.network import build_network
from trainer.training.noise import compile_noise
from trainer.training.scaling import build_scaling
from trainer.training.step import compile_train_step

SIZE, BATCH = 22, 32
NETWORK = {"first_filters": 3, "later_filters": [4], "dense_units": 8, "batch_norm": True}


@pytest.fixture
def manifest(write_dataset):
    return write_dataset(rows=(BATCH, 1, 1), image_size=SIZE).manifest


@pytest.fixture
def build(manifest, make_config):
    """Return a function that builds a network that trains on rotated images, its config and its training step."""

    def build(**values):
        config = make_config(
            **{"global_batch_size": BATCH, "arch_arguments": NETWORK, "augment_rotation": 45.0, **values}
        )
        network = build_network(manifest, config, steps_per_epoch=10)
        return config, network, compile_train_step(network, manifest, config)

    return build


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (BATCH, SIZE, SIZE, 1), np.uint8)


def statistics_of_first_convolution(network, manifest, config, batches: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    scale_pixels, convolve = build_scaling(manifest, config), network.model.get_layer("conv1")
    outputs = [convolve(scale_pixels(batch.astype(np.float32))).numpy() for batch in batches]
    # What BatchNorm averages are the means and the variances of the batches.
    moments = [(one.mean(axis=(0, 1, 2)), one.var(axis=(0, 1, 2))) for one in outputs]
    return tuple(np.mean(one, axis=0) for one in zip(*moments, strict=True))


def test_validation_uses_the_averages_of_images_as_they_are(build, manifest):
    config, network, train_step = build()
    for step in range(30):
        train_step(tf.constant(noise(step)), tf.constant(np.zeros(BATCH, np.int32)))
    batches = [noise(seed) for seed in (100, 101, 102)]
    mean, variance = statistics_of_first_convolution(network, manifest, config, batches)
    layer = network.model.get_layer("conv1_bn")
    # Interpolated noise varies less: averages of training are far from what validation sees.
    assert not np.allclose(layer.moving_variance, variance, rtol=0.2)
    estimate = compile_estimate(network, manifest, config)
    for number, images in enumerate(batches):
        estimate(tf.constant(images), number)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-4)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-3, atol=1e-5)


def test_an_estimate_changes_nothing_that_is_trained_and_leaves_training_its_momentum(build, manifest):
    config, network, train_step = build(seed=3)
    estimate = compile_estimate(network, manifest, config)
    before = {name: value for name, value in read_variables(network.model.variables).items() if "moving" not in name}
    estimate(tf.constant(noise(1)), 0)
    after = read_variables(network.model.variables)
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert network.model.get_layer("conv1_bn").momentum == 0.9
    assert network.optimizer.iterations.numpy() == 0
    train_step(tf.constant(noise(2)), tf.constant(np.zeros(BATCH, np.int32)))


def test_dropout_is_that_of_training_whatever_measured_the_noise_before(build, manifest):
    config, network, train_step = build(arch_arguments={**NETWORK, "dropout": 0.5})
    batch = tf.constant(noise(1)), tf.constant(np.zeros(BATCH, np.int32))
    compile_noise(network, manifest, config)(*batch)
    compile_estimate(network, manifest, config)(batch[0], 0)
    train_step(*batch)


def test_a_network_without_averages_to_learn_has_no_estimate(build, manifest):
    config, network, _ = build(arch_arguments={**NETWORK, "batch_norm": False})
    assert compile_estimate(network, manifest, config) is None
    config, network, _ = build(freeze_trunk=True)
    assert compile_estimate(network, manifest, config) is None


@pytest.mark.parametrize(
    ("rows", "batch", "steps"),
    [(2747, 32, 16), (1442, 32, 12), (800, 64, 4), (200, 64, 2), (100, 32, 3), (60_000, 8192, 1), (30, 32, 0)],
)
def test_an_estimate_takes_a_quarter_of_the_images_from_128_to_512_or_all(rows, batch, steps):
    assert count_estimate_steps(rows, batch) == steps


def test_biases_in_front_of_batch_norm_have_no_gradient_and_are_validated_with(manifest, make_config):
    arguments = {"width": 0.125, "blocks": [1, 1, 1, 1]}
    config = make_config(arch="resnet50", arch_arguments=arguments, optimizer="adamw", global_batch_size=BATCH)
    large = manifest.model_copy(update={"image_size": 32})
    network = build_network(large, config, steps_per_epoch=10)
    idle = find_idle_biases(network.model)
    for layer in idle:
        layer.bias.assign(tf.ones_like(layer.bias))
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 1), np.uint8)
    compile_train_step(network, large, config)(tf.constant(images), tf.constant(np.zeros(BATCH, np.int32)))
    assert all(layer.use_bias and np.array_equal(layer.bias, np.ones(layer.filters)) for layer in idle)
    compile_estimate(network, large, config)(tf.constant(images), 0)
    # BatchNorm cancels the biases with the averages that were estimated with them.
    scaled = build_scaling(large, config)(images.astype(np.float32))
    with_biases = network.model(scaled, training=False).numpy()
    np.testing.assert_allclose(network.model(scaled, training=True).numpy(), with_biases, rtol=1e-3, atol=1e-3)
