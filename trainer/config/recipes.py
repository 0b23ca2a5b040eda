"""The values of options that are not given: one row per architecture."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.config.config import TrainConfig

# As in the training notes: plain optimizers at a constant rate. The first four notes name no optimizer; adam is what
# their author compiled with wherever one is named without a rate. 32 is the default batch of `model.fit`.
_NOTES_COMMON = {
    "global_batch_size": 32,
    "precision": "float32",
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "input_scaling": "unit",
    # 0.001 for a batch of 32; a base rate is for 256 (`TrainConfig.peak_learning_rate`).
    "base_learning_rate": 0.001 * (256 / 32) ** 0.5,
}
_NOTES_ADAM = {**_NOTES_COMMON, "optimizer": "adam"}
_NOTES_SGD = {**_NOTES_COMMON, "optimizer": "sgd", "momentum": 0.0, "optimizer_arguments": {"nesterov": False}}

# Found by ablation: docs/LOG.md has the numbers, failures included. Each run tries which augmentation helps, since it
# depends on the dataset.
_MODERN = {
    "input_scaling": "image",
    "schedule": "plateau",
    "clip_norm": 1.0,
    # About 50 steps: the averages of the weights are as good at a constant rate as the weights after a decay.
    "ema_momentum": 0.98,
    "augment": "auto",
    "augment_rotation": 10.0,
    "augment_translation": 0.1,
    "augment_zoom": 0.1,
    # An upper limit: training ends when validation stops improving.
    "epochs": 24,
}
_ADAMW = {**_MODERN, "optimizer": "adamw", "weight_decay": 0.01}
_SGD = {**_MODERN, "optimizer": "sgd", "base_learning_rate": 0.16, "weight_decay": 5e-4}
_HE_NORMAL = {"kernel_initializer": "he_normal"}
_HE_NORMAL_BATCH_NORM = {**_HE_NORMAL, "batch_norm": True}

_MODERN_CNN = {**_ADAMW, "clip_norm": 0.0, "base_learning_rate": 0.004, "epochs": 40}
# With Glorot's initialization, as in the notes, the loss of sixteen layers of ReLU does not move.
_MODERN_VGG = {**_ADAMW, "base_learning_rate": 0.0002, "arch_arguments": _HE_NORMAL}
_MODERN_RESNET = {**_SGD, "arch_arguments": _HE_NORMAL}

# Small datasets have few steps per epoch, and forty epochs are not enough.
_LEAST_STEPS = {"notes": 0, "modern": 2000}
# Epochs without an improvement after which a run ends by itself; 0 for never.
_PATIENCE = {"notes": 0, "modern": 4}

# Global batch at which the learning rates and the regularization were found.
_TUNED_BATCH_SIZES = {"notes": 32, "modern": 64}

RECIPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "notes": {
        "cnn_sigmoid": {**_NOTES_ADAM, "epochs": 10},
        "cnn_softmax": {**_NOTES_ADAM, "epochs": 10},
        "cnn_deep": {**_NOTES_ADAM, "epochs": 20},
        "cnn_tapered": {**_NOTES_ADAM, "epochs": 20},
        "alexnet": {**_NOTES_SGD, "epochs": 50},
        "vgg19": {**_NOTES_ADAM, "epochs": 25},
        "inception_notes": {**_NOTES_ADAM, "epochs": 25},
    },
    "modern": {
        "cnn_sigmoid": _MODERN_CNN,
        "cnn_softmax": _MODERN_CNN,
        "cnn_deep": _MODERN_CNN,
        "cnn_tapered": _MODERN_CNN,
        # The notes' AlexNet learned (27 of 66) but was validated with BatchNorm averages that a few hundred steps at a
        # momentum of 0.99 had not moved to the data.
        "alexnet": {**_ADAMW, "base_learning_rate": 0.001, "arch_arguments": {"batch_norm_momentum": 0.9}},
        "vgg16": _MODERN_VGG,
        "vgg19": _MODERN_VGG,
        "inception_notes": {**_ADAMW, "base_learning_rate": 0.002, "arch_arguments": _HE_NORMAL_BATCH_NORM},
        "googlenet": {**_ADAMW, "base_learning_rate": 0.002, "arch_arguments": _HE_NORMAL_BATCH_NORM},
        "resnet18": _MODERN_RESNET,
        "resnet34": _MODERN_RESNET,
        # As the others it hardly moves in 300 steps: its gradients have a norm of 100.
        "resnet50": {
            **_ADAMW,
            "base_learning_rate": 0.008,
            "arch_arguments": {**_HE_NORMAL, "zero_init_residual": True},
        },
        "inception_v3": {**_ADAMW, "base_learning_rate": 0.002, "arch_arguments": _HE_NORMAL},
        "xception": {**_ADAMW, "base_learning_rate": 0.002, "arch_arguments": _HE_NORMAL},
    },
}


def recipe_epochs(recipe: str, arch: str, steps_per_epoch: int) -> int:
    """Return the epochs of a recipe; for a small dataset more, so that it gets enough optimizer steps."""
    epochs: int = RECIPES[recipe][arch].get("epochs", TrainConfig.model_fields["epochs"].default)
    return max(epochs, math.ceil(_LEAST_STEPS[recipe] / steps_per_epoch))


def recipe_patience(recipe: str, schedule: str) -> int:
    """Return the number of epochs without an improvement after which a run of a recipe ends; 0 for never.

    A cosine reaches zero after all epochs, so a run that ends earlier ends at a high learning rate.
    """
    return _PATIENCE[recipe] if schedule == "plateau" else 0


def describe_rescaling(config: TrainConfig) -> str:
    """Describe how the values of a recipe that were tuned at another batch are scaled.

    Empty if the batch is the one at which they were tuned, or if another learning rate was given.
    """
    tuned_at = _TUNED_BATCH_SIZES[config.recipe]
    tuned_rate = RECIPES[config.recipe].get(config.arch, {}).get("base_learning_rate")
    if config.global_batch_size == tuned_at or config.base_learning_rate != tuned_rate:
        return ""
    return (
        f"learning rate and regularization were tuned at a batch of {tuned_at}, this run uses "
        f"{config.global_batch_size}: the rate is scaled by the square root to {config.peak_learning_rate:.3g}, a "
        "starting guess"
    )
