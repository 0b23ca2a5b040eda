"""Networks that take seconds to build: published ones, and a few steps of each deep family."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.architectures import build_model, count_parameters

TINY = {
    "vgg19": {"filters": (8, 8, 16, 16, 16), "dense_units": 32, "dropout": 0.0},
    "inception_notes": {"width": 0.25},
    "googlenet": {"width": 0.125, "dropout": 0.0},
    "resnet18": {"width": 0.125},
}


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("resnet50", 25_636_712),
        # Without the moving averages of BatchNorm, which PyTorch does not count: 21,797,672.
        ("resnet34", 21_797_672 + 17_024),
    ],
)
def test_the_number_of_parameters_is_the_published_one(arch, parameters):
    assert count_parameters(arch, 224, 3, 1000) == parameters


@pytest.mark.parametrize(
    ("arch", "published"),
    [
        ("vgg16", keras.applications.VGG16),
        ("vgg19", keras.applications.VGG19),
        ("resnet50", keras.applications.ResNet50),
    ],
)
def test_layers_have_the_names_and_shapes_of_the_published_weight_files(arch, published):
    def shapes(model) -> dict[str, list]:
        of_layer = {layer.name: [tuple(weight.shape) for weight in layer.weights] for layer in model.layers}
        return {name.replace("predictions", "logits"): shapes for name, shapes in of_layer.items() if shapes}

    with tf.Graph().as_default():
        assert shapes(build_model(arch, 224, 3, 1000)) == shapes(published(weights=None))


@pytest.mark.parametrize("arch", TINY)
def test_the_loss_falls_on_one_batch(arch):
    keras.utils.set_random_seed(0)
    model = build_model(arch, 32, 1, 3, TINY[arch])
    images = np.random.default_rng(0).normal(size=(6, 32, 32, 1)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2])
    optimizer = keras.optimizers.Adam(0.003, jit_compile=False)
    optimizer.build(model.trainable_variables)

    @tf.function
    def train_step():
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    losses = [float(train_step()) for _ in range(30)]
    assert min(losses) < 0.7 * losses[0]
