"""Networks that take seconds to build: published ones, and a few steps of each deep family."""

import contextlib
import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.architectures import ARCHITECTURES, build_model

TINY = {
    "vgg19": {"filters": (8, 8, 16, 16, 16), "dense_units": 32, "dropout": 0.0},
    "inception_notes": {"width": 0.25},
    "googlenet": {"width": 0.125, "dropout": 0.0},
    "resnet18": {"width": 0.125},
}

COMPARED = ("filters", "kernel_size", "pool_size", "strides", "padding", "use_bias", "activation", "epsilon", "scale")


def describe_network(model) -> list[tuple]:
    """Returns of each layer, in their order, what it computes, from which layers, its name and its weights."""
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.Dropout)]
    places = {layer.name: place for place, layer in enumerate(layers)}
    described = []
    for layer in layers:
        config = layer.get_config()
        inputs = [parent.layer.name for node in layer.inbound_nodes for parent in node.parent_nodes]
        computes = {name: config[name] for name in COMPARED if name in config}
        shapes = [tuple(weight.shape) for weight in layer.weights]
        name = layer.name.replace("predictions", "logits") if shapes else ""
        described.append((type(layer).__name__, computes, [places.get(one) for one in inputs], name, shapes))
    return described


def number_from_one(name: str) -> str:
    """Returns the name of a layer of Keras; those without a name are numbered from 0, in the weight files from 1."""
    numbered = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?", name)
    return f"{numbered[1]}_{int(numbered[2] or 0) + 1}" if numbered else name


@pytest.mark.parametrize(
    ("arch", "name", "image_size"),
    [
        ("vgg16", "VGG16", 224),
        ("vgg19", "VGG19", 224),
        ("resnet50", "ResNet50", 224),
        ("inception_v3", "InceptionV3", 299),
        ("xception", "Xception", 299),
    ],
)
def test_the_network_is_that_of_the_published_weight_files(arch, name, image_size):
    # A VGG is half a gigabyte. The others are built in half the time where a variable is no part of a graph.
    with tf.Graph().as_default() if arch.startswith("vgg") else contextlib.nullcontext():
        model = build_model(arch, image_size, 3, 1000)
        own = describe_network(model)
        keras.backend.reset_uids()
        published = describe_network(getattr(keras.applications, name)(weights=None, classifier_activation=None))
    published = [(*computes, number_from_one(name), shapes) for *computes, name, shapes in published]
    # The order counts, too: by it Keras reads such a file. VGG and ResNet say the same in other words, such as "same"
    # padding of a 1x1 convolution.
    weighted = [[layer for layer in layers if layer[-1]] for layers in (own, published)]
    assert [layer[-2:] for layer in weighted[0]] == [layer[-2:] for layer in weighted[1]]
    if arch in ("inception_v3", "xception"):
        assert own == published
    if arch == "resnet50":
        assert model.count_params() == ARCHITECTURES[arch].parameters[-1]


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
