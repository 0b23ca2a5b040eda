"""Find batch and precision by trials on the workers' own resources, and keep the measurements in the storage."""

import hashlib
import json
import math
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from data_prep.manifest import Manifest
from trainer.config.batch_table import (
    SAFETY_MARGIN,
    BatchChoice,
    BatchTable,
    choose_precision,
    decide,
    given_batch,
    ladder,
    largest_for_rows,
    next_size,
)
from trainer.config.config import BatchRequest, check_shares
from trainer.config.request import RunRequest, resolve
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import BatchError, JobError, RecordError, WorkerDiedError, WorkersFailedError
from trainer.runtime.events import (
    BatchChosen,
    Event,
    LossesMeasured,
    OnEvent,
    SizeMeasured,
    StageProgressed,
    TrialStarted,
    ignore_event,
)
from trainer.runtime.markdown import format_count
from trainer.training.job import TrialJob
from trainer.workers.groups import WorkerCount, run_workers

# An exception, or a worker that died: killed by the kernel or by `trainer.training.devices.kill_beyond`.
_OUT_OF_MEMORY = (MemoryError, WorkerDiedError)
# What the other workers raise when one dies, by name: the driver does not import TensorFlow.
_LOST_PEER = ("UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError")
_MOST_TRIALS = 8
_FIRST_SIZE = 8
# A cached table is used if the memory of the nodes differs by at most this share from when it was measured.
_MEMORY_TOLERANCE = 0.1
# Settings that change neither time nor memory of a training step.
_NOT_IN_STEP = {
    "init_from",
    "schedule",
    "seed",
    "checkpoint_every",
    "keep_best",
    "evaluate_test",
    "export",
}
_KEY_PACKAGES = ("ray", "tensorflow", "tf_keras")


def choose_batch(
    run: RunRequest,
    manifest: Manifest,
    num_workers: int,
    storage_uri: str,
    resources: Resources,
    *,
    probe_again: bool = False,
    on_event: OnEvent = ignore_event,
) -> BatchChoice:
    """Choose the batch and the precision of a run, from the cache or by trials.

    Args:
        run: request for the run.
        manifest: manifest of its dataset.
        num_workers: number of workers that share the batch.
        storage_uri: storage that keeps the tables.
        resources: resources of the connected cluster.
        probe_again: measure without using the cache.
        on_event: called with every size that is measured, and with the choice.

    Raises:
        BatchError: no batch fits, or the given one does not.
        JobError: the workers failed for a reason other than memory.
    """
    if given := _given_choice(run.batch, num_workers):
        return given
    sizes = trial_sizes(run, manifest, num_workers)
    uri = table_uri(run, manifest, num_workers, storage_uri, resources)
    finder = _Finder(run, manifest, num_workers, resources, on_event)
    cached = None if probe_again else _read_table(uri, resources)
    if cached is not None:
        finder.use(cached)
    table = finder.find(sizes[-1], sizes)
    if cached is not None and table.trials == cached.trials:
        table = cached
    else:
        storage.write_bytes(uri, table.to_json())
    choice = _choose(run.batch, table, manifest)
    on_event(BatchChosen(choice.explanation))
    return choice


def recall_batch(
    run: RunRequest, manifest: Manifest, num_workers: int, storage_uri: str, resources: Resources
) -> BatchChoice | None:
    """Find the batch of a run without trials: the given one, or the choice from a table in the storage, else None.

    The arguments are those of `choose_batch`, which may still measure more sizes if the dataset has grown.

    Raises:
        BatchError: no batch fits, or the given one does not.
    """
    if given := _given_choice(run.batch, num_workers):
        return given
    table = _read_table(table_uri(run, manifest, num_workers, storage_uri, resources), resources)
    return _choose(run.batch, table, manifest) if table is not None else None


def trial_sizes(run: RunRequest, manifest: Manifest, num_workers: int) -> tuple[int, ...]:
    """Return the per-replica batch sizes that the first trial of each precision measures, in ascending order."""
    if run.batch.given_size is not None:
        return (run.batch.given_size // num_workers,)
    rows = manifest.splits["train"].rows
    return ladder(_FIRST_SIZE, largest_for_rows(rows, num_workers, run.batch.min_steps_per_epoch))


def _given_choice(request: BatchRequest, num_workers: int) -> BatchChoice | None:
    if request.given_size is None:
        return None
    check_shares(request.given_size, num_workers)
    return None if request.precision == "auto" else given_batch(request, request.given_size, request.precision)


def _choose(request: BatchRequest, table: BatchTable, manifest: Manifest) -> BatchChoice:
    if not table.fitting:
        raise BatchError(_explain_misfit(request, table))
    if request.given_size is None:
        return decide(request, table, manifest.splits["train"].rows)
    return BatchChoice(
        request=request,
        global_batch_size=request.given_size,
        precision=table.precision,
        limit="given",
        explanation=f"global batch {request.given_size} as given; {table.precision_reason}",
        table=table,
    )


def measure_size(
    run: RunRequest, manifest: Manifest, num_workers: int, size: int, precision: str, resources: Resources
) -> SizeMeasured | None:
    """Measure one per-replica batch size in fresh processes; return None if it runs out of memory."""
    finder = _Finder(run, manifest, num_workers, resources, ignore_event)
    finder.run_trial((size,), precision)
    return next(iter(finder.measured[precision]), None)


def _explain_misfit(request: BatchRequest, table: BatchTable) -> str:
    measured = ", ".join(f"{one.peak_memory_gib:.2f} GiB for {format_count(one.size, 'image')}" for one in table.rows)
    died = f"{table.failed[table.precision]} ran out of memory" if table.precision in table.failed else ""
    return (
        f"--global-batch-size {request.global_batch_size}: no such batch fits into {table.memory_limit_gib:.2f} GiB "
        f"per worker, of which {SAFETY_MARGIN:.0%} stay free ({', '.join(filter(None, (measured, died)))}); give a "
        "smaller number, prepare smaller images, or give the workers more memory"
    )


def table_uri(run: RunRequest, manifest: Manifest, num_workers: int, storage_uri: str, resources: Resources) -> str:
    """Return the URI of the table for a run: it depends on all that changes a step, but not on the number of images."""
    settings = run.settings.model_dump(exclude=_NOT_IN_STEP)
    key: dict[str, Any] = {
        "arch": run.arch,
        # The value of a float does not change the time of a step, unless it is zero and turns something off.
        **{name: bool(value) if isinstance(value, float) else value for name, value in settings.items()},
        "num_workers": num_workers,
        "image_size": manifest.image_size,
        "channels": manifest.channels,
        "num_classes": manifest.num_classes,
        "precision": run.batch.precision,
        "given_size": run.batch.given_size,
        "memory_limit_gib": run.batch.memory_limit_gib,
        "devices": resources.devices,
        "packages": {name: version(name) for name in _KEY_PACKAGES},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return storage.join(storage.resolve_uri(storage_uri), "batch_sizes", f"{name}.json")


def _read_table(uri: str, resources: Resources) -> BatchTable | None:
    try:
        table = BatchTable.parse(storage.read_bytes(uri), uri)
    except (FileNotFoundError, RecordError):
        return None  # a table of another version is measured again
    change = abs(resources.node_memory_gib / table.node_memory_gib - 1)
    return table if change <= _MEMORY_TOLERANCE else None


class _Finder:
    """State of one search."""

    def __init__(
        self, run: RunRequest, manifest: Manifest, num_workers: int, resources: Resources, on_event: OnEvent
    ) -> None:
        self._run, self._manifest, self._num_workers, self._request = run, manifest, num_workers, run.batch
        self._resources, self._on_event = resources, on_event
        self.measured: dict[str, tuple[SizeMeasured, ...]] = {}
        self._failed: dict[str, int] = {}
        self._losses: dict[str, tuple[float, ...]] = {}
        # A worker may be killed before it reports its limit.
        self._memory_limit_gib = run.batch.memory_limit_gib or math.inf
        self._chosen: tuple[str, str] | None = None
        self.trials = 0

    def use(self, table: BatchTable) -> None:
        """Start from the measurements of a table."""
        self.measured, self._failed, self.trials = dict(table.measurements), dict(table.failed), table.trials
        self._memory_limit_gib, self._chosen = table.memory_limit_gib, (table.precision, table.precision_reason)

    def find(self, most: int, sizes: tuple[int, ...]) -> BatchTable:
        """Measure sizes in each requested precision, then search for the largest that fits in the best one."""
        if self._chosen is None:
            for precision in self._precisions():
                self.run_trial(sizes, precision, compare_losses=True)
            self._chosen = self._choose_precision()
        precision, first = self._chosen[0], self.trials
        # The limit applies to the trials of this search, not to those of a table from the cache.
        while self.trials < first + _MOST_TRIALS - len(self.measured):
            size = next_size(self.measured[precision], self._failed.get(precision), most, self._memory_limit_gib)
            if size is None or self._request.global_batch_size == "knee" or self._request.given_size:
                break
            self.run_trial((size,), precision)
        return BatchTable(
            num_replicas=self._num_workers,
            memory_limit_gib=self._memory_limit_gib,
            node_memory_gib=self._resources.node_memory_gib,
            precision=precision,
            precision_reason=self._chosen[1],
            measurements=self.measured,
            failed=self._failed,
            trials=self.trials,
            measured=datetime.now(UTC),
        )

    def _choose_precision(self) -> tuple[str, str]:
        given = self._request.precision
        if given != "auto":
            return given, f"{given} as given"
        able = {name: rows for name, rows in self.measured.items() if rows}
        return choose_precision(able, self._losses) if able else ("float32", "nothing fits")

    def _precisions(self) -> tuple[str, ...]:
        if self._request.precision != "auto":
            return (self._request.precision,)
        # CPUs rarely have hardware for float16.
        return ("float32", "mixed_bfloat16", *(("mixed_float16",) if self._resources.num_gpus else ()))

    def run_trial(self, sizes: tuple[int, ...], precision: str, *, compare_losses: bool = False) -> None:
        """Measure some sizes in one group of fresh processes, and keep what they sent before they ended or died."""
        self.trials += 1
        seen: list[SizeMeasured] = []

        def collect(event: Event) -> None:
            if isinstance(event, TrialStarted):
                self._memory_limit_gib = min(event.memory_limit_gib, self._memory_limit_gib)
            elif isinstance(event, LossesMeasured):
                self._losses[event.precision] = event.losses
            elif isinstance(event, SizeMeasured):
                seen.append(event)
                self._on_event(event)

        count = self._num_workers
        first = given_batch(self._request, sizes[0] * count, precision)
        config = resolve(self._run, self._manifest, count, first)
        job = TrialJob(
            config,
            self._manifest,
            sizes,
            self._request.memory_limit_gib,
            memory_share=1 - SAFETY_MARGIN,
            compare_losses=compare_losses,
            reference=self.measured.get("float32", ()),
        )

        def work(send_event: OnEvent) -> None:
            from trainer.batch.trial import run_trial

            run_trial(job, send_event)

        self._on_event(StageProgressed(f"batch trial {self.trials}", 0, 1))
        try:
            workers = WorkerCount(count, count, count)
            run_workers(work, "batch-trial", workers, self._resources, on_event=collect)
        except WorkersFailedError as error:
            if not _ran_out_of_memory(error):
                raise JobError(f"a trial of batch sizes {sizes} failed: {error}") from error
            # Sizes are measured in order; if the workers died after the last one, none of them failed.
            if len(seen) < len(sizes):
                failed = sizes[len(seen)]
                self._failed[precision] = min(failed, self._failed.get(precision, failed))
        known = {one.size: one for one in (*self.measured.get(precision, ()), *seen)}
        self.measured[precision] = tuple(known[size] for size in sorted(known))


def _ran_out_of_memory(error: WorkersFailedError) -> bool:
    return bool(error.causes) and all(
        isinstance(cause, _OUT_OF_MEMORY) or type(cause).__name__ in _LOST_PEER for cause in error.causes
    )
