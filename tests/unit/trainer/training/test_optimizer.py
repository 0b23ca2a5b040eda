"""The optimizers update as those of Keras do, on every worker's own copy of the weights."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.training import optimizer as optimizers
from trainer.training.optimizer import build_optimizer

RATE, DECAY = 0.01, 0.1


def train(build, strategy=None) -> list[np.ndarray]:
    """Return the weights and the optimizer's state after five updates with gradients that change."""
    with (strategy or tf.distribute.get_strategy()).scope():
        kernel = tf.Variable(tf.reshape(tf.range(6.0), [2, 3]) / 3, name="kernel")
        variables = [kernel, tf.Variable([1.0, -2.0, 0.5], name="bias")]
        optimizer = build()
        optimizer.build(variables)

        @tf.function
        def step(factor):
            gradients = [factor * variable * variable - 0.3 for variable in variables]
            optimizer.apply_gradients(zip(gradients, variables, strict=True), skip_gradients_aggregation=True)

        for factor in (1.0, -2.0, 0.5, 3.0, 0.0):
            (strategy or tf.distribute.get_strategy()).run(step, args=(tf.constant(factor),))
    return [variable.numpy() for variable in [*variables, *optimizer.variables]]


def of_kernels(optimizer_class):
    """Return an optimizer of Keras that decays kernels alone."""
    optimizer = optimizer_class(RATE, weight_decay=DECAY)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ({"optimizer": "sgd", "momentum": 0.0}, lambda: keras.optimizers.SGD(RATE)),
        ({"optimizer": "sgd", "momentum": 0.9}, lambda: keras.optimizers.SGD(RATE, 0.9, nesterov=True)),
        (
            {"optimizer": "sgd", "momentum": 0.5, "optimizer_arguments": {"nesterov": False}},
            lambda: keras.optimizers.SGD(RATE, 0.5),
        ),
        ({"optimizer": "adam"}, lambda: keras.optimizers.Adam(RATE)),
        (
            {"optimizer": "adamw", "optimizer_arguments": {"beta_1": 0.5, "beta_2": 0.7, "epsilon": 0.1}},
            lambda: keras.optimizers.Adam(RATE, 0.5, 0.7, 0.1),
        ),
        ({"optimizer": "adamw", "weight_decay": DECAY}, lambda: of_kernels(keras.optimizers.Adam)),
        ({"optimizer": "sgd", "momentum": 0.0, "weight_decay": DECAY}, lambda: of_kernels(keras.optimizers.SGD)),
        ({"optimizer": "nadam"}, lambda: keras.optimizers.Nadam(RATE)),
    ],
)
@pytest.mark.parametrize("is_distributed", [False, True])
def test_an_update_is_that_of_keras(make_config, values, reference, is_distributed):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"]) if is_distributed else None
    config = make_config(**values)
    found, expected = train(lambda: build_optimizer(config, RATE), strategy), train(reference)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_gpu", [False, True], ids=["in one pass", "as XLA takes it"])
def test_decay_and_averages_are_those_of_their_formulas(make_config, monkeypatch, has_gpu):
    monkeypatch.setattr(optimizers, "has_gpu", lambda: has_gpu)
    kernel, gradient = tf.Variable([[2.0, -4.0, 0.0]]), tf.constant([[1.0, 0.5, 0.25]])
    config = make_config(optimizer="sgd", momentum=0.0, weight_decay=DECAY, ema_momentum=0.9)
    optimizer = build_optimizer(config, RATE)
    optimizer.build([kernel])
    weights = average = np.array([[2.0, -4.0, 0.0]])
    for number in range(100):
        optimizer.apply_gradients([(gradient, kernel)], skip_gradients_aggregation=True)
        weights = weights * (1 - RATE * DECAY) - RATE * gradient.numpy()
        # Of few steps as long as there were only few.
        momentum = min(0.9, (1 + number) / (10 + number))
        average = momentum * average + (1 - momentum) * weights
    np.testing.assert_allclose(kernel, weights, rtol=1e-5)
    np.testing.assert_allclose(optimizer.averages[0], average, rtol=1e-5)
