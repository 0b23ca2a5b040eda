"""The small convolutional networks of the training notes: convolution and pooling in turn, then two dense layers."""

from typing import Any

from trainer.architectures.blocks import Count, Fraction, convolution


def build_cnn(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    later_filters: tuple[Count, ...],
    first_filters: Count | None = None,
    dense_units: Count = 1024,
    dropout: Fraction = 0.0,
    kernel_initializer: str = "glorot_uniform",
    batch_norm: bool = False,
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build a `tf_keras.Model` that returns logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels.
        channels: 1 or 3.
        num_classes: width of the last layer.
        later_filters: filters of each convolution after the first.
        first_filters: filters of the first convolution; the notes used as many as the image is wide, which is what
            None means.
        dense_units: width of the hidden dense layer.
        dropout: fraction of the dense units that is dropped in training; 0, as in the notes, adds no such layer.
        kernel_initializer: initializer of all layers except the last; the notes use the default of Keras.
        batch_norm: add BatchNorm after each convolution, which the notes do not.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Sequential, layers

    model = Sequential([Input((image_size, image_size, channels))])
    for block, filters in enumerate((first_filters or image_size, *later_filters), start=1):
        for layer in convolution(
            filters,
            3,
            f"conv{block}",
            padding="valid",
            kernel_initializer=kernel_initializer,
            batch_norm=batch_norm,
            batch_norm_momentum=batch_norm_momentum,
        ):
            model.add(layer)
        model.add(layers.MaxPooling2D(2, name=f"pool{block}"))
    model.add(layers.Flatten(name="flatten"))
    model.add(layers.Dense(dense_units, activation="relu", kernel_initializer=kernel_initializer, name="dense"))
    if dropout:
        model.add(layers.Dropout(dropout, name="dropout"))
    model.add(layers.Dense(num_classes, dtype="float32", name="logits"))
    return model
