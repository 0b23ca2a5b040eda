"""What a run uses where the command line says nothing: one row an architecture."""

from collections.abc import Mapping
from typing import Any

# As in the training notes: plain optimizers at a constant rate. The first four notes name no optimizer; adam is what
# their author compiled with wherever one is named without a rate. 32 is the default batch of `model.fit`.
_NOTES_COMMON = {
    "global_batch_size": 32,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "momentum": 0.0,
    "nesterov": False,
    "input_scaling": "unit",
}
_NOTES_ADAM = {**_NOTES_COMMON, "optimizer": "adam", "base_learning_rate": 0.001 * 256 / 32}
_NOTES_SGD = {**_NOTES_COMMON, "optimizer": "sgd", "base_learning_rate": 0.001 * 256 / 32}

_MODERN_CNN = {"optimizer": "adamw", "base_learning_rate": 0.004, "weight_decay": 0.01, "epochs": 20}
_MODERN_DEEP = {"optimizer": "sgd", "base_learning_rate": 0.08, "weight_decay": 5e-4, "clip_norm": 1.0}

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
        "alexnet": {**_MODERN_DEEP, "arch_arguments": {"batch_norm_momentum": 0.9}},
        "vgg19": _MODERN_DEEP,
        "inception_notes": _MODERN_DEEP,
    },
}
