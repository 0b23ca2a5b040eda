"""Events: what a job reports while it runs, each with its line for the log."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.runtime.markdown import format_count, format_loss

_MOST_CHARACTERS = 8


@dataclass(frozen=True)
class StageProgressed:
    """Part of a stage is finished, such as preparing a dataset or training."""

    stage: str
    done: int
    total: int
    detail: str = ""
    """What else is known by now, such as the epoch and the loss."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.done} of {self.total}" + (f", {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class TasksFinished:
    """Ray Data has finished the tasks of a stage."""

    stage: str
    statistics: str
    """What Ray Data says about their times, memory and rows, in lines."""

    def __str__(self) -> str:
        return f"{self.stage}: statistics of Ray Data\n{textwrap.indent(self.statistics.strip(), '  ')}"


@dataclass(frozen=True)
class EmbeddedDatasetChosen:
    """No dataset was given: the embedded one is used."""

    dataset: str
    """URI of the prepared dataset."""

    def __str__(self) -> str:
        return f"no --dataset: training on the embedded 5,000 MNIST digits, in {self.dataset}"


@dataclass(frozen=True)
class SourceListed:
    """What a source of images holds, judged by file names before any file is read."""

    images: int
    classes: int
    not_tried: str = ""
    """Files whose names are not those of images, counted by suffix."""
    left_behind: str = ""
    """Files left behind by operating systems, counted by kind."""
    unused_tables: str = ""
    """Tables next to folders of images."""
    empty_classes: str = ""
    """Classes that the source declares but has no image of."""

    @property
    def is_notable(self) -> bool:
        """Whether anything was left out."""
        return bool(self.not_tried or self.left_behind or self.unused_tables or self.empty_classes)

    def __str__(self) -> str:
        parts = [f"{format_count(self.images, 'file')} to read, {format_count(self.classes, 'class')}"]
        if self.not_tried:
            parts.append(f"not images by name: {self.not_tried}")
        if self.left_behind:
            parts.append(f"ignored: {self.left_behind}")
        if self.empty_classes:
            parts.append(f"classes left out because they have no image: {self.empty_classes}")
        if self.unused_tables:
            parts.append(f"classes come from the folders, not from {self.unused_tables}")
        return "; ".join(parts)


@dataclass(frozen=True)
class ValueRangeFound:
    """Images of a dataset have more than 8 bits per pixel; one range of values was chosen for all of them."""

    images: int
    found: str
    """The smallest and the largest value."""
    used: str
    """The values that become 0 and 255."""
    dark: int
    """Images whose values all stay below a tenth of the largest value used."""

    def __str__(self) -> str:
        return (
            f"{format_count(self.images, 'image')} with more than 8 bits per pixel, values {self.found}: the range "
            f"{self.used} becomes gray levels 0 to 255 in every image; set another range with --value-range LOW:HIGH"
            + (f"; {self.dark} of them stay below a tenth of the range" if self.dark else "")
        )


@dataclass(frozen=True)
class WorkersAwaited:
    """The cluster has no free resources for the workers of a run, at its start or after it lost some."""

    least: int
    """The fewest workers that the run can continue with."""
    seconds: float
    """Time since the driver last heard from a worker."""

    def __str__(self) -> str:
        workers = format_count(self.least, "worker")
        return f"waiting for resources for {workers}; no worker has answered for {self.seconds:.0f} s"


@dataclass(frozen=True)
class RunStarted:
    """The workers are about to start; the numbers say how the images are divided into steps."""

    global_batch_size: int
    num_replicas: int
    per_replica_batch_size: int
    steps_per_epoch: int
    rows: int
    """Images of the train split."""
    epochs: int
    finished_epochs: int
    """Greater than 0 if a run is continued."""
    normalizes_alone: bool = False
    """Whether BatchNorm has its statistics on each of several replicas from that one's images alone."""

    def __str__(self) -> str:
        dropped = self.rows - self.steps_per_epoch * self.global_batch_size
        text = (
            f"global batch {self.global_batch_size} = {format_count(self.num_replicas, 'replica')} x "
            f"{self.per_replica_batch_size}; {format_count(self.rows, 'image')}: "
            f"{format_count(self.steps_per_epoch, 'step')} per epoch"
            + (f", {dropped} dropped (different images each epoch)" if dropped else "")
            + f"; {format_count(self.epochs, 'epoch')} = {format_count(self.epochs * self.steps_per_epoch, 'step')}"
        )
        if self.normalizes_alone:
            text += f"; BatchNorm, if there is any, over the {self.per_replica_batch_size} images of a replica"
        return text + (f"; continuing after epoch {self.finished_epochs}" if self.finished_epochs else "")


@dataclass(frozen=True)
class WorkerSilent:
    """A worker is stopped or cannot be reached; the others wait for it."""

    worker: str
    """Description of the worker."""
    seconds: float
    """Time since the driver last heard from it."""

    def __str__(self) -> str:
        return f"{self.worker} has not answered for {self.seconds:.0f} s; training waits for it"


@dataclass(frozen=True)
class WorkerHeardAgain:
    """A worker that was silent answers again."""

    worker: str
    """Description of the worker."""
    seconds: float
    """Time for which it was silent."""

    def __str__(self) -> str:
        return f"{self.worker} answers again after {self.seconds:.0f} s"


@dataclass(frozen=True)
class WorkersLost:
    """Workers died or failed; all of them are restarted."""

    reason: str
    """Which workers failed, and how."""
    log: str
    """Host and path of the log of the first of them; empty if it is lost too."""
    tail: bytes
    """The end of that log."""
    failures: int
    """Failures so far, including this one."""
    max_failures: int

    def __str__(self) -> str:
        log = f"; its log: {self.log}" if self.log else ""
        return (
            f"{self.reason}{log}\nthe workers restart from the last checkpoint: failure {self.failures} of "
            f"{self.max_failures} allowed by --max-failures"
        )


@dataclass(frozen=True)
class StartFailed:
    """A worker died before it began to train; all workers are started again."""

    reason: str
    """Which process died, and how."""

    def __str__(self) -> str:
        return f"{self.reason}; the workers are started again"


@dataclass(frozen=True)
class AttemptStarted:
    """The workers have restarted and continue."""

    attempt: int
    """Number of the attempt, 2 or more."""
    step: int
    """Optimizer steps that are already done."""
    epoch: int
    """Epoch in which it continues."""
    num_workers: int
    previous_num_workers: int = 0
    """Workers of the previous attempt; 0 if unknown."""

    def __str__(self) -> str:
        workers = format_count(self.num_workers, "worker")
        if self.previous_num_workers not in (0, self.num_workers):
            workers += f" instead of {self.previous_num_workers}"
        return f"attempt {self.attempt} continues after step {self.step}, in epoch {self.epoch}, with {workers}"


@dataclass(frozen=True)
class WeightsTransferred:
    """Part of the network starts from transferred weights."""

    transferred: str
    """Which layers were loaded and which were not."""

    def __str__(self) -> str:
        return self.transferred


@dataclass(frozen=True)
class Tf32Used:
    """A run in float32 computes in less than that."""

    def __str__(self) -> str:
        return (
            "float32: this GPU multiplies in TF32, with 10 bits instead of 23, and adds in float32; "
            "NVIDIA_TF32_OVERRIDE=0 turns that off"
        )


@dataclass(frozen=True)
class XlaWeighed:
    """Whether the training step is compiled by XLA was decided, from its first steps."""

    steps: int = 0
    """Optimizer steps left if all epochs are trained."""
    saved_seconds: float = 0.0
    """What they take less if they are compiled, as an estimate."""
    compile_seconds: float = 0.0
    """What compiling takes, as an estimate."""
    obstacle: str = ""
    """Why it cannot be compiled; empty if it can."""

    @property
    def is_worthwhile(self) -> bool:
        """Whether it is compiled."""
        return not self.obstacle and self.saved_seconds > self.compile_seconds

    def __str__(self) -> str:
        if self.obstacle:
            return f"the training step is not compiled by XLA: {self.obstacle}"
        return (
            f"XLA would save about {self.saved_seconds:.0f} s of the {format_count(self.steps, 'step')} left, and take "
            f"about {self.compile_seconds:.0f} s to compile: {'on' if self.is_worthwhile else 'off'}"
        )


@dataclass(frozen=True)
class StepsPerExecutionChosen:
    """How many training steps a call takes was decided, from the first steps."""

    steps: int
    seconds_per_step: float
    """While a call took one."""

    def __str__(self) -> str:
        return f"a training step takes {self.seconds_per_step * 1000:.1f} ms: {self.steps} in each call from here on"


@dataclass(frozen=True)
class StepCompiling:
    """XLA starts to compile the training step, which can take a minute."""

    def __str__(self) -> str:
        return "compiling the training step by XLA; the cache folder keeps it for runs of the same network and batch"


@dataclass(frozen=True)
class StepCompiled:
    """The first compiled step was taken."""

    seconds: float
    """What it took, with tracing and compiling."""

    def __str__(self) -> str:
        return f"compiled the training step in {self.seconds:.1f} s"


@dataclass(frozen=True)
class EpochFinished:
    """An epoch has been trained and evaluated."""

    row: dict[str, Any]
    """Metrics by name, as in ``metrics.parquet``."""
    epochs: int

    def __str__(self) -> str:
        row = self.row
        return (
            f"epoch {row['epoch']:.0f}/{self.epochs} - "
            f"loss: {format_loss(row['loss'])} - accuracy: {row['accuracy']:.4f} - "
            f"val_loss: {format_loss(row['val_loss'])} - val_accuracy: {row['val_accuracy']:.4f} - "
            f"learning_rate: {row['learning_rate']:.2e} - {row['images_per_second']:.0f} images/s - "
            f"{row['epoch_seconds']:.1f} s - {row['stage']}, augmentation: {row['augmentation']}"
        )

    @property
    def short(self) -> str:
        """What a terminal of 80 columns shows in one line."""
        row = self.row
        seconds = row["epoch_seconds"]
        return (
            f"epoch {row['epoch']:.0f}/{self.epochs}  loss {format_loss(row['loss'])}  acc {row['accuracy']:.4f}  "
            f"val {format_loss(row['val_loss'])} / {row['val_accuracy']:.4f}  "
            f"{seconds:.{0 if seconds >= 100 else 1}f} s  {row['stage']}"
        )


@dataclass(frozen=True)
class AugmentationChosen:
    """Candidates for the augmentation were compared, or an earlier run has compared them."""

    augmentation: str
    evidence: str

    def __str__(self) -> str:
        return f"augmentation: {self.augmentation}; {self.evidence}"


@dataclass(frozen=True)
class GlyphsMissing:
    """No font on this machine has some of the characters that pictures need."""

    characters: str

    def __str__(self) -> str:
        named = " ".join(self.characters[:_MOST_CHARACTERS])
        more = " ..." if len(self.characters) > _MOST_CHARACTERS else ""
        return (
            f"no font on this machine has {named}{more}: pictures show boxes instead; install a font with these "
            "characters on every node, such as the package fonts-noto-cjk for Chinese, Japanese and Korean"
        )


@dataclass(frozen=True)
class CheckpointsSetAside:
    """Checkpoints are damaged; the run continues from an intact one."""

    damaged: tuple[str, ...]
    """What is wrong with each."""
    instead: str
    """What is used instead."""

    def __str__(self) -> str:
        return f"{'; '.join(self.damaged)}; set aside, delete it after you have looked at it; {self.instead}"


@dataclass(frozen=True)
class RecordRepaired:
    """A record of the run was damaged and has been replaced."""

    damage: str
    """What is wrong with it."""
    kept: str
    """URI of the damaged one; empty if it was missing."""
    instead: str
    """What takes its place."""

    def __str__(self) -> str:
        kept = f"; kept as {self.kept}" if self.kept else ""
        return f"{self.damage}{kept}; {self.instead}"


@dataclass(frozen=True)
class StepProfiled:
    """Where the time of a training step goes, on the first worker; operations run in parallel."""

    steps: int
    """Number of traced steps."""
    step_ms: float
    input_ms: float
    """Time spent waiting for the batch."""
    all_reduce_ms: float
    """Time spent adding up gradients, including the wait for other workers."""
    compute_ms: float
    """Time of all other operations, summed over threads."""
    slowest_ms: tuple[tuple[str, float], ...]
    """The types of operations that take the most time."""

    def __str__(self) -> str:
        slowest = ", ".join(f"{kind} {spent:.1f}" for kind, spent in self.slowest_ms)
        return (
            f"profile of {format_count(self.steps, 'step')}, ms per step: {self.step_ms:.1f} in total; "
            f"input {self.input_ms:.1f}, all-reduce {self.all_reduce_ms:.1f}, compute {self.compute_ms:.1f} over all "
            f"threads (most: {slowest}); {self.advice}"
        )

    @property
    def advice(self) -> str:
        """How to shorten the largest part."""
        if not self.slowest_ms:
            return "the trace names no operation: look at it in TensorBoard"
        if self.input_ms > 0.2 * self.step_ms:
            return "the device waits for images: keep the cache folder (XDG_CACHE_HOME) on a fast disk"
        if self.all_reduce_ms > 0.5 * self.step_ms:
            return "the workers wait for each other: use a larger batch per worker, or fewer workers"
        return "the device computes: try --precision auto, a smaller image or network, or more workers"


@dataclass(frozen=True)
class TrialStarted:
    """One worker of a batch size trial has started, or knows better how much memory it may use."""

    memory_limit_gib: float
    """Memory that this worker may use."""


@dataclass(frozen=True)
class LossesMeasured:
    """A trial took the first few steps of training."""

    precision: str
    losses: tuple[float, ...]
    """Loss of each step, from the seeded weights and in the order of the first epoch, so that precisions compare."""


@dataclass(frozen=True)
class SizeStarted:
    """A trial is about to take training steps with one batch size, which may be its end."""

    precision: str
    size: int


@dataclass(frozen=True)
class SizeMeasured:
    """A trial took training steps with one batch size."""

    precision: str
    size: int
    """Images per step on one replica."""
    num_replicas: int
    seconds_per_step: float
    """Median, including input, without compilation and the first step."""
    seconds_spread: float
    """Slowest step minus the fastest."""
    synthetic_seconds_per_step: float
    """Median when every step uses the same batch, so that input costs nothing."""
    peak_memory_gib: float
    """Peak memory of the worker that used the most."""
    seconds: float = 0.0
    """Duration of the measurement, with building and compiling."""
    alone: bool = True
    """Whether the processes held no other network and no larger size before: else the memory is an upper bound."""

    @property
    def images_per_second(self) -> float:
        """Images per second over all replicas."""
        return self.size * self.num_replicas / self.seconds_per_step

    def __str__(self) -> str:
        return (
            f"batch {self.num_replicas} x {self.size}, {self.precision}: {self.images_per_second:.0f} images/s, "
            f"{self.seconds_per_step * 1000:.0f} ms per step, {self.peak_memory_gib:.2f} GiB per worker"
        )


@dataclass(frozen=True)
class BatchChosen:
    """The batch and the precision of a run have been chosen."""

    explanation: str

    def __str__(self) -> str:
        return self.explanation


@dataclass(frozen=True)
class StudyTrialEnded:
    """A trial of a study has ended."""

    name: str
    outcome: str
    """What it tried and the result, in one line."""

    def __str__(self) -> str:
        return f"{self.name} {self.outcome}"


TrialEvent = TrialStarted | LossesMeasured | SizeStarted | SizeMeasured
Event = (
    StageProgressed
    | TasksFinished
    | EmbeddedDatasetChosen
    | SourceListed
    | ValueRangeFound
    | WorkersAwaited
    | WorkerSilent
    | WorkerHeardAgain
    | WorkersLost
    | StartFailed
    | AttemptStarted
    | AugmentationChosen
    | RunStarted
    | WeightsTransferred
    | Tf32Used
    | XlaWeighed
    | StepsPerExecutionChosen
    | StepCompiling
    | StepCompiled
    | EpochFinished
    | GlyphsMissing
    | BatchChosen
    | CheckpointsSetAside
    | RecordRepaired
    | StepProfiled
    | StudyTrialEnded
    | TrialEvent
)
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Ignore an event."""
