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


@pytest.fixture(params=["float32", "mixed_bfloat16"])
def precision(request):
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy(before)


def image_size_of(arch: str) -> int:
    return max(8, ARCHITECTURES[arch].min_image_size)


def build_tiny(arch: str, num_classes: int = 3, channels: int = 1, **arguments):
    keras.utils.set_random_seed(0)
    return build_model(arch, image_size_of(arch), channels, num_classes, {**TINY_NETWORKS[arch], **arguments})


def images_for(arch: str, count: int, channels: int = 1) -> np.ndarray:
    shape = (count, image_size_of(arch), image_size_of(arch), channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


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


@pytest.mark.parametrize(("arch", "image_size", "channels", "num_classes", "parameters"), PUBLISHED)
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


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_initializer_is_that_of_every_kernel_but_the_last(arch):
    layers = [layer for layer in build_tiny(arch, kernel_initializer="he_normal").layers if hasattr(layer, "kernel")]
    *others, logits = layers
    assert all(isinstance(layer.kernel_initializer, keras.initializers.HeNormal) for layer in others)
    assert isinstance(logits.kernel_initializer, keras.initializers.GlorotUniform)


@pytest.mark.parametrize("arch", ["cnn_tapered", "inception_notes", "xception"])
def test_dropout_is_a_layer_only_where_it_is_asked_for(arch):
    def rates(model) -> list[float]:
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert rates(build_tiny(arch)) == []
    assert rates(build_tiny(arch, dropout=0.3)) == [0.3]


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_smallest_image_leaves_every_layer_a_pixel(arch):
    with tf.Graph().as_default():
        model = build_model(arch, ARCHITECTURES[arch].min_image_size, 1, 3)
        assert all(size >= 1 for layer in model.layers for size in layer.output_shape[1:])


@pytest.mark.parametrize("arch", ["cnn_softmax", "cnn_deep", "cnn_tapered", "alexnet", "vgg16", "inception_v3"])
def test_one_pixel_less_than_the_smallest_image_is_too_few(arch):
    with pytest.raises(ValueError):  # noqa: PT011 - Keras words it otherwise in each layer
        count_parameters(arch, ARCHITECTURES[arch].min_image_size - 1, 1, 3)


def test_every_architecture_has_a_tiny_form_here():
    assert TINY_NETWORKS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("arch", FAMILIES)
def test_logits_are_float32_whatever_the_precision(arch, precision):
    model = build_tiny(arch, num_classes=5, channels=3)
    logits = model(images_for(arch, 2, channels=3))
    assert logits.shape == (2, 5)
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()
    assert {variable.dtype for variable in model.variables} == {tf.float32}
    *inner_layers, _ = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    inner = {layer.compute_dtype for layer in inner_layers}
    assert inner == {"bfloat16" if precision == "mixed_bfloat16" else "float32"}


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_last_layer_gives_logits_and_not_scores(arch):
    model = build_tiny(arch)
    assert model.layers[-1].name == "logits"
    assert model.layers[-1].activation is keras.activations.linear


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_variable_has_a_name_of_its_own_and_the_same_each_time(arch):
    # A checkpoint keeps variables by name.
    names, again = ([variable.name for variable in build_tiny(arch).variables] for _ in range(2))
    assert len(set(names)) == len(names)
    assert again == names


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
