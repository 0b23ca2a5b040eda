"""The small convolutional networks of the training notes: convolution and pooling in turn, then two dense layers."""

from typing import Any


def build_cnn(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    later_filters: tuple[int, ...],
    first_filters: int | None = None,
    dense_units: int = 1024,
) -> Any:
    """Returns a `tf_keras.Model` that gives logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels.
        channels: 1 or 3.
        num_classes: width of the last layer.
        later_filters: filters of each convolution after the first.
        first_filters: filters of the first convolution; the notes used as many as the image is wide, which is what
            None means.
        dense_units: width of the hidden dense layer.
    """
    from tf_keras import Input, Sequential, layers

    model = Sequential([Input((image_size, image_size, channels))])
    for block, filters in enumerate((first_filters or image_size, *later_filters), start=1):
        model.add(layers.Conv2D(filters, 3, activation="relu", name=f"conv{block}"))
        model.add(layers.MaxPooling2D(2, name=f"pool{block}"))
    model.add(layers.Flatten(name="flatten"))
    model.add(layers.Dense(dense_units, activation="relu", name="dense"))
    model.add(layers.Dense(num_classes, dtype="float32", name="logits"))
    return model
