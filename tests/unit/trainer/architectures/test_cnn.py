import tensorflow as tf

from trainer.architectures import build_model


def test_the_notes_first_layer_is_as_wide_as_the_image():
    with tf.Graph().as_default():
        assert build_model("cnn_softmax", 40, 1, 3).layers[0].filters == 40
        assert build_model("cnn_softmax", 40, 1, 3, {"first_filters": 8}).layers[0].filters == 8


def test_given_arguments_take_the_place_of_the_architectures_own():
    with tf.Graph().as_default():
        deep = build_model("cnn_softmax", 60, 1, 3, {"later_filters": (64, 32, 32)})
        assert deep.count_params() == build_model("cnn_deep", 60, 1, 3).count_params()


def test_each_later_convolution_has_its_filters_and_a_pooling():
    with tf.Graph().as_default():
        layers = build_model("cnn_tapered", 46, 1, 3).layers
    assert [layer.filters for layer in layers if hasattr(layer, "filters")] == [46, 16, 32, 64]
    assert [type(layer).__name__ for layer in layers[:8]] == ["Conv2D", "MaxPooling2D"] * 4
    assert [layer.units for layer in layers if hasattr(layer, "units")] == [1024, 3]
