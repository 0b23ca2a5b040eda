"""Inception v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567) as Keras has it, without the auxiliary head.

Layers are named as in `tf_keras.applications`, so that its weight file can be loaded by layer. Convolutions have no
names there but numbers, in the order in which they are made.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.architectures.blocks import Fraction, Width

_Convolution = tuple[int, int, int]
"""Filters, and the height and width of the kernel."""


@dataclass(frozen=True)
class _Module:
    """Branches side by side, joined at their end; the last one begins with a pooling."""

    branches: tuple[tuple[_Convolution, ...], ...]
    pool_filters: int = 0
    """Filters of the 1x1 convolution after an average pooling. 0: a maximum pooling, which like the last convolution of
    every branch has a stride of 2, and nothing after it."""
    splits: tuple[int, ...] = ()
    """Branches that end in a 1x3 and a 3x1 convolution of 384 filters side by side."""


def _module_at_35(pool_filters: int) -> _Module:
    """Return a module of figure 5."""
    return _Module((((64, 1, 1),), ((48, 1, 1), (64, 5, 5)), ((64, 1, 1), (96, 3, 3), (96, 3, 3))), pool_filters)


def _module_at_17(filters: int) -> _Module:
    """Return a module of figure 6."""
    one = ((filters, 1, 1), (filters, 1, 7), (192, 7, 1))
    two = ((filters, 1, 1), (filters, 7, 1), (filters, 1, 7), (filters, 7, 1), (192, 1, 7))
    return _Module((((192, 1, 1),), one, two), 192)


# Figure 7.
_MODULE_AT_8 = _Module((((320, 1, 1),), ((384, 1, 1),), ((448, 1, 1), (384, 3, 3))), 192, splits=(1, 2))

_MODULES: Mapping[str, _Module] = {
    "mixed0": _module_at_35(32),
    "mixed1": _module_at_35(64),
    "mixed2": _module_at_35(64),
    "mixed3": _Module((((384, 3, 3),), ((64, 1, 1), (96, 3, 3), (96, 3, 3)))),
    "mixed4": _module_at_17(128),
    "mixed5": _module_at_17(160),
    "mixed6": _module_at_17(160),
    "mixed7": _module_at_17(192),
    "mixed8": _Module((((192, 1, 1), (320, 3, 3)), ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)))),
    "mixed9": _MODULE_AT_8,
    "mixed10": _MODULE_AT_8,
}


def build_inception_v3(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    width: Width = 1.0,
    dropout: Fraction = 0.0,
    kernel_initializer: str = "glorot_uniform",
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build a `tf_keras.Model` that returns logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels, 75 or more.
        channels: 1 or 3.
        num_classes: width of the last layer.
        width: factor on the filters of every convolution; 1 is the paper's.
        dropout: fraction of the pooled features that is dropped in training; 0, as in Keras, adds no such layer.
        kernel_initializer: initializer of all convolutions.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Model, layers

    numbers = itertools.count(1)

    def convolve(
        tensor: Any, convolution: _Convolution, strides: int = 1, padding: Literal["same", "valid"] = "same"
    ) -> Any:
        filters, *kernel = convolution
        number = next(numbers)
        for layer in (
            layers.Conv2D(
                round(filters * width),
                kernel,
                strides,
                padding=padding,
                use_bias=False,
                kernel_initializer=kernel_initializer,
                name=f"conv2d_{number}",
            ),
            layers.BatchNormalization(momentum=batch_norm_momentum, scale=False, name=f"batch_normalization_{number}"),
            layers.Activation("relu", name=f"activation_{number}"),
        ):
            tensor = layer(tensor)
        return tensor

    def join(branches: list[Any], name: str) -> Any:
        return layers.Concatenate(name=name)(branches)

    def apply_module(tensor: Any, name: str, module: _Module) -> Any:
        ends = []
        for index, branch in enumerate(module.branches):
            end = tensor
            for convolution in branch[:-1]:
                end = convolve(end, convolution)
            end = convolve(end, branch[-1]) if module.pool_filters else convolve(end, branch[-1], 2, "valid")
            if index in module.splits:
                end = join([convolve(end, (384, 1, 3)), convolve(end, (384, 3, 1))], f"{name}_branch{index}")
            ends.append(end)
        if module.pool_filters:
            pooled = layers.AveragePooling2D(3, 1, padding="same", name=f"{name}_pool")(tensor)
            ends.append(convolve(pooled, (module.pool_filters, 1, 1)))
        else:
            ends.append(layers.MaxPooling2D(3, 2, name=f"{name}_pool")(tensor))
        return join(ends, name)

    images = Input((image_size, image_size, channels), name="images")
    x = convolve(images, (32, 3, 3), 2, "valid")
    x = convolve(x, (32, 3, 3), padding="valid")
    x = convolve(x, (64, 3, 3))
    x = layers.MaxPooling2D(3, 2, name="pool1")(x)
    x = convolve(x, (80, 1, 1), padding="valid")
    x = convolve(x, (192, 3, 3), padding="valid")
    x = layers.MaxPooling2D(3, 2, name="pool2")(x)
    for name, module in _MODULES.items():
        x = apply_module(x, name, module)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(x), name="inception_v3")
