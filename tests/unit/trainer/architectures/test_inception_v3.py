"""tests/integration/test_architectures.py compares the layers with those of Keras."""

from trainer.architectures import ARCHITECTURES, build_model


def test_the_modules_have_the_sizes_and_channels_of_the_paper_and_the_published_number_of_parameters():
    model = build_model("inception_v3", 299, 3, 1000)
    shapes = {"pool2": (35, 192), "mixed0": (35, 256), "mixed2": (35, 288), "mixed3": (17, 768), "mixed7": (17, 768)}
    shapes |= {"mixed8": (8, 1280), "mixed10": (8, 2048)}
    for name, (size, filters) in shapes.items():
        assert model.get_layer(name).output_shape == (None, size, size, filters)
    assert model.count_params() == ARCHITECTURES["inception_v3"].parameters[-1]
