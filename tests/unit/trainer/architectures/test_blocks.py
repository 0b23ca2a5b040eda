import numpy as np
import pytest
import tf_keras as keras

from trainer.architectures.blocks import apply_layers, convolution


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_convolution_ends_with_relu_and_has_a_bias_only_without_batch_norm(batch_norm):
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 2))
    layers = convolution(5, 3, "first", strides=2, batch_norm=batch_norm, batch_norm_momentum=0.8)
    model = keras.Model(images, apply_layers(layers, images))
    assert model.output_shape == (None, 4, 4, 5)
    assert [layer.name for layer in layers] == ["first", *(["first_bn", "first_relu"] if batch_norm else [])]
    assert layers[0].use_bias is not batch_norm
    outputs = model(np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)).numpy()
    assert outputs.min() == 0
    assert outputs.max() > 0
    if batch_norm:
        assert layers[1].momentum == 0.8


def test_layers_are_applied_in_their_order():
    double, shift = keras.layers.Rescaling(2.0), keras.layers.Rescaling(1.0, offset=3.0)
    ones = np.ones((1, 2), np.float32)
    assert apply_layers([double, shift], ones).numpy().tolist() == [[5, 5]]
    assert apply_layers([shift, double], ones).numpy().tolist() == [[8, 8]]
