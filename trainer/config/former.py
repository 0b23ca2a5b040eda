"""What the config of a run meant in earlier versions; a run goes on as it began, whatever today's defaults are."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.config.optimizers import NAMES, own_arguments

CONFIG_FORMAT = 3
"""The format of ``config.json``.

2: the arguments of the optimizer are a table. 3: the learning rate of SGD is scaled to the batch by the square root.
"""
_SQUARE_ROOT_FORMAT = 3
FORMER_VALUES: Mapping[str, Any] = {
    "arch_arguments": {},
    "init_from": "",
    "freeze_trunk": False,
    "class_weights": "none",
    "ema_momentum": 0.0,
    "batch_norm": "global",
    "all_reduce": "auto",
    "gradient_exchange": "float32",
    "xla": "auto",
    "steps_per_execution": 0,
    "augment": "all",
    "known_augmentation": "",
    "patience": 0,
    "augment_flip": False,
    "augment_rotation": 0.0,
    "augment_translation": 0.0,
    "augment_zoom": 0.0,
    "augment_contrast": 0.0,
    "augment_mixup": 0.0,
    "augment_cutmix": 0.0,
    # No dataset was larger than this in practice; each epoch was one permutation of all its images.
    "shuffle_window_gib": 64.0,
    "cache_gib": 0.0,
    "checkpoint_every": 0,
    "save_probabilities": False,
    "export": "keras",
}
"""What a run did before the option existed."""
# Fields of earlier configs that no longer have an effect.
_NO_OPTIONS_NOW = {"tuned_batch_size"}


def find_former_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the optimizer in a config of format 1, where each was a field of the config."""
    return {name: config[name] for name in own_arguments(config.get("optimizer", "")) if name in config}


def find_former_rate(config: Mapping[str, Any], record_format: int) -> float:
    """Return the base learning rate with which a config of any format has the rate that it had.

    Before format 3 that of SGD was scaled to the batch linearly, not by the square root.
    """
    rate: float = config["base_learning_rate"]
    is_linear = record_format < _SQUARE_ROOT_FORMAT and config["optimizer"] == "sgd"
    return rate * math.sqrt(config["global_batch_size"] / 256) if is_linear else rate


def upgrade_config(config: Mapping[str, Any], record_format: int) -> dict[str, Any]:
    """Return a config of any format by today's names, with their meaning of today.

    Args:
        config: the config as JSON has it.
        record_format: the format of the record that it is from, at most CONFIG_FORMAT.
    """
    kept = {name: value for name, value in config.items() if name not in NAMES | _NO_OPTIONS_NOW}
    former = {"optimizer_arguments": find_former_arguments(config), **FORMER_VALUES}
    return {**former, **kept, "base_learning_rate": find_former_rate(config, record_format)}
