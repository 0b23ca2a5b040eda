"""VGG (Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556, table 1).

Layers are named as in `tf_keras.applications`, so that its weight files can be loaded by layer.
"""

from typing import Any

from trainer.architectures.blocks import Count, Fraction, convolution


def build_vgg(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    convolutions: tuple[Count, ...],
    filters: tuple[Count, ...] = (64, 128, 256, 512, 512),
    dense_units: Count = 4096,
    dropout: Fraction = 0.5,
    kernel_initializer: str = "glorot_uniform",
    batch_norm: bool = False,
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build a `tf_keras.Model` that returns logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels, 32 or more.
        channels: 1 or 3.
        num_classes: width of the last layer.
        convolutions: 3x3 convolutions in each block, a column of the table.
        filters: filters of each block.
        dense_units: width of the two hidden dense layers.
        dropout: fraction of the dense units that is dropped in training.
        kernel_initializer: initializer of all layers except the last.
        batch_norm: add BatchNorm after each convolution, which the paper does not.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Sequential, layers

    model = Sequential([Input((image_size, image_size, channels))])
    for block, (repeats, width) in enumerate(zip(convolutions, filters, strict=True), start=1):
        for repeat in range(1, repeats + 1):
            for layer in convolution(
                width,
                3,
                f"block{block}_conv{repeat}",
                kernel_initializer=kernel_initializer,
                batch_norm=batch_norm,
                batch_norm_momentum=batch_norm_momentum,
            ):
                model.add(layer)
        model.add(layers.MaxPooling2D(2, name=f"block{block}_pool"))
    model.add(layers.Flatten(name="flatten"))
    for block in (1, 2):
        model.add(
            layers.Dense(dense_units, activation="relu", kernel_initializer=kernel_initializer, name=f"fc{block}")
        )
        model.add(layers.Dropout(dropout, name=f"dropout{block}"))
    model.add(layers.Dense(num_classes, dtype="float32", name="logits"))
    return model
