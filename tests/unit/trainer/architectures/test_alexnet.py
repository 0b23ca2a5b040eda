import tensorflow as tf
import tf_keras as keras

from trainer.architectures import build_model


def test_the_layers_are_those_of_the_notes():
    with tf.Graph().as_default():
        layers = build_model("alexnet", 227, 3, 1000).layers
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [96, 256, 384, 384, 256]
    assert [layer.kernel_size[0] for layer in convolutions] == [11, 5, 3, 3, 3]
    assert [layer.output_shape[1] for layer in convolutions] == [55, 27, 13, 13, 13]
    names = [layer.name for layer in layers]
    assert names[:3] == ["conv1", "batch_norm1", "pool1"]
    assert [name for name in names if name.startswith("pool")] == ["pool1", "pool2", "pool5"]
    assert names[-6:] == ["flatten", "dense1", "dropout1", "dense2", "dropout2", "logits"]
    assert [layer.rate for layer in layers if isinstance(layer, keras.layers.Dropout)] == [0.5, 0.5]


def test_the_width_is_a_factor_on_the_filters_only():
    with tf.Graph().as_default():
        layers = build_model("alexnet", 67, 1, 3, {"width": 0.125, "dense_units": 7}).layers
    assert [layer.filters for layer in layers if isinstance(layer, keras.layers.Conv2D)] == [12, 32, 48, 48, 32]
    assert [layer.units for layer in layers if isinstance(layer, keras.layers.Dense)] == [7, 7, 3]
