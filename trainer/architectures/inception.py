"""Inception: GoogLeNet as published, and the network that the training notes call InceptionNet."""

from typing import Any

from trainer.architectures.blocks import Count, Fraction, Width, apply_layers, convolution

# Filters of a module (table 1 of the paper): 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
_INCEPTION_3A = (64, 96, 128, 16, 32, 32)
_INCEPTION_3B = (128, 128, 192, 32, 96, 64)
# The modules between two pooling layers.
_STAGES: dict[str, dict[str, tuple[int, ...]]] = {
    "3": {"a": _INCEPTION_3A, "b": _INCEPTION_3B},
    "4": {
        "a": (192, 96, 208, 16, 48, 64),
        "b": (160, 112, 224, 24, 64, 64),
        "c": (128, 128, 256, 24, 64, 64),
        "d": (112, 144, 288, 32, 64, 64),
        "e": (256, 160, 320, 32, 128, 128),
    },
    "5": {"a": (256, 160, 320, 32, 128, 128), "b": (384, 192, 384, 48, 128, 128)},
}


def build_googlenet(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    width: Width = 1.0,
    dropout: Fraction = 0.4,
    kernel_initializer: str = "glorot_uniform",
    batch_norm: bool = False,
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, table 1), which returns logits.

    Unlike the paper, it has no auxiliary classifiers and no local response normalization.

    Args:
        image_size: height and width of the input in pixels, 32 or more.
        channels: 1 or 3.
        num_classes: width of the last layer.
        width: factor on the filters of every convolution; 1 is the paper's.
        dropout: fraction of the pooled features that is dropped in training.
        kernel_initializer: initializer of all convolutions.
        batch_norm: add BatchNorm after each convolution (Ioffe & Szegedy 2015), which the paper does not.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Model, layers

    def convolve(tensor: Any, filters: int, kernel: int, name: str, strides: int = 1) -> Any:
        block = convolution(
            round(filters * width),
            kernel,
            name,
            strides=strides,
            kernel_initializer=kernel_initializer,
            batch_norm=batch_norm,
            batch_norm_momentum=batch_norm_momentum,
        )
        return apply_layers(block, tensor)

    def pool(tensor: Any, name: str, strides: int = 2) -> Any:
        return layers.MaxPooling2D(3, strides, padding="same", name=name)(tensor)

    def inception(tensor: Any, filters: tuple[Count, ...], name: str) -> Any:
        """Four branches side by side, as in figure 2(b)."""
        one, three_reduce, three, five_reduce, five, projection = filters
        branches = [
            convolve(tensor, one, 1, f"{name}_1x1"),
            convolve(convolve(tensor, three_reduce, 1, f"{name}_3x3_reduce"), three, 3, f"{name}_3x3"),
            convolve(convolve(tensor, five_reduce, 1, f"{name}_5x5_reduce"), five, 5, f"{name}_5x5"),
            convolve(pool(tensor, f"{name}_pool", strides=1), projection, 1, f"{name}_pool_proj"),
        ]
        return layers.Concatenate(name=f"{name}_output")(branches)

    images = Input((image_size, image_size, channels), name="images")
    x = pool(convolve(images, 64, 7, "conv1", strides=2), "pool1")
    x = pool(convolve(convolve(x, 64, 1, "conv2_reduce"), 192, 3, "conv2"), "pool2")
    for stage, modules in _STAGES.items():
        for module, filters in modules.items():
            x = inception(x, filters, f"inception_{stage}{module}")
        if stage != "5":
            x = pool(x, f"pool{stage}")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    return Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(x), name="googlenet")


def build_inception_notes(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    width: Width = 1.0,
    dropout: Fraction = 0.0,
    kernel_initializer: str = "glorot_uniform",
    batch_norm: bool = False,
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build the InceptionNet of the notes, which returns logits ``[batch, num_classes]``.

    It is exactly as in the notes: the layers of two modules one after another. Unlike GoogLeNet it has no
    parallel branches and no concatenation, and nothing reduces the image before the last layer.

    Args:
        image_size: height and width of the input in pixels.
        channels: 1 or 3.
        num_classes: width of the last layer.
        width: factor on the filters of every convolution; 1 is the notes'.
        dropout: fraction of the last features that is dropped in training; 0, as in the notes, adds no such layer.
        kernel_initializer: initializer of all convolutions; the notes use the default of Keras.
        batch_norm: add BatchNorm after each convolution, which the notes do not.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Sequential, layers

    model = Sequential([Input((image_size, image_size, channels))])

    def convolve(filters: int, kernel: int, name: str) -> None:
        for layer in convolution(
            round(filters * width),
            kernel,
            name,
            kernel_initializer=kernel_initializer,
            batch_norm=batch_norm,
            batch_norm_momentum=batch_norm_momentum,
        ):
            model.add(layer)

    for module, (*filters, projection) in enumerate((_INCEPTION_3A, _INCEPTION_3B), start=1):
        for position, (count, kernel) in enumerate(zip(filters, (1, 1, 3, 1, 5), strict=True), start=1):
            convolve(count, kernel, f"module{module}_conv{position}")
        model.add(layers.MaxPooling2D(3, 1, padding="same", name=f"module{module}_pool"))
        convolve(projection, 1, f"module{module}_projection")
    model.add(layers.Flatten(name="flatten"))
    if dropout:
        model.add(layers.Dropout(dropout, name="dropout"))
    model.add(layers.Dense(num_classes, dtype="float32", name="logits"))
    return model
