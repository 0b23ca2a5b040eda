"""The complete config of a run: typed, frozen, and sufficient to run it again."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from trainer.config.optimizers import complete_arguments
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import shorten_digest

Model = TypeVar("Model", bound=BaseModel)
# As many images as the statistics of BatchNorm are over in Goyal et al. 2017, section 2.3, on up to 256 GPUs.
ENOUGH_FOR_BATCH_NORM = 32
FORMER_WORDS: Mapping[str, Mapping[str, str]] = {"input_scaling": {"standardise": "standardize"}}
"""Values of options by their former words, which records, config files and command lines may still have."""


class BatchRequest(BaseModel):
    """The requested batch size and precision; what is left open is measured (`trainer.batch.finder`)."""

    # The text under each field is its help on the command line, here as below.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    global_batch_size: str = "auto"
    """Images per optimizer step over all workers: auto (the batch with the shortest time to a result), max (the most
    that memory holds), knee (the smallest batch that is about as fast as the fastest), or a number."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    """Precision of the layers, mixed precision or float32; auto measures which is fastest. Variables, logits and losses
    are always float32."""
    min_steps_per_epoch: int = Field(10, ge=1)
    """Minimum optimizer steps per epoch that a batch of auto, max or knee leaves."""
    memory_limit_gib: float | None = Field(None, gt=0)
    """Memory limit of one worker in GiB. Default: the memory of its GPU, or its share of the node's memory
    as Ray reports it."""

    @field_validator("global_batch_size", mode="before")
    @classmethod
    def _check_global_batch_size(cls, value: Any) -> str:
        text = str(value)
        if text not in ("auto", "max", "knee") and not (text.isdecimal() and int(text) > 0):
            raise ValueError("give auto, max, knee or a number from 1")
        return text

    @property
    def given_size(self) -> int | None:
        """The global batch size where it is a number."""
        return int(self.global_batch_size) if self.global_batch_size.isdecimal() else None


class Settings(BaseModel):
    """How a network is trained, independent of the dataset, the cluster and the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    arch_arguments: dict[str, bool | int | float | str | list[int]] = {}
    """Arguments of the architecture's family (width, dropout, ...) that replace those of the architecture."""
    init_from: str = ""
    """Transfer learning: run folder or weights file, local or s3://, to load initial weights from, layers being matched
    by name; or keras:NAME, the weights of tf_keras.applications for vgg16, vgg19, resnet50, inception_v3 or xception,
    pretrained on ImageNet."""
    freeze_trunk: bool = False
    """Train the last layer only, the first part of fine-tuning."""
    optimizer: Literal["sgd", "adam", "adamw", "nadam"] = "sgd"
    """Optimizer. Weight decay is decoupled in all of them, so adamw is the same as adam."""
    base_learning_rate: float = Field(gt=0)
    """Peak learning rate for a global batch of 256 images. It is scaled to the actual batch by the square root of the
    ratio."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD; other optimizers ignore it."""
    optimizer_arguments: dict[str, bool | float] = Field({}, validate_default=True)
    """Other arguments of the optimizer: nesterov for SGD; beta_1, beta_2 and epsilon for the others."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of kernels; biases and BatchNorm weights do not decay."""
    batch_norm: Literal["auto", "global", "replica"] = "auto"
    """Images that BatchNorm takes its statistics from in training: global (the whole batch, so that the number of
    workers does not matter), replica (the worker's own part, without communication), or auto (replica if that has at
    least 32 images)."""
    all_reduce: Literal["auto", "nccl", "ring"] = "auto"
    """Implementation of the communication between workers: auto (nccl if they have GPUs), nccl, or ring (gRPC)."""
    gradient_exchange: Literal["float32", "bfloat16"] = "float32"
    """Precision in which workers exchange gradients; bfloat16 is half the bytes."""
    xla: Literal["auto", "on", "off"] = "auto"
    """Compilation of the training step by XLA: on, off, or auto (on GPUs, if what is left of the run repays it)."""
    steps_per_execution: int = Field(0, ge=0)
    """Training steps that a call to TensorFlow takes; they compute the same. 0 takes one, and on GPUs, where a step
    takes less than 10 ms, as many as take a tenth of a second."""
    schedule: Literal["plateau", "cosine", "constant"] = "cosine"
    """Schedule of the learning rate after the warmup: plateau (constant until validation stops improving, then down to
    zero), cosine (down to zero over all epochs) or constant."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Epochs in which the learning rate rises linearly from zero, at most a tenth of all steps."""
    clip_norm: float = Field(0.0, ge=0)
    """Gradient clipping: maximum L2 norm of the gradients; larger ones are scaled down to it. 0 disables it."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the training objective; reported losses are plain cross-entropies."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the training objective, against imbalance; balanced gives every class the same total
    weight, however many images it has."""
    ema_momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum per step of an exponential moving average of the weights, which is validated and kept; less in the first
    steps. 0 disables it."""
    augment: Literal["auto", "all", "none"] = "all"
    """Data augmentation, random changes of the training images: auto tries which of the --augment options lower the
    validation loss, also none of them, and a flip; all applies all of them; none applies none. The default is all if
    one of them is given."""
    augment_flip: bool = False
    """Flip half of the training images left to right."""
    augment_rotation: float = Field(0.0, ge=0, le=180)
    """Maximum rotation of training images in degrees, in either direction."""
    augment_translation: float = Field(0.0, ge=0, lt=1)
    """Maximum shift of training images as a fraction of their size, in either direction."""
    augment_zoom: float = Field(0.0, ge=0, lt=1)
    """Maximum zoom of training images as a fraction of their size, in or out."""
    augment_contrast: float = Field(0.0, ge=0, lt=1)
    """Maximum change of the contrast of training images, as a fraction, up or down."""
    augment_mixup: float = Field(0.0, ge=0)
    """MixUp: alpha of the Beta distribution of how much of another training image is blended into an image."""
    augment_cutmix: float = Field(0.0, ge=0)
    """CutMix: alpha of the Beta distribution of how much of an image is replaced by a box of another training image."""
    input_scaling: Literal["image", "standardize", "unit", "imagenet", "symmetric"] = "standardize"
    """Scaling of the pixels: image (zero mean and unit standard deviation within each image, so that its brightness and
    contrast do not matter), standardize (zero mean and unit standard deviation over the train split), unit (0 to 1),
    imagenet (0 to 255 minus the mean color of ImageNet, which keras:vgg16, keras:vgg19 and keras:resnet50 expect and
    choose) or symmetric (-1 to 1, for keras:inception_v3 and keras:xception)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initialization, dropout, augmentation and data order."""
    shuffle_window_gib: float = Field(64.0, gt=0)
    """Size of the dataset's files up to which an epoch is one permutation of all its images; of a larger dataset,
    images are shuffled within parts of this size, which are drawn anew each epoch."""
    cache_gib: float = Field(0.0, ge=0)
    """Most disk space in GiB that a node's copies of datasets in buckets take. 0 takes half of the free space."""
    checkpoint_every: int = Field(0, ge=0)
    """Optimizer steps between checkpoints within an epoch. 0 saves one at the end of each epoch only."""
    keep_best: int = Field(1, ge=1)
    """Number of best checkpoints to keep in addition to the last one, ranked by validation accuracy, then loss."""
    evaluate_test: bool = False
    """Evaluate the best checkpoint once on the test split when training ends."""
    save_probabilities: bool = False
    """Write the probability of every class for each validation image to predictions.parquet, too."""
    export: Literal["keras", "saved_model", "tflite", "onnx"] = "keras"
    """Format in which the best weights are exported: model.keras, or a SavedModel, a TensorFlow Lite file or an ONNX
    file in addition."""

    @field_validator("optimizer_arguments", mode="before")
    @classmethod
    def _complete_optimizer_arguments(cls, value: Any, info: ValidationInfo) -> Any:
        # An optimizer that is not allowed is refused by its own field.
        optimizer = info.data.get("optimizer")
        return complete_arguments(optimizer, value) if optimizer and isinstance(value, Mapping) else value

    @field_validator(*FORMER_WORDS, mode="before")
    @classmethod
    def _replace_former_word(cls, value: Any, info: ValidationInfo) -> Any:
        words = FORMER_WORDS[info.field_name or ""]
        return words.get(value, value) if isinstance(value, str) else value


class TrainConfig(Settings):
    """Everything that the result of a run depends on. ``config.json`` holds it, with nothing left to a default."""

    arch: str
    """Architecture of the network; --list-archs lists them."""
    recipe: Literal["modern", "notes"] = "modern"
    """Recipe that supplies the values of options that are not given."""
    dataset: str
    """URI of the prepared dataset, local or s3://."""
    dataset_fingerprint: str
    """Fingerprint of the manifest: the same run name on a changed dataset is refused."""
    num_workers: int = Field(ge=1)
    """Number of training workers; each drives one GPU, or its share of a machine's cores."""
    global_batch_size: int = Field(ge=1)
    """Images per optimizer step over all workers."""
    epochs: int = Field(10, ge=1)
    """Passes over the train split; by default those of the recipe, or more if a small split would get too few steps."""
    patience: int = Field(0, ge=0)
    """Epochs without an improvement in validation after which training ends; with --schedule plateau the learning rate
    falls to zero first. 0 trains all epochs."""
    known_augmentation: str = ""
    """With augment=auto: the choice of an earlier run on this dataset; empty to try the candidates."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Precision of the layers; variables, logits and losses are always float32."""

    @property
    def per_replica_batch_size(self) -> int:
        """Images per optimizer step on one worker."""
        return self.global_batch_size // self.num_workers

    @property
    def synchronizes_batch_norm(self) -> bool:
        """Whether the statistics of BatchNorm are those of several workers."""
        if self.batch_norm == "auto":
            return self.num_workers > 1 and self.per_replica_batch_size < ENOUGH_FOR_BATCH_NORM
        return self.num_workers > 1 and self.batch_norm == "global"

    @property
    def peak_learning_rate(self) -> float:
        """The base learning rate scaled to the global batch size by the square root.

        It is the rule for Adam and its kin (Malladi et al. 2022, section 4). For SGD the usual one is linear (Goyal et
        al. 2017, section 2.1), but the square root held where both were measured (docs/LOG.md). A rule for small
        changes, so a starting guess for large ones.
        """
        return self.base_learning_rate * math.sqrt(self.global_batch_size / 256)


AUGMENT_STRENGTHS = tuple(name for name in TrainConfig.model_fields if name.startswith("augment_"))
"""The options that say how far training images are varied, which is also what can be tried."""
MIXES = ("mixup", "cutmix")
"""The parts of an augmentation that mix images; others vary each image by itself."""


def has_mixture(augmentation: str) -> bool:
    """Return whether an augmentation, the names of its parts joined by "+", mixes images."""
    return not set(MIXES).isdisjoint(augmentation.split("+"))


def check_shares(global_batch_size: int, num_workers: int) -> None:
    """Raise InputError if the workers cannot share the global batch evenly; the message names batches that they can."""
    if global_batch_size % num_workers:
        below = global_batch_size // num_workers * num_workers
        raise InputError(
            f"--global-batch-size {global_batch_size} cannot be divided over {num_workers} workers; give a multiple of "
            f"{num_workers}, such as {below or num_workers} or {below + num_workers}"
        )


def resize_batch(config: TrainConfig, num_workers: int, largest_per_replica: int | None) -> TrainConfig:
    """Return the config for another number of workers: the same global batch if they can share it, else a smaller one.

    Steps and learning rate follow from the batch, as always.

    Args:
        config: config of the run.
        num_workers: the current number of workers.
        largest_per_replica: largest batch that fits in a worker's memory; None if unknown.
    """
    per_replica = min(config.global_batch_size // num_workers, largest_per_replica or config.global_batch_size)
    shares_evenly = per_replica * num_workers == config.global_batch_size
    values = {"num_workers": num_workers}
    if not shares_evenly:
        values["global_batch_size"] = max(1, per_replica) * num_workers
    return replace_values(config, **values)


def replace_values(config: TrainConfig, **values: Any) -> TrainConfig:
    """Return the config with other values in some fields, after the same checks as for any other."""
    return validate(TrainConfig, config.model_dump() | values)


def validate(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Make a model from values that a user gave.

    Raises:
        InputError: a value is not allowed; names the option.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).removesuffix("_gib").replace("_arguments", "_argument")
        option = "--" + name.replace("_", "-")
        raise InputError(f"{option} {first['input']}: {first['msg']}") from error


def find_differences(old: Model, new: Model) -> list[str]:
    """Return ``field: old -> new`` of each field in which two configs differ."""
    new_values = new.model_dump()
    return [
        f"{name}: {describe_value(name, value)} -> {describe_value(name, new_values[name])}"
        for name, value in old.model_dump().items()
        if value != new_values[name]
    ]


def describe_value(name: str, value: Any) -> str:
    """Return the value of a field as notes and messages show it: checksums are shortened, in paths, too."""
    if value in ("", None):
        return "unset"
    if isinstance(value, float):
        return f"{value:.6g}"
    if name == "dataset_fingerprint":
        return shorten_digest(value)
    return re.sub(r"\b[0-9a-f]{64}\b", lambda digest: shorten_digest(digest[0]), str(value))
