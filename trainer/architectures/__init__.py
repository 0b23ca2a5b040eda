"""The registry of architectures: a table from the name to how the network is built.

Importing this package does not import TensorFlow, so that arguments are checked at once. For the same reason the
families import Keras inside their build functions.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.architectures.alexnet import build_alexnet
from trainer.architectures.cnn import build_cnn
from trainer.architectures.inception import build_googlenet, build_inception_notes
from trainer.architectures.inception_v3 import build_inception_v3
from trainer.architectures.resnet import build_resnet
from trainer.architectures.vgg import build_vgg
from trainer.architectures.xception import build_xception


@dataclass(frozen=True)
class ModelSpec:
    """One architecture: the build function of a family, and the arguments that make it this variant."""

    build: Callable[..., Any]
    """``build(image_size, channels, num_classes, **arguments)`` returns a `tf_keras.Model` from float32
    ``[batch, image_size, image_size, channels]`` to float32 logits ``[batch, num_classes]``."""
    min_image_size: int
    """Smallest height and width in pixels that leave every layer at least one pixel, not counting padding."""
    source: str
    parameters: tuple[int, int, int, int]
    """Image size, channels, number of classes, and the parameters that the network then has, as its source says."""
    head: Literal["softmax", "sigmoid"] = "softmax"
    """The activation that turns logits into the scores of an export. Training uses the logits: Keras does the same
    behind ``activation='sigmoid'`` with a categorical cross-entropy (``backend._get_logits``)."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: Mapping[str, ModelSpec] = {
    "cnn_sigmoid": ModelSpec(
        build_cnn,
        22,
        "training notes, 2023-04-12, first",
        (250, 1, 10, 27_734_190),
        head="sigmoid",
        arguments={"later_filters": (64, 32)},
    ),
    "cnn_softmax": ModelSpec(
        build_cnn,
        22,
        "training notes, 2023-04-12, second",
        (250, 1, 10, 27_734_190),
        arguments={"later_filters": (64, 32)},
    ),
    "cnn_deep": ModelSpec(
        build_cnn,
        46,
        "training notes, 2023-04-12, third",
        (250, 1, 10, 5_723_342),
        arguments={"later_filters": (64, 32, 32)},
    ),
    "cnn_tapered": ModelSpec(
        build_cnn,
        46,
        "training notes, 2023-04-12, fourth",
        (250, 1, 10, 11_148_510),
        arguments={"later_filters": (16, 32, 64)},
    ),
    "alexnet": ModelSpec(
        build_alexnet,
        67,
        "Krizhevsky et al. 2012, as in the training notes (BatchNorm for LRN)",
        (250, 1, 10, 58_304_586),
    ),
    "vgg16": ModelSpec(
        build_vgg,
        32,
        "Simonyan & Zisserman 2014, table 1, column D",
        (224, 3, 1000, 138_357_544),
        arguments={"convolutions": (2, 2, 3, 3, 3)},
    ),
    "vgg19": ModelSpec(
        build_vgg,
        32,
        "Simonyan & Zisserman 2014, table 1, column E",
        (250, 1, 10, 139_610_058),
        arguments={"convolutions": (2, 2, 4, 4, 4)},
    ),
    "inception_notes": ModelSpec(
        build_inception_notes, 1, "training notes, 2023-04-13 (sequential, no branches)", (250, 1, 10, 40_464_442)
    ),
    "googlenet": ModelSpec(
        build_googlenet, 32, "Szegedy et al. 2014, table 1 (no auxiliary heads, no LRN)", (224, 3, 1000, 6_998_552)
    ),
    "resnet18": ModelSpec(
        build_resnet,
        32,
        "He et al. 2015, table 1, 18-layer",
        (224, 3, 1000, 11_699_112),
        arguments={"blocks": (2, 2, 2, 2), "bottleneck": False, "convolution_bias": False},
    ),
    "resnet34": ModelSpec(
        build_resnet,
        32,
        "He et al. 2015, table 1, 34-layer",
        (224, 3, 1000, 21_814_696),
        arguments={"blocks": (3, 4, 6, 3), "bottleneck": False, "convolution_bias": False},
    ),
    "resnet50": ModelSpec(
        build_resnet,
        32,
        "He et al. 2015, table 1, 50-layer (Keras layout)",
        (224, 3, 1000, 25_636_712),
        arguments={"blocks": (3, 4, 6, 3), "bottleneck": True, "convolution_bias": True},
    ),
    "inception_v3": ModelSpec(
        build_inception_v3,
        75,
        "Szegedy et al. 2015 (Keras layout, no auxiliary head)",
        (299, 3, 1000, 23_851_784),
    ),
    "xception": ModelSpec(build_xception, 32, "Chollet 2016, figure 5 (Keras layout)", (299, 3, 1000, 22_910_480)),
}


def build_model(
    arch: str, image_size: int, channels: int, num_classes: int, arguments: Mapping[str, Any] | None = None
) -> Any:
    """Build a new `tf_keras.Model` from float32 ``[batch, image_size, image_size, channels]`` to float32 logits.

    Args:
        arch: a key of ARCHITECTURES.
        image_size: height and width of the input in pixels.
        channels: 1 or 3.
        num_classes: width of the last layer.
        arguments: arguments of the family that replace the architecture's own; see `family_arguments`.
    """
    spec = ARCHITECTURES[arch]
    return spec.build(image_size, channels, num_classes, **{**spec.arguments, **(arguments or {})})


def family_arguments(arch: str) -> dict[str, Any]:
    """Return the types of the arguments of an architecture's family, such as ``width`` or ``dropout``, by name."""
    parameters = inspect.signature(ARCHITECTURES[arch].build).parameters.values()
    return {one.name: one.annotation for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
