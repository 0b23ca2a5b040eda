"""Building blocks that several families share."""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

# Allowed values of the families' arguments, checked before any worker starts.
Count = Annotated[int, Ge(1)]
Width = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def convolution(
    filters: int,
    kernel: int,
    name: str,
    *,
    strides: int = 1,
    padding: str = "same",
    kernel_initializer: str = "glorot_uniform",
    batch_norm: bool = False,
    batch_norm_momentum: Fraction = 0.9,
) -> list[Any]:
    """Return the layers of a convolution with ReLU, to be applied one after another.

    With ``batch_norm`` they are convolution, BatchNorm and ReLU (Ioffe & Szegedy 2015, section 3.2). The convolution
    then has no bias, which BatchNorm would cancel.
    """
    from tf_keras import layers

    options = {"strides": strides, "padding": padding, "kernel_initializer": kernel_initializer}
    if not batch_norm:
        return [layers.Conv2D(filters, kernel, activation="relu", name=name, **options)]
    return [
        layers.Conv2D(filters, kernel, use_bias=False, name=name, **options),
        layers.BatchNormalization(momentum=batch_norm_momentum, name=f"{name}_bn"),
        layers.Activation("relu", name=f"{name}_relu"),
    ]


def apply_layers(layers: list[Any], tensor: Any) -> Any:
    """Apply layers one after another, and return the last output."""
    for layer in layers:
        tensor = layer(tensor)
    return tensor
