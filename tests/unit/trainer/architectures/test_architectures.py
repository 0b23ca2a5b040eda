import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tests.conftest import TINY_NETWORKS
from trainer.architectures import ARCHITECTURES, build_model, family_arguments

# One of each family: their variants differ in numbers only.
FAMILIES = ["cnn_tapered", "alexnet", "vgg19", "inception_notes", "googlenet", "resnet18", "inception_v3", "xception"]


def build_tiny(arch: str, **arguments) -> keras.Model:
    """Build a network of five classes for colour images of the smallest size."""
    keras.utils.set_random_seed(0)
    return build_model(arch, ARCHITECTURES[arch].min_image_size, 3, 5, {**TINY_NETWORKS[arch], **arguments})


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request) -> tuple[str, keras.Model]:
    """An architecture and its network, which takes seconds to build; no test changes it."""
    return request.param, build_tiny(request.param, kernel_initializer="he_normal")


def count_parameters(arch: str, image_size: int, channels: int, num_classes: int) -> int:
    """Return the number of weights, trainable or not, without allocating any."""
    # In a graph of its own a variable is only a symbol: VGG19 is counted without its 558 MB.
    with tf.Graph().as_default():
        return build_model(arch, image_size, channels, num_classes).count_params()


PUBLISHED = [
    # As the notes printed them.
    ("cnn_sigmoid", 250, 1, 10, 27_734_190),
    ("cnn_softmax", 250, 1, 10, 27_734_190),
    ("cnn_deep", 250, 1, 10, 5_723_342),
    ("cnn_tapered", 250, 1, 10, 11_148_510),
    ("alexnet", 250, 1, 10, 58_304_586),
    ("vgg19", 250, 1, 10, 139_610_058),
    ("inception_notes", 250, 1, 10, 40_464_442),
    # As published.
    ("alexnet", 227, 3, 1000, 62_383_848),
    ("vgg16", 224, 3, 1000, 138_357_544),
    ("vgg19", 224, 3, 1000, 143_667_240),
    ("googlenet", 224, 3, 1000, 6_998_552),
    # Without the moving averages of BatchNorm, which PyTorch does not count: 11,689,512.
    ("resnet18", 224, 3, 1000, 11_689_512 + 9_600),
    ("resnet34", 224, 3, 1000, 21_797_672 + 17_024),
    # As Keras counts it.
    ("resnet50", 224, 3, 1000, 25_636_712),
    ("inception_v3", 299, 3, 1000, 23_851_784),
    ("xception", 299, 3, 1000, 22_910_480),
]
# Counted where they are built anyway: test_inception_v3.py, test_xception.py, tests/integration/test_architectures.py.
DEEP = ("resnet50", "inception_v3", "xception")


@pytest.mark.parametrize(
    ("arch", "image_size", "channels", "num_classes", "parameters"), [one for one in PUBLISHED if one[0] not in DEEP]
)
def test_the_number_of_parameters_is_that_of_the_source(arch, image_size, channels, num_classes, parameters):
    assert count_parameters(arch, image_size, channels, num_classes) == parameters


def test_the_parameters_that_are_listed_are_those_of_the_source():
    assert {(name, *spec.parameters) for name, spec in ARCHITECTURES.items()} <= set(PUBLISHED)


@pytest.mark.parametrize("arch", ["cnn_tapered", "vgg16", "inception_notes", "googlenet"])
def test_batch_norm_follows_every_convolution_where_it_is_asked_for(arch):
    plain = build_tiny(arch)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in plain.layers)
    names = {layer.name for layer in plain.layers if isinstance(layer, keras.layers.Conv2D)}
    model = build_tiny(arch, batch_norm=True, batch_norm_momentum=0.8)
    for name in names:
        convolution, norm = model.get_layer(name), model.get_layer(f"{name}_bn")
        assert (convolution.use_bias, convolution.activation) == (False, keras.activations.linear)
        assert norm.momentum == 0.8
        assert model.get_layer(f"{name}_relu").activation is keras.activations.relu


def test_the_initializer_is_that_of_every_kernel_but_the_last(tiny):
    *others, logits = [layer for layer in tiny[1].layers if hasattr(layer, "kernel")]
    assert all(isinstance(layer.kernel_initializer, keras.initializers.HeNormal) for layer in others)
    assert isinstance(logits.kernel_initializer, keras.initializers.GlorotUniform)


@pytest.mark.parametrize("arch", ["cnn_tapered", "inception_notes", "xception"])
def test_dropout_is_a_layer_only_where_it_is_asked_for(arch):
    def rates(model) -> list[float]:
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert rates(build_tiny(arch)) == []
    assert rates(build_tiny(arch, dropout=0.3)) == [0.3]


def test_the_smallest_image_leaves_every_layer_a_pixel(tiny):
    assert all(size >= 1 for layer in tiny[1].layers for size in layer.output_shape[1:])


@pytest.mark.parametrize("arch", ["cnn_softmax", "cnn_deep", "cnn_tapered", "alexnet", "vgg16", "inception_v3"])
def test_one_pixel_less_than_the_smallest_image_is_too_few(arch):
    with pytest.raises(ValueError):  # noqa: PT011 - Keras words it otherwise in each layer
        build_model(arch, ARCHITECTURES[arch].min_image_size - 1, 1, 3, TINY_NETWORKS[arch])


def test_every_architecture_has_a_tiny_form_here():
    assert TINY_NETWORKS.keys() == ARCHITECTURES.keys()


def test_the_last_layer_gives_logits_and_not_scores(tiny):
    _, model = tiny
    assert model.layers[-1].name == "logits"
    assert model.layers[-1].activation is keras.activations.linear


def assert_logits(model: keras.Model, compute_dtype: str) -> None:
    """Logits are float32, whatever the other layers compute in."""
    shape = (2, *model.input_shape[1:])
    logits = model(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert logits.shape == (2, 5)
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()
    assert {variable.dtype for variable in model.variables} == {tf.float32}
    *inner_layers, _ = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    assert {layer.compute_dtype for layer in inner_layers} == {compute_dtype}


def test_each_precision_has_logits_of_float32_and_variables_of_the_same_names(tiny):
    arch, model = tiny
    assert_logits(model, "float32")
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        mixed = build_tiny(arch)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert_logits(mixed, "bfloat16")
    # A checkpoint keeps variables by name.
    names = [variable.name for variable in model.variables]
    assert len(set(names)) == len(names)
    assert [variable.name for variable in mixed.variables] == names


def test_only_the_first_of_the_notes_scores_by_sigmoid():
    assert [arch for arch, spec in ARCHITECTURES.items() if spec.head == "sigmoid"] == ["cnn_sigmoid"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_arguments_of_a_family_are_those_that_it_takes(arch):
    names = family_arguments(arch)
    assert TINY_NETWORKS[arch].keys() | ARCHITECTURES[arch].arguments.keys() <= names.keys()
    assert not {"image_size", "channels", "num_classes"} & names.keys()
    assert names["kernel_initializer"] is str


def test_choosing_an_architecture_does_not_load_tensorflow():
    check = "import sys, trainer.architectures; sys.exit('tensorflow' in sys.modules or 'tf_keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
