import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.architectures import build_model


@pytest.mark.parametrize("name", ["VGG16", "VGG19"])
def test_the_convolutions_are_those_of_the_published_weights(name):
    with tf.Graph().as_default():
        own = build_model(name.lower(), 32, 3, 10)
        published = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), include_top=False)
    shapes = [
        {layer.name: tuple(layer.kernel.shape) for layer in model.layers if isinstance(layer, keras.layers.Conv2D)}
        for model in (own, published)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == int(name.removeprefix("VGG")) - 3


def test_the_filters_of_each_block_can_be_given():
    with tf.Graph().as_default():
        model = build_model("vgg16", 32, 1, 3, {"filters": (2, 3, 4, 5, 6), "convolutions": (1, 1, 1, 1, 2)})
    convolutions = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert convolutions == [2, 3, 4, 5, 6, 6]
