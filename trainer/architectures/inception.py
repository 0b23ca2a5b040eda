"""The network that the training notes call InceptionNet: the layers of two Inception modules, one after another.

It is kept as it stands in the notes. Unlike GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, figure 2b)
it has no parallel branches and no concatenation, and nothing reduces the image before the last layer.
"""

from typing import Any

# (filters, kernel) of each convolution around the pooling of a module: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5; pool
# projection. Table 1 of the paper, rows inception (3a) and (3b).
_MODULES = (
    (((64, 1), (96, 1), (128, 3), (16, 1), (32, 5)), (32, 1)),
    (((128, 1), (128, 1), (192, 3), (32, 1), (96, 5)), (64, 1)),
)


def build_inception_notes(image_size: int, channels: int, num_classes: int, *, width: float = 1.0) -> Any:
    """Returns a `tf_keras.Model` that gives logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels.
        channels: 1 or 3.
        num_classes: width of the last layer.
        width: factor on the filters of every convolution; 1 is the notes'.
    """
    from tf_keras import Input, Sequential, layers

    def convolution(filters: int, kernel: int, name: str) -> Any:
        return layers.Conv2D(round(filters * width), kernel, padding="same", activation="relu", name=name)

    model = Sequential([Input((image_size, image_size, channels))])
    for module, (convolutions, projection) in enumerate(_MODULES, start=1):
        for position, (filters, kernel) in enumerate(convolutions, start=1):
            model.add(convolution(filters, kernel, f"module{module}_conv{position}"))
        model.add(layers.MaxPooling2D(3, 1, padding="same", name=f"module{module}_pool"))
        model.add(convolution(*projection, f"module{module}_projection"))
    model.add(layers.Flatten(name="flatten"))
    model.add(layers.Dense(num_classes, dtype="float32", name="logits"))
    return model
