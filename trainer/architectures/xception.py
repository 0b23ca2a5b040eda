"""Xception (Chollet 2016, https://arxiv.org/abs/1610.02357, figure 5).

Layers are named as in `tf_keras.applications`, so that its weight file can be loaded by layer. The convolutions of
shortcuts have no names there but numbers, in the order in which they are made.
"""

import itertools
from typing import Any

from trainer.architectures.blocks import Count, Fraction, Width

_ENTRY_FILTERS = (128, 256, 728)
_MIDDLE_FILTERS = 728


def build_xception(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    width: Width = 1.0,
    middle_blocks: Count = 8,
    dropout: Fraction = 0.0,
    kernel_initializer: str = "glorot_uniform",
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build a `tf_keras.Model` that returns logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels, 32 or more.
        channels: 1 or 3.
        num_classes: width of the last layer.
        width: factor on the filters of every convolution; 1 is the paper's.
        middle_blocks: blocks that keep the size, 8 in the paper.
        dropout: fraction of the pooled features that is dropped in training; 0, as in Keras, adds no such layer.
        kernel_initializer: initializer of all convolutions.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Model, layers

    numbers = itertools.count(1)

    def normalise(tensor: Any, name: str) -> Any:
        return layers.BatchNormalization(momentum=batch_norm_momentum, name=name)(tensor)

    def activate(tensor: Any, name: str) -> Any:
        return layers.Activation("relu", name=f"{name}_act")(tensor)

    def convolve(tensor: Any, filters: int, strides: int, name: str) -> Any:
        tensor = layers.Conv2D(
            round(filters * width),
            3,
            strides,
            use_bias=False,
            kernel_initializer=kernel_initializer,
            name=name,
        )(tensor)
        return activate(normalise(tensor, f"{name}_bn"), name)

    def separate(tensor: Any, filters: int, name: str) -> Any:
        """Apply a convolution within each channel and one across them, then BatchNorm."""
        tensor = layers.SeparableConv2D(
            round(filters * width),
            3,
            padding="same",
            use_bias=False,
            depthwise_initializer=kernel_initializer,
            pointwise_initializer=kernel_initializer,
            name=name,
        )(tensor)
        return normalise(tensor, f"{name}_bn")

    def halve(tensor: Any, filters: tuple[int, int], block: int) -> Any:
        """Apply a block that halves the size, beside a strided 1x1 convolution of its input."""
        number = next(numbers)
        shortcut = layers.Conv2D(
            round(filters[1] * width),
            1,
            2,
            padding="same",
            use_bias=False,
            kernel_initializer=kernel_initializer,
            name=f"conv2d_{number}",
        )(tensor)
        shortcut = normalise(shortcut, f"batch_normalization_{number}")
        for position, count in enumerate(filters, start=1):
            name = f"block{block}_sepconv{position}"
            # The second block follows an activation.
            if block > 2 or position > 1:
                tensor = activate(tensor, name)
            tensor = separate(tensor, count, name)
        tensor = layers.MaxPooling2D(3, 2, padding="same", name=f"block{block}_pool")(tensor)
        return layers.Add(name=f"block{block}_add")([tensor, shortcut])

    images = Input((image_size, image_size, channels), name="images")
    x = convolve(images, 32, 2, "block1_conv1")
    x = convolve(x, 64, 1, "block1_conv2")
    for block, filters in enumerate(_ENTRY_FILTERS, start=2):
        x = halve(x, (filters, filters), block)
    for block in range(5, 5 + middle_blocks):
        before = x
        for position in (1, 2, 3):
            name = f"block{block}_sepconv{position}"
            x = separate(activate(x, name), _MIDDLE_FILTERS, name)
        x = layers.Add(name=f"block{block}_add")([x, before])
    # With another number of blocks before them, the last two keep their names.
    x = halve(x, (_MIDDLE_FILTERS, 1024), 13)
    for position, filters in enumerate((1536, 2048), start=1):
        name = f"block14_sepconv{position}"
        x = activate(separate(x, filters, name), name)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(x), name="xception")
