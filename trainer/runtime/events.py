"""What a run tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.runtime.markdown import format_count

_MOST_CHARACTERS = 8


@dataclass(frozen=True)
class StageProgressed:
    """Some of a stage is finished: of preparing a dataset, or of an epoch."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class SourceListed:
    """What a source of images holds by the names of its files, before any of them is read."""

    images: int
    classes: int
    not_tried: str = ""
    """Files that are no images by their names, counted by suffix."""
    left_behind: str = ""
    """Files that systems have left there, counted by kind."""
    unused_tables: str = ""
    """Tables beside folders of images."""
    empty_classes: str = ""
    """Classes that the source declares and has no image of."""

    @property
    def is_notable(self) -> bool:
        """Whether anything was left out."""
        return bool(self.not_tried or self.left_behind or self.unused_tables or self.empty_classes)

    def __str__(self) -> str:
        parts = [f"{format_count(self.images, 'file')} to read, {format_count(self.classes, 'class')}"]
        if self.not_tried:
            parts.append(f"no images by their names: {self.not_tried}")
        if self.left_behind:
            parts.append(f"passed over: {self.left_behind}")
        if self.empty_classes:
            parts.append(f"left out, without an image: {self.empty_classes}")
        if self.unused_tables:
            parts.append(f"classes are taken from the folders, not from {self.unused_tables}")
        return "; ".join(parts)


@dataclass(frozen=True)
class ValueRangeFound:
    """Images of a dataset have more than 8 bits a pixel; the range of their values is decided for all of them."""

    images: int
    found: str
    """The smallest and the largest value."""
    used: str
    """The values that become 0 and 255."""
    dark: int
    """Images that have no value above a tenth of the largest that is used."""

    def __str__(self) -> str:
        return (
            f"more than 8 bits a pixel in {self.images} of the images, with values {self.found}: {self.used} become "
            "gray levels 0 to 255, in all of them (--value-range LOW:HIGH for another range)"
            + (f"; {self.dark} of them stay below a tenth of that" if self.dark else "")
        )


@dataclass(frozen=True)
class WorkersAwaited:
    """The cluster has no room for the workers of a run, at its start or since it lost some."""

    least: int
    """Workers without which it does not go on."""
    seconds: float
    """Since one was last heard of."""

    def __str__(self) -> str:
        return f"waiting for room for {format_count(self.least, 'worker')}, {self.seconds:.0f} s since one was heard of"


@dataclass(frozen=True)
class RunStarted:
    """The workers are about to start; the numbers say how the images are cut into steps."""

    global_batch_size: int
    num_replicas: int
    per_replica_batch_size: int
    steps_per_epoch: int
    rows: int
    """Images of the train split."""
    epochs: int
    finished_epochs: int
    """More than 0 where a run is continued."""

    def __str__(self) -> str:
        left_out = self.rows - self.steps_per_epoch * self.global_batch_size
        text = (
            f"global batch {self.global_batch_size} = {format_count(self.num_replicas, 'replica')} x "
            f"{self.per_replica_batch_size}; {format_count(self.rows, 'image')} = "
            f"{format_count(self.steps_per_epoch, 'step')} an epoch"
            + (f" + {left_out} left out (others each epoch)" if left_out else "")
            + f"; {format_count(self.epochs, 'epoch')} = {format_count(self.epochs * self.steps_per_epoch, 'step')}"
        )
        return text + (f"; continuing after epoch {self.finished_epochs}" if self.finished_epochs else "")


@dataclass(frozen=True)
class WorkerSilent:
    """A worker stands still, or the way to it is broken; the others wait for it."""

    worker: str
    """Which one, in words."""
    seconds: float
    """Since it was last heard of."""

    def __str__(self) -> str:
        return f"nothing heard of {self.worker} for {self.seconds:.0f} s; training waits for it"


@dataclass(frozen=True)
class WorkerHeardAgain:
    """A worker that was silent goes on."""

    worker: str
    """Which one, in words."""
    seconds: float
    """For which nothing was heard of it."""

    def __str__(self) -> str:
        return f"{self.worker} is heard of again, after {self.seconds:.0f} s"


@dataclass(frozen=True)
class WorkersLost:
    """Workers died or failed; all are started again."""

    reason: str
    """Which ones, and how."""
    log: str
    """Host and path of what the first of them printed; empty where that is lost, too."""
    tail: bytes
    """The end of it."""
    failures: int
    """With this one."""
    max_failures: int

    def __str__(self) -> str:
        log = f"; what it printed: {self.log}" if self.log else ""
        return (
            f"{self.reason}{log}\nthe workers start again from the last checkpoint: failure {self.failures} of the "
            f"{self.max_failures} that --max-failures allows"
        )


@dataclass(frozen=True)
class AttemptStarted:
    """The workers have started once more and go on."""

    attempt: int
    """2 and more."""
    step: int
    """Optimizer steps that need not be taken again."""
    epoch: int
    """In which it goes on."""
    num_workers: int
    previous_num_workers: int = 0
    """In the attempt before; 0 where that is not known."""

    def __str__(self) -> str:
        workers = format_count(self.num_workers, "worker")
        if self.previous_num_workers not in (0, self.num_workers):
            workers += f" in place of {self.previous_num_workers}"
        return f"attempt {self.attempt} goes on after step {self.step}, in epoch {self.epoch}, with {workers}"


@dataclass(frozen=True)
class WeightsTransferred:
    """The network does not start from random weights alone."""

    transferred: str
    """Which layers were loaded and which were not."""

    def __str__(self) -> str:
        return self.transferred


@dataclass(frozen=True)
class EpochFinished:
    """An epoch is trained and evaluated."""

    row: dict[str, float]
    """As in ``metrics.parquet``."""
    epochs: int

    def __str__(self) -> str:
        row = self.row
        return (
            f"epoch {row['epoch']:.0f}/{self.epochs} - loss: {row['loss']:.4f} - accuracy: {row['accuracy']:.4f} - "
            f"val_loss: {row['val_loss']:.4f} - val_accuracy: {row['val_accuracy']:.4f} - "
            f"learning_rate: {row['learning_rate']:.2e} - {row['images_per_second']:.0f} images/s - "
            f"{row['epoch_seconds']:.1f} s"
        )


@dataclass(frozen=True)
class GlyphsMissing:
    """No font of this machine has some characters of the names in pictures."""

    characters: str

    def __str__(self) -> str:
        named = " ".join(self.characters[:_MOST_CHARACTERS])
        more = " ..." if len(self.characters) > _MOST_CHARACTERS else ""
        return (
            f"no font of this machine has {named}{more}: the pictures have boxes there; install a font with these "
            "characters on every node, such as the package fonts-noto-cjk for Chinese, Japanese and Korean"
        )


@dataclass(frozen=True)
class CheckpointsSetAside:
    """Checkpoints are damaged; the run goes on with what is whole."""

    damaged: tuple[str, ...]
    """What is wrong with each."""
    instead: str
    """What is used in their place."""

    def __str__(self) -> str:
        return f"{'; '.join(self.damaged)}; set aside: delete it when you have looked at it; {self.instead}"


@dataclass(frozen=True)
class StepProfiled:
    """Where the time of a training step goes, on the first worker; operations run beside each other."""

    steps: int
    """That were traced."""
    step_ms: float
    input_ms: float
    """Waiting for the batch."""
    all_reduce_ms: float
    """Adding up gradients, waiting for the others included."""
    compute_ms: float
    """All other operations, summed over threads."""
    slowest_ms: tuple[tuple[str, float], ...]
    """The types of operations that take most."""

    def __str__(self) -> str:
        slowest = ", ".join(f"{kind} {spent:.1f}" for kind, spent in self.slowest_ms)
        return (
            f"profile of {format_count(self.steps, 'step')}, ms a step: {self.step_ms:.1f} in all; "
            f"input {self.input_ms:.1f}, all-reduce {self.all_reduce_ms:.1f}, compute {self.compute_ms:.1f} over all "
            f"threads (most: {slowest}); "
            f"{self.advice}"
        )

    @property
    def advice(self) -> str:
        """What to do about the largest part."""
        if not self.slowest_ms:
            return "the trace names no operation: look at it in TensorBoard"
        if self.input_ms > 0.2 * self.step_ms:
            return "the device waits for images: keep the cache folder (XDG_CACHE_HOME) on a fast disk"
        if self.all_reduce_ms > 0.5 * self.step_ms:
            return "the workers wait for each other: use a larger batch a worker, or fewer workers"
        return "the device computes: try --precision auto, a smaller image or network, or more workers"


@dataclass(frozen=True)
class TrialStarted:
    """One worker of a trial of batch sizes has started."""

    memory_limit_gib: float
    """What this worker may use."""


@dataclass(frozen=True)
class LossesMeasured:
    """A trial took a few first steps of training."""

    precision: str
    losses: tuple[float, ...]
    """By step, from the seeded weights and in the order of the first epoch: comparable between precisions."""


@dataclass(frozen=True)
class SizeMeasured:
    """A trial took training steps of one batch size."""

    precision: str
    size: int
    """Images a step on one replica."""
    num_replicas: int
    seconds_per_step: float
    """Median, input included; compilation and the first step left out."""
    seconds_spread: float
    """Slowest step less the fastest."""
    synthetic_seconds_per_step: float
    """Median with the same images again and again, which cost nothing to make."""
    peak_memory_gib: float
    """Of the worker that used most."""

    @property
    def images_per_second(self) -> float:
        """Over all replicas."""
        return self.size * self.num_replicas / self.seconds_per_step

    def __str__(self) -> str:
        return (
            f"batch {self.num_replicas} x {self.size}, {self.precision}: {self.images_per_second:.0f} images/s, "
            f"{self.seconds_per_step * 1000:.0f} ms a step, {self.peak_memory_gib:.2f} GiB a worker"
        )


@dataclass(frozen=True)
class BatchChosen:
    """The batch and the precision of a run are settled."""

    explanation: str

    def __str__(self) -> str:
        return self.explanation


@dataclass(frozen=True)
class StudyTrialEnded:
    """A trial of a study has ended."""

    name: str
    outcome: str
    """What it tried and what came of it, in one line."""

    def __str__(self) -> str:
        return f"{self.name} {self.outcome}"


TrialEvent = TrialStarted | LossesMeasured | SizeMeasured
Event = (
    StageProgressed
    | SourceListed
    | ValueRangeFound
    | WorkersAwaited
    | WorkerSilent
    | WorkerHeardAgain
    | WorkersLost
    | AttemptStarted
    | RunStarted
    | WeightsTransferred
    | EpochFinished
    | GlyphsMissing
    | BatchChosen
    | CheckpointsSetAside
    | StepProfiled
    | StudyTrialEnded
    | TrialEvent
)
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Watches nothing."""
