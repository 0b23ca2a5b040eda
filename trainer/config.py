"""The whole config of a run: typed, frozen, and enough to run it again."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import InputError


class TrainConfig(BaseModel):
    """Everything that the result of a run depends on. ``config.json`` holds it, with nothing left to a default."""

    # The text under each field is its help on the command line.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    arch: str
    """Architecture; --list-archs shows them."""
    arch_arguments: dict[str, bool | int | float | str | list[int]] = {}
    """Of the architecture's family (width, dropout, ...), in place of the architecture's own."""
    init_from: str = ""
    """Run or weights file, local or s3://, whose layers of the same name the network starts from."""
    freeze_trunk: bool = False
    """Train the last layer only."""
    recipe: Literal["modern", "notes"] = "modern"
    """Where the values that the command line leaves open come from."""
    dataset: str
    """Prepared dataset, local or s3://."""
    dataset_fingerprint: str
    """Of its manifest: the same run name on a changed dataset is refused."""
    num_workers: int = Field(ge=1)
    """Training workers; each drives one GPU, or its share of a machine's cores."""
    global_batch_size: int = Field(64, ge=1)
    """Images an optimizer step, over all workers."""
    epochs: int = Field(10, ge=1)
    """Passes over the train split; left open, the recipe's, or more where they give a small split too few steps."""
    optimizer: Literal["sgd", "adam", "adamw", "nadam"] = "sgd"
    """adamw is adam by another name: weight decay is decoupled in all of them."""
    base_learning_rate: float = Field(gt=0)
    """Peak learning rate for a global batch of 256; scaled linearly to the actual one, which is a starting guess."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    nesterov: bool = True
    """Of sgd."""
    beta_1: float = Field(0.9, ge=0, lt=1)
    """Of adam, adamw and nadam."""
    beta_2: float = Field(0.999, ge=0, lt=1)
    """Of adam, adamw and nadam."""
    epsilon: float = Field(1e-7, gt=0)
    """Of adam, adamw and nadam."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, on kernels only (not on biases and BatchNorm)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after the warmup."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Linear from zero; at most a tenth of the steps is used."""
    clip_norm: float = Field(0.0, ge=0)
    """Gradients with a larger L2 norm are scaled down to it; 0 does not clip."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the training objective; reported losses are plain cross-entropies."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: in the training objective each class counts the same, however many images it has."""
    ema_momentum: float = Field(0.0, ge=0, lt=1)
    """Validate and keep an exponential moving average of the weights, per step; 0 does not average."""
    augment_flip: bool = False
    """Mirror half of the images left to right."""
    augment_rotation: float = Field(0.0, ge=0, le=180)
    """Largest angle in degrees, either way."""
    augment_translation: float = Field(0.0, ge=0, lt=1)
    """Largest shift, as a fraction of the image's size, either way."""
    augment_zoom: float = Field(0.0, ge=0, lt=1)
    """Largest relative change of size, either way."""
    augment_contrast: float = Field(0.0, ge=0, lt=1)
    """Largest relative change of each pixel's difference from the image's mean, either way."""
    input_scaling: Literal["standardise", "unit"] = "standardise"
    """Pixels to zero mean and unit deviation of the train split, or to 0-1."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """Of the layers; variables, logits and losses are float32 always."""
    seed: int = 0
    """Of initialisation, dropout, augmentation and data order."""
    keep_best: int = Field(1, ge=1)
    """Checkpoints kept beside the last one, by validation accuracy, then loss."""
    evaluate_test: bool = False
    """Evaluate the best checkpoint once on the test split."""
    export: Literal["keras", "saved_model"] = "keras"
    """What the best weights are written to for use elsewhere: model.keras, or a SavedModel beside it."""

    @property
    def per_replica_batch_size(self) -> int:
        """Images an optimizer step on one worker."""
        return self.global_batch_size // self.num_workers

    @property
    def peak_learning_rate(self) -> float:
        """The base learning rate scaled to the global batch size."""
        return self.base_learning_rate * self.global_batch_size / 256


def parse_config(values: Mapping[str, Any]) -> TrainConfig:
    """Returns the config that the values describe.

    Raises:
        InputError: a value is not allowed; names the option.
    """
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option} {first['input']}: {first['msg']}") from error
    if config.global_batch_size % config.num_workers:
        below = config.global_batch_size // config.num_workers * config.num_workers
        raise InputError(
            f"--global-batch-size {config.global_batch_size} cannot be divided over {config.num_workers} workers; give "
            f"a multiple of {config.num_workers}, such as {below or config.num_workers} or {below + config.num_workers}"
        )
    return config


def find_differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Returns ``field: old -> new`` of each field in which two configs differ."""
    new_values = new.model_dump()
    return [
        f"{name}: {value} -> {new_values[name]}"
        for name, value in old.model_dump().items()
        if value != new_values[name]
    ]
