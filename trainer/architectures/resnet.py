"""ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385, table 1).

Layers are named as in `tf_keras.applications`, so that its ResNet50 weight file can be loaded by layer. As
there, the stride of a bottleneck is in its first 1x1 convolution, and its convolutions have biases.
"""

from typing import Any

from trainer.architectures.blocks import Count, Fraction, Width

_EPSILON = 1.001e-5


def build_resnet(
    image_size: int,
    channels: int,
    num_classes: int,
    *,
    blocks: tuple[Count, ...],
    bottleneck: bool,
    convolution_bias: bool,
    width: Width = 1.0,
    zero_init_residual: bool = False,
    kernel_initializer: str = "glorot_uniform",
    batch_norm_momentum: Fraction = 0.9,
) -> Any:
    """Build a `tf_keras.Model` that returns logits ``[batch, num_classes]``.

    Args:
        image_size: height and width of the input in pixels, 32 or more.
        channels: 1 or 3.
        num_classes: width of the last layer.
        blocks: residual blocks in each of the four stages.
        bottleneck: blocks of three convolutions (figure 5, right) instead of two.
        convolution_bias: whether convolutions have biases, although BatchNorm follows.
        width: factor on the filters of every convolution; 1 is the paper's.
        zero_init_residual: start each block as its shortcut alone, by a last BatchNorm with zero scale (Goyal et al.
            2017, section 5.1).
        kernel_initializer: initializer of all convolutions.
        batch_norm_momentum: momentum of the moving averages of BatchNorm.
    """
    from tf_keras import Input, Model, layers

    def convolve(
        tensor: Any,
        filters: int,
        kernel: int,
        name: str,
        strides: int = 1,
        *,
        padding: str = "same",
        relu: bool = True,
        gamma_initializer: str = "ones",
    ) -> Any:
        """Apply a convolution and BatchNorm."""
        tensor = layers.Conv2D(
            filters,
            kernel,
            strides,
            padding=padding,
            use_bias=convolution_bias,
            kernel_initializer=kernel_initializer,
            name=f"{name}_conv",
        )(tensor)
        tensor = layers.BatchNormalization(
            momentum=batch_norm_momentum,
            epsilon=_EPSILON,
            gamma_initializer=gamma_initializer,
            name=f"{name}_bn",
        )(tensor)
        return layers.Activation("relu", name=f"{name}_relu")(tensor) if relu else tensor

    last_gamma = "zeros" if zero_init_residual else "ones"

    def residual_block(tensor: Any, filters: int, strides: int, name: str) -> Any:
        out_filters = 4 * filters if bottleneck else filters
        shortcut = tensor
        if strides > 1 or tensor.shape[-1] != out_filters:
            # Option B of section 3.3: a projection where the shape changes.
            shortcut = convolve(tensor, out_filters, 1, f"{name}_0", strides, relu=False)
        if bottleneck:
            tensor = convolve(tensor, filters, 1, f"{name}_1", strides)
            tensor = convolve(tensor, filters, 3, f"{name}_2")
            tensor = convolve(tensor, out_filters, 1, f"{name}_3", relu=False, gamma_initializer=last_gamma)
        else:
            tensor = convolve(tensor, filters, 3, f"{name}_1", strides)
            tensor = convolve(tensor, filters, 3, f"{name}_2", relu=False, gamma_initializer=last_gamma)
        tensor = layers.Add(name=f"{name}_add")([shortcut, tensor])
        return layers.Activation("relu", name=f"{name}_out")(tensor)

    images = Input((image_size, image_size, channels), name="images")
    # The published weights expect equal padding on all sides; "same" pads an even image on two sides only.
    x = layers.ZeroPadding2D(3, name="conv1_pad")(images)
    x = convolve(x, round(64 * width), 7, "conv1", strides=2, padding="valid")
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, 2, name="pool1_pool")(x)
    for stage, repeats in enumerate(blocks):
        for block in range(1, repeats + 1):
            strides = 2 if stage and block == 1 else 1
            x = residual_block(x, round(64 * width) * 2**stage, strides, f"conv{stage + 2}_block{block}")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(x), name="resnet")
