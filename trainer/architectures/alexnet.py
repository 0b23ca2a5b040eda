"""AlexNet (Krizhevsky, Sutskever, Hinton 2012, section 3.5) as in the training notes.

The notes differ from the paper: BatchNorm after each convolution in place of local response
normalization after the first two, and the layers are not split over two GPUs.
"""

from typing import Any

from trainer.architectures.blocks import Count, Fraction, Width

# filters, kernel, strides, padding, and whether a 3x3/2 max pooling follows.
_CONVOLUTIONS = (
    (96, 11, 4, "valid", True),
    (256, 5, 1, "same", True),
    (384, 3, 1, "same", False),
    (384, 3, 1, "same", False),
    (256, 3, 1, "same", True),
)


def build_alexnet(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    width: Width = 1.0,
    dense_units: Count = 4096,
    dropout: Fraction = 0.5,
    kernel_initializer: str = "glorot_uniform",
    batch_norm_momentum: Fraction = 0.99,
) -> Any:
    """Build a `tf_keras.Model` that returns logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels, 67 or more.
        channels: 1 or 3.
        num_classes: width of the last layer.
        width: factor on the filters of every convolution; 1 is the paper's.
        dense_units: width of the two hidden dense layers.
        dropout: fraction of the dense units that is dropped in training.
        kernel_initializer: initializer of all layers except the last; the notes use the default of Keras.
        batch_norm_momentum: momentum of the moving averages of BatchNorm; with 0.99, the default of Keras and so of the
            notes, the averages need hundreds of steps to reach those of the data.
    """
    from tf_keras import Input, Sequential, layers

    model = Sequential([Input((image_size, image_size, channels))])
    for block, (filters, kernel, strides, padding, pooled) in enumerate(_CONVOLUTIONS, start=1):
        model.add(
            layers.Conv2D(
                round(filters * width),
                kernel,
                strides,
                padding=padding,
                activation="relu",
                kernel_initializer=kernel_initializer,
                name=f"conv{block}",
            )
        )
        model.add(layers.BatchNormalization(momentum=batch_norm_momentum, name=f"batch_norm{block}"))
        if pooled:
            model.add(layers.MaxPooling2D(3, 2, name=f"pool{block}"))
    model.add(layers.Flatten(name="flatten"))
    for block in (1, 2):
        model.add(
            layers.Dense(dense_units, activation="relu", kernel_initializer=kernel_initializer, name=f"dense{block}")
        )
        model.add(layers.Dropout(dropout, name=f"dropout{block}"))
    model.add(layers.Dense(num_classes, dtype="float32", name="logits"))
    return model
