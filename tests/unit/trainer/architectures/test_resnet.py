import numpy as np
import pytest
import tf_keras as keras

from trainer.architectures import build_model


def build_tiny(arch: str, **arguments):
    return build_model(arch, 32, 1, 3, {"width": 0.125, **arguments})


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_residual_blocks_may_begin_as_the_identity(arch):
    model = build_tiny(arch, blocks=[1, 1, 1, 2], zero_init_residual=True)
    last = "conv5_block2_2_bn" if arch == "resnet18" else "conv5_block2_3_bn"
    assert not model.get_layer(last).gamma.numpy().any()
    block = keras.Model(model.get_layer("conv5_block1_out").output, model.get_layer("conv5_block2_out").output)
    before = np.random.default_rng(0).uniform(size=block.input_shape[1:]).astype(np.float32)[None]
    np.testing.assert_allclose(block(before), before)


# The numbers of parameters are in test_architectures.py, here and in tests/integration.
@pytest.mark.parametrize(
    ("arch", "convolutions"),
    [
        ("resnet18", 17),
        pytest.param("resnet34", 33, marks=pytest.mark.slow),
        pytest.param("resnet50", 49, marks=pytest.mark.slow),
    ],
)
def test_the_depth_is_that_of_the_name(arch, convolutions):
    layers = build_tiny(arch).layers
    names = [layer.name for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    # The projections of shortcuts do not count, the last dense layer does.
    assert sum("_0_conv" not in name for name in names) == convolutions
