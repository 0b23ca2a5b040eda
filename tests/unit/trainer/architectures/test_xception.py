"""tests/integration/test_architectures.py compares the layers with those of Keras."""

import tf_keras as keras

from trainer.architectures import ARCHITECTURES, build_model


def test_the_blocks_have_the_sizes_and_channels_of_the_paper_and_the_published_number_of_parameters():
    model = build_model("xception", 299, 3, 1000)
    shapes = {"block2_add": (74, 128), "block3_add": (37, 256), "block4_add": (19, 728), "block12_add": (19, 728)}
    shapes |= {"block13_add": (10, 1024), "block14_sepconv2_act": (10, 2048)}
    for name, (size, filters) in shapes.items():
        assert model.get_layer(name).output_shape == (None, size, size, filters)
    assert model.count_params() == ARCHITECTURES["xception"].parameters[-1]


def test_the_initializer_is_that_of_both_kernels_of_a_separable_convolution():
    layers = build_model("xception", 32, 1, 3, {"width": 0.125, "kernel_initializer": "he_normal"}).layers
    separable = [layer for layer in layers if isinstance(layer, keras.layers.SeparableConv2D)]
    assert len(separable) == 34
    for layer in separable:
        assert isinstance(layer.depthwise_initializer, keras.initializers.HeNormal)
        assert isinstance(layer.pointwise_initializer, keras.initializers.HeNormal)
