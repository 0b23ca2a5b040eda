"""How pixels become the input of a network: one Keras layer, the same in training, validation and export."""

from typing import Any

import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig

# Of red, green and blue, as in `tf_keras.applications` (mode "caffe" of `preprocess_input`).
_IMAGENET_MEAN = (123.68, 116.779, 103.939)


def build_scaling(manifest: Manifest, config: TrainConfig) -> Any:
    """Return a layer without weights from float32 pixels ``[batch, height, width, channels]``, 0 to 255, to the input.

    A standard deviation counts as at least about one gray level, so that a plain image is not blown up.
    """
    if config.input_scaling == "image":
        # Over all pixels and channels of an image, as in tf.image.per_image_standardization. Epsilon is a variance.
        return keras.layers.LayerNormalization(
            axis=[1, 2, 3], epsilon=1.0, center=False, scale=False, dtype="float32", name="pixel_scaling"
        )
    scale, offset = [1 / 255] * manifest.channels, [0.0] * manifest.channels
    match config.input_scaling:
        case "standardize":
            scale = [1 / max(std, 1.0) for std in manifest.pixel_std]
            offset = [-mean * factor for mean, factor in zip(manifest.pixel_mean, scale, strict=True)]
        case "imagenet":
            scale = [1.0] * manifest.channels
            gray = sum(_IMAGENET_MEAN) / len(_IMAGENET_MEAN)
            offset = [-gray] if manifest.channels == 1 else [-mean for mean in _IMAGENET_MEAN]
        case "symmetric":
            scale, offset = [2 / 255] * manifest.channels, [-1.0] * manifest.channels
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="pixel_scaling")
