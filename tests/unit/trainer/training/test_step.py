from dataclasses import dataclass

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.config.config import TrainConfig
from trainer.record.checkpoint import read_variables
from trainer.training.evaluation import COLUMNS
from trainer.training.mixing import mix
from trainer.training.network import Network, averaged_weights, build_network
from trainer.training.scaling import build_scaling
from trainer.training.step import (
    STEP_ACCURACY,
    STEP_CLIPPED,
    STEP_GRAD_NORM,
    STEP_LOSS,
    build_gradients,
    compile_eval_step,
    compile_gather,
    compile_train_step,
    sum_over_workers,
)

SIZE, ROWS = 22, 6
NETWORK = {"first_filters": 3, "later_filters": [4], "dense_units": 8}


def base_rate(peak: float) -> float:
    """The base learning rate that is scaled to a peak at a batch of ROWS."""
    return peak * (256 / ROWS) ** 0.5


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.mixed_precision.set_global_policy("float32")


NO_NESTEROV = {"nesterov": False}


@pytest.fixture
def manifest(write_dataset):
    return write_dataset(rows=(ROWS, 1, 1), image_size=SIZE).manifest


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (ROWS, SIZE, SIZE, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2], np.int32)


@dataclass
class Started:
    config: TrainConfig
    network: Network
    train_step: object

    def train(self, batch, steps: int = 1) -> np.ndarray:
        """Take steps on one batch and return what each returned, [steps, 5]."""
        return np.stack([self.train_step(*map(tf.constant, batch)).numpy() for _ in range(steps)])

    def weights(self) -> dict[str, np.ndarray]:
        return read_variables(self.network.model.variables)


@pytest.fixture
def start(make_config, manifest):
    """Return a function that builds a network and its step from the fields that a test is about."""

    def start(**values) -> Started:
        base = {"global_batch_size": ROWS, "schedule": "constant", "warmup_epochs": 0, "arch_arguments": NETWORK}
        config = make_config(**{**base, "base_learning_rate": base_rate(0.01), **values})
        network = build_network(manifest, config, steps_per_epoch=10)
        return Started(config, network, compile_train_step(network, manifest, config))

    return start


def logits_of(started: Started, manifest, images: np.ndarray) -> np.ndarray:
    scaled = build_scaling(manifest, started.config)(images.astype(np.float32))
    return started.network.model(scaled, training=False).numpy().astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_step_returns_plain_loss_and_accuracy_before_its_update(start, manifest, batch, label_smoothing):
    started = start(label_smoothing=label_smoothing)
    logits = logits_of(started, manifest, batch[0])
    told = started.train(batch)[0]
    assert told[STEP_LOSS] == pytest.approx(-log_softmax(logits)[np.arange(ROWS), batch[1]].mean(), rel=1e-4)
    assert told[STEP_ACCURACY] == pytest.approx((logits.argmax(axis=1) == batch[1]).mean())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_loss_of_mixed_images_is_of_all_that_they_show_and_the_larger_part_is_what_is_correct(
    start, manifest, batch, kind
):
    started = start(**{"augment_" + kind: 1.0})
    strengths = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}
    images, targets = mix(
        *(tf.constant(batch[0], tf.float32), tf.one_hot(batch[1], 3), tf.constant(0, tf.int64)),
        *(tf.constant(strengths["mixup"]), tf.constant(strengths["cutmix"]), started.config),
    )
    targets = targets.numpy()
    assert ((targets > 0).sum(axis=1) == 2).any()
    logits = logits_of(started, manifest, images.numpy())
    told = started.train(batch)[0]
    assert told[STEP_LOSS] == pytest.approx(-(targets * log_softmax(logits)).sum(axis=1).mean(), rel=1e-4)
    assert told[STEP_ACCURACY] == pytest.approx((logits.argmax(axis=1) == targets.argmax(axis=1)).mean())


def test_a_mixture_weighs_each_class_by_its_own_rarity(start, manifest, batch):
    manifest.splits["train"].rows_per_class[:] = [30, 20, 10]
    started = start(class_weights="balanced", label_smoothing=0.1)
    gradients_of = build_gradients(started.network, manifest, started.config)
    images = tf.constant(batch[0], tf.float32)

    def gradients(shown: list[float]) -> np.ndarray:
        of_variables, _ = tf.function(gradients_of)(images, tf.constant([shown] * ROWS, tf.float32), [])
        return np.concatenate([one.numpy().ravel() for one in of_variables])

    mixture = gradients([0.25, 0, 0.75])
    np.testing.assert_allclose(mixture, 0.25 * gradients([1, 0, 0]) + 0.75 * gradients([0, 0, 1]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_a_step_goes_down_the_gradient_of_the_mean_loss(start, manifest, batch, label_smoothing):
    started = start(optimizer="sgd", momentum=0.0, optimizer_arguments=NO_NESTEROV, label_smoothing=label_smoothing)
    before, model = started.weights(), started.network.model
    scaled = build_scaling(manifest, started.config)(batch[0].astype(np.float32))
    # A part of each target is spread evenly over the three classes.
    targets = np.eye(3, dtype=np.float32)[batch[1]] * (1 - label_smoothing) + label_smoothing / 3
    with tf.GradientTape() as tape:
        logits = model(scaled, training=True)
        loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
    gradients = [gradient.numpy() for gradient in tape.gradient(loss, model.trainable_variables)]
    told, after = started.train(batch)[0], started.weights()
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        np.testing.assert_allclose(after[variable.name], before[variable.name] - 0.01 * gradient, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients))
    assert told[STEP_GRAD_NORM] == pytest.approx(norm, rel=1e-4)
    assert told[STEP_CLIPPED] == 0


def test_balanced_classes_weigh_their_images_by_rarity(write_dataset, make_config, batch):
    manifest = write_dataset(rows=(60, 1, 1), image_size=SIZE).manifest
    manifest.splits["train"].rows_per_class[:] = [30, 20, 10]
    labels = np.array([0, 0, 0, 1, 1, 2], np.int32)

    def update(**values) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        options = {
            "optimizer": "sgd",
            "momentum": 0.0,
            "optimizer_arguments": NO_NESTEROV,
            "schedule": "constant",
            "warmup_epochs": 0,
        }
        config = make_config(global_batch_size=ROWS, arch_arguments=NETWORK, **options, **values)
        network = build_network(manifest, config, steps_per_epoch=10)
        before = read_variables(network.model.variables)
        scaled = build_scaling(manifest, config)(batch[0].astype(np.float32))
        with tf.GradientTape() as tape:
            logits = network.model(scaled, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            # 60 images of 3 classes: 20 of each would weigh 1.
            loss = tf.reduce_mean(losses * np.float32([20 / 30] * 3 + [1] * 2 + [2]))
        gradients = tape.gradient(loss, network.model.trainable_variables)
        rate = config.peak_learning_rate
        expected = {
            variable.name: before[variable.name] - rate * gradient.numpy()
            for variable, gradient in zip(network.model.trainable_variables, gradients, strict=True)
        }
        compile_train_step(network, manifest, config)(tf.constant(batch[0]), tf.constant(labels))
        return expected, read_variables(network.model.variables)

    expected, updated = update(class_weights="balanced")
    for name, array in expected.items():
        np.testing.assert_allclose(updated[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    assert any(np.abs(plain - updated[name]).max() > 1e-4 for name, plain in update()[1].items())


def test_averages_follow_the_weights_and_are_exchanged_with_them(start, batch):
    started = start(ema_momentum=0.24)
    average = started.weights()
    # An average of a few steps while there were only a few.
    for momentum in (1 / 10, 2 / 11, 0.24):
        started.train(batch)
        average = {name: momentum * average[name] + (1 - momentum) * array for name, array in started.weights().items()}
    trained = started.weights()
    with averaged_weights(started.network):
        for name, array in started.weights().items():
            np.testing.assert_allclose(array, average[name], rtol=1e-5, atol=1e-7, err_msg=name)
    for name, array in started.weights().items():
        np.testing.assert_array_equal(array, trained[name])


def test_without_averages_nothing_is_exchanged(start, batch):
    started = start()
    started.train(batch)
    before = started.weights()
    with averaged_weights(started.network):
        for name, array in started.weights().items():
            np.testing.assert_array_equal(array, before[name])


def test_an_error_leaves_the_weights_that_are_trained(start, batch):
    started = start(ema_momentum=0.75)
    started.train(batch)
    trained = started.weights()
    with pytest.raises(ValueError, match="stop"), averaged_weights(started.network):
        raise ValueError("stop")
    for name, array in started.weights().items():
        np.testing.assert_array_equal(array, trained[name])


def test_a_gradient_that_is_too_long_is_cut_to_the_norm_and_that_is_reported(start, batch):
    started = start(optimizer="sgd", momentum=0.0, optimizer_arguments=NO_NESTEROV, clip_norm=1e-3)
    before = started.weights()
    told, after = started.train(batch)[0], started.weights()
    moved = np.sqrt(sum(((after[name] - before[name]).astype(np.float64) ** 2).sum() for name in before))
    assert told[STEP_GRAD_NORM] > 1e-3
    assert told[STEP_CLIPPED] == 1
    assert moved == pytest.approx(0.01 * 1e-3, rel=0.01)


def test_a_gradient_that_is_short_enough_is_left_alone(start, batch):
    plain, clipping = start(), start(clip_norm=1e3)
    np.testing.assert_array_equal(clipping.train(batch), plain.train(batch))
    for name, value in plain.weights().items():
        np.testing.assert_allclose(clipping.weights()[name], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("sgd", "float32"),
        ("adam", "float32"),
        ("nadam", "float32"),
        ("adamw", "mixed_bfloat16"),
        ("adamw", "mixed_float16"),
    ],
)
def test_the_network_learns_a_batch_by_heart(start, batch, optimizer, precision):
    started = start(optimizer=optimizer, precision=precision)
    losses = started.train(batch, steps=30)[:, STEP_LOSS]
    assert losses[-1] < 0.3 * losses[0]


def test_adam_with_decay_is_adamw_by_another_name(start, batch):
    adam, adamw = (start(optimizer=optimizer, weight_decay=0.1) for optimizer in ("adam", "adamw"))
    np.testing.assert_array_equal(adam.train(batch, steps=3), adamw.train(batch, steps=3))


def test_the_optimizer_follows_the_schedule(start, batch):
    started = start(schedule="cosine", epochs=1)
    rates = []
    for _ in range(3):
        started.train(batch)
        rates.append(float(started.network.optimizer.learning_rate.numpy()))
    assert rates == pytest.approx([0.01 * (1 + np.cos(np.pi * step / 10)) / 2 for step in range(3)], rel=1e-4)


def test_evaluation_returns_what_the_logits_of_each_row_say(start, manifest, batch):
    started = start()
    started.train(batch, steps=3)
    images, labels = batch
    outcomes = compile_eval_step(started.network, manifest, started.config)(tf.constant(images), tf.constant(labels))
    log_scores = log_softmax(logits_of(started, manifest, images))
    true = log_scores[np.arange(ROWS), labels]
    columns = dict(zip(COLUMNS, outcomes.numpy().T, strict=True))
    np.testing.assert_allclose(columns["loss"], -true, rtol=1e-4)
    np.testing.assert_array_equal(columns["predicted"], log_scores.argmax(axis=1))
    np.testing.assert_allclose(columns["confidence"], np.exp(log_scores.max(axis=1)), rtol=1e-4)
    np.testing.assert_array_equal(columns["likelier"], (log_scores > true[:, None]).sum(axis=1))


def test_evaluation_changes_nothing_and_does_not_depend_on_the_neighbours(make_config, manifest):
    large = manifest.model_copy(update={"image_size": 67})
    config = make_config(arch="alexnet", arch_arguments={"width": 0.05, "dense_units": 8})
    network = build_network(large, config, steps_per_epoch=10)
    eval_step = compile_eval_step(network, large, config)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (4, 67, 67, 1), np.uint8), np.array([0, 1, 2, 0], np.int32)
    before = read_variables(network.model.variables)
    together = eval_step(tf.constant(images), tf.constant(labels)).numpy()
    others = np.concatenate([images[:1], 255 - images[1:]])
    np.testing.assert_allclose(eval_step(tf.constant(others), tf.constant(labels)).numpy()[0], together[0], rtol=1e-5)
    for name, value in read_variables(network.model.variables).items():
        np.testing.assert_array_equal(value, before[name])


def test_one_worker_gathers_its_own_rows(start):
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.testing.assert_array_equal(compile_gather(start().network)(values), values)


@pytest.mark.parametrize(("gradient_exchange", "rtol"), [("float32", 0), ("bfloat16", 2**-8)])
def test_gradients_come_back_in_float32_and_within_rounding_of_what_is_exchanged(make_config, gradient_exchange, rtol):
    config = make_config(num_workers=2, gradient_exchange=gradient_exchange)
    gradients = [tf.random.stateless_normal([30, 7], [1, 2]), tf.random.stateless_normal([5], [3, 4])]
    # Summed by a strategy of one replica, the gradients are their own sum.
    sums, means = sum_over_workers(gradients, tf.constant([1 / 3, 2 / 3]), config)
    for one, gradient in zip(sums, gradients, strict=True):
        assert one.dtype == tf.float32
        np.testing.assert_allclose(one, gradient, rtol=rtol)
        assert np.array_equal(one, gradient) is (gradient_exchange == "float32")
    np.testing.assert_array_equal(means, np.float32([1 / 3, 2 / 3]))
