import tensorflow as tf
import tf_keras as keras

from trainer.architectures import build_model

WIDTH = 0.125


def test_the_branches_of_an_inception_module_are_joined():
    module = build_model("googlenet", 32, 1, 3, {"width": WIDTH}).get_layer("inception_3a_output")
    assert [tensor.node.layer.name for tensor in module.input] == [
        "inception_3a_1x1",
        "inception_3a_3x3",
        "inception_3a_5x5",
        "inception_3a_pool_proj",
    ]


def test_the_features_of_googlenet_shrink_five_times_by_half():
    with tf.Graph().as_default():
        model = build_model("googlenet", 224, 3, 10)
    # Table 1 of the paper.
    sizes = {"pool1": (56, 64), "pool2": (28, 192), "inception_3b_output": (28, 480), "inception_4e_output": (14, 832)}
    sizes["inception_5b_output"] = (7, 1024)
    for name, (size, filters) in sizes.items():
        assert model.get_layer(name).output_shape == (None, size, size, filters)


def test_the_notes_inception_is_a_chain_that_keeps_the_size():
    with tf.Graph().as_default():
        model = build_model("inception_notes", 12, 1, 3, {"width": WIDTH})
    assert isinstance(model, keras.Sequential)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [
        round(WIDTH * n) for n in (64, 96, 128, 16, 32, 32, 128, 128, 192, 32, 96, 64)
    ]
    assert {layer.output_shape[1:3] for layer in convolutions} == {(12, 12)}
