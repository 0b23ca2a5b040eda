"""Find batch and precision by trials on the workers' own resources, and keep the measurements in the storage."""

from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from data_prep.manifest import Manifest
from trainer.batch.job import TrialJob, TrialResult
from trainer.batch.search import Goal, Known, Search, count_probes, next_probe, settle_precision
from trainer.config.batch_table import (
    SAFETY_MARGIN,
    BatchChoice,
    BatchTable,
    decide,
    describe_time,
    given_batch,
    largest_for_rows,
)
from trainer.config.config import BatchRequest, Settings, TrainConfig, check_shares
from trainer.config.request import RunRequest, resolve
from trainer.record.noise_scale import recall_noise_scale
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import BatchError, JobError, RecordError, WorkerDiedError, WorkersFailedError
from trainer.runtime.events import (
    BatchChosen,
    Event,
    LossesMeasured,
    OnEvent,
    SizeMeasured,
    SizeStarted,
    StageProgressed,
    TrialStarted,
    ignore_event,
)
from trainer.runtime.markdown import format_count
from trainer.workers.groups import WorkerCount, discard_kept_worker, run_workers

# An exception, or a worker that died: killed by the kernel or by `trainer.training.devices.killed_beyond`.
_OUT_OF_MEMORY = (MemoryError, WorkerDiedError)
# What the other workers raise when one dies, by name: the driver does not import TensorFlow.
_LOST_PEER = ("UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError")
_MOST_TRIALS = 8
# The first size of a search, in images: throughput stops rising at 8 to 64 on CPUs, and far beyond 128 on GPUs.
_FIRST_ON_CPU = 32
_FIRST_ON_GPU = 128
# Share of its epochs that a run can be counted on to take if it ends when validation stops improving.
_PATIENT_SHARE = 0.5
# A cached table is used if the memory of the nodes differs by at most this share from when it was measured.
_MEMORY_TOLERANCE = 0.1
# Settings that change neither time nor memory of a training step.
_NOT_IN_STEP = {
    "init_from",
    "schedule",
    "seed",
    "shuffle_window_gib",
    "cache_gib",
    "checkpoint_every",
    "keep_best",
    "evaluate_test",
    "save_probabilities",
    "export",
    # No size is compiled by XLA before it is chosen, and each step is measured by itself.
    "xla",
    "steps_per_execution",
}
_KEY_PACKAGES = ("ray", "tensorflow", "tf_keras")


def choose_batch(
    run: RunRequest,
    manifest: Manifest,
    num_workers: int,
    storage_uri: str,
    resources: Resources,
    *,
    noise_storage_uri: str = "",
    probe_again: bool = False,
    every_size: bool = False,
    on_event: OnEvent = ignore_event,
) -> BatchChoice:
    """Choose the batch and the precision of a run, from the cache or by trials.

    Args:
        run: request for the run.
        manifest: manifest of its dataset.
        num_workers: number of workers that share the batch.
        storage_uri: storage that keeps the tables.
        resources: resources of the connected cluster.
        noise_storage_uri: storage that keeps the noise scales of finished runs; empty for the same.
        probe_again: measure without using the cache.
        every_size: measure all sizes in all precisions, however long that takes.
        on_event: called with every size that is measured, and with the choice.

    Raises:
        BatchError: no batch fits, or the given one does not.
        JobError: the workers failed for a reason other than memory.
    """
    if given := _given_choice(run.batch, num_workers):
        return given
    noise = _find_noise(run, manifest, noise_storage_uri or storage_uri)
    goal: Goal = "every" if every_size else _goal(run.batch)
    search = _plan_search(run, manifest, num_workers, resources, noise[0], goal)
    uri = table_uri(run.settings, run.arch, run.batch, manifest, num_workers, storage_uri, resources)
    cached = None if probe_again else _read_table(uri, resources)
    if cached is None or next_probe(search, _recall(cached, search)) is not None:
        finder = _Finder(run, manifest, num_workers, resources, on_event)
        table = finder.find(search, cached)
        storage.write_bytes(uri, table.to_json())
    else:
        table = cached
    choice = _choose(run, table, manifest, num_workers, noise, storage.basename(uri))
    on_event(BatchChosen(choice.explanation))
    return choice


def recall_batch(
    run: RunRequest, manifest: Manifest, num_workers: int, storage_uri: str, resources: Resources
) -> BatchChoice | None:
    """Find the batch of a run without trials: the given one, or the choice from a table in the storage, else None.

    The arguments are those of `choose_batch`.

    Raises:
        BatchError: no batch fits, or the given one does not.
    """
    if given := _given_choice(run.batch, num_workers):
        return given
    uri = table_uri(run.settings, run.arch, run.batch, manifest, num_workers, storage_uri, resources)
    noise, table = _find_noise(run, manifest, storage_uri), _read_table(uri, resources)
    search = _plan_search(run, manifest, num_workers, resources, noise[0], _goal(run.batch))
    if table is None or next_probe(search, _recall(table, search)) is not None:
        return None
    return _choose(run, table, manifest, num_workers, noise, storage.basename(uri))


def describe_search(run: RunRequest, manifest: Manifest, num_workers: int, resources: Resources) -> str:
    """Return what would be measured for a run whose batch is not a number."""
    search = _plan_search(run, manifest, num_workers, resources, 0.0, _goal(run.batch))
    until = {
        "auto": "doubled while that shortens the time to a result, in at most a tenth of the run",
        "max": "then the largest that fits",
        "knee": "doubled while throughput rises",
    }[search.goal]
    return f"measured on the workers from {search.start} images per replica, {until}; at most {search.most}"


def _goal(request: BatchRequest) -> Goal:
    goals: dict[str, Goal] = {"auto": "auto", "max": "max", "knee": "knee"}
    return goals.get(request.global_batch_size, "given")


def _plan_search(
    run: RunRequest, manifest: Manifest, num_workers: int, resources: Resources, noise_scale: float, goal: Goal
) -> Search:
    most = largest_for_rows(manifest.splits["train"].rows, num_workers, run.batch.min_steps_per_epoch)
    on_cpu = max(1, _FIRST_ON_CPU // num_workers)
    start = min(most, _FIRST_ON_GPU if resources.num_gpus else on_cpu)
    if run.batch.given_size is not None:
        start = most = run.batch.given_size // num_workers
    config = _resolve_at(run, manifest, num_workers, start)
    images = _count_steps(config, manifest) * config.global_batch_size
    return Search(
        goal=goal,
        precisions=_precisions(run.batch, resources),
        start=start,
        most=most,
        noise_scale=noise_scale,
        images=round(images * _PATIENT_SHARE) if config.patience else images,
    )


def _precisions(request: BatchRequest, resources: Resources) -> tuple[str, ...]:
    if request.precision != "auto":
        return (request.precision,)
    # CPUs rarely have hardware for float16.
    return ("float32", "mixed_bfloat16", *(("mixed_float16",) if resources.num_gpus else ()))


def _resolve_at(
    run: RunRequest, manifest: Manifest, num_workers: int, size: int, precision: str = "float32"
) -> TrainConfig:
    return resolve(run, manifest, num_workers, given_batch(run.batch, size * num_workers, precision))


def _count_steps(config: TrainConfig, manifest: Manifest) -> int:
    return config.epochs * (manifest.splits["train"].rows // config.global_batch_size)


def _find_noise(run: RunRequest, manifest: Manifest, storage_uri: str) -> tuple[float, str]:
    return recall_noise_scale(run.arch, run.settings, manifest.fingerprint, storage_uri)


def _given_choice(request: BatchRequest, num_workers: int) -> BatchChoice | None:
    if request.given_size is None:
        return None
    check_shares(request.given_size, num_workers)
    return None if request.precision == "auto" else given_batch(request, request.given_size, request.precision)


def _choose(
    run: RunRequest, table: BatchTable, manifest: Manifest, num_workers: int, noise: tuple[float, str], table_name: str
) -> BatchChoice:
    request, (noise_scale, source) = run.batch, noise
    if not table.fitting:
        raise BatchError(_explain_misfit(request, table))
    if request.given_size is not None:
        return BatchChoice(
            request=request,
            global_batch_size=request.given_size,
            precision=table.precision,
            limit="given",
            explanation=f"global batch {request.given_size} as given; {table.precision_reason}",
            table=table,
            table_name=table_name,
        )
    choice = decide(request, table, manifest.splits["train"].rows, noise_scale)
    explanation = choice.explanation
    config = resolve(run, manifest, num_workers, choice)
    if minutes := describe_time(choice, _count_steps(config, manifest), may_end_early=config.patience > 0):
        explanation += f"; {minutes}, noise scale {source}"
    return choice.model_copy(update={"explanation": explanation, "table_name": table_name})


def measure_size(
    run: RunRequest, manifest: Manifest, num_workers: int, size: int, precision: str, resources: Resources
) -> SizeMeasured | None:
    """Measure one per-replica batch size in fresh processes; return None if it runs out of memory."""
    finder = _Finder(run, manifest, num_workers, resources, ignore_event)
    search = _plan_search(run, manifest, num_workers, resources, 0.0, "given")
    discard_kept_worker(resources)
    finder.run_trial(replace(search, precisions=(precision,), start=size, most=size))
    discard_kept_worker(resources)
    return next(iter(finder.known.rows(precision)), None)


def _explain_misfit(request: BatchRequest, table: BatchTable) -> str:
    measured = ", ".join(f"{one.peak_memory_gib:.2f} GiB for {format_count(one.size, 'image')}" for one in table.rows)
    died = f"{table.failed[table.precision]} ran out of memory" if table.precision in table.failed else ""
    return (
        f"--global-batch-size {request.global_batch_size}: no such batch fits into {table.memory_limit_gib:.2f} GiB "
        f"per worker, of which {SAFETY_MARGIN:.0%} stay free ({', '.join(filter(None, (measured, died)))}); give a "
        "smaller number, prepare smaller images, or give the workers more memory"
    )


def table_uri(
    settings: Settings,
    arch: str,
    batch: BatchRequest,
    manifest: Manifest,
    num_workers: int,
    storage_uri: str,
    resources: Resources,
) -> str:
    """Return the URI of the table for a run, made from everything that changes a step, but not the number of images."""
    values = settings.model_dump(exclude=_NOT_IN_STEP)
    key: dict[str, Any] = {
        "arch": arch,
        # The value of a float does not change the time of a step, unless it is zero and turns something off.
        **{name: bool(value) if isinstance(value, float) else value for name, value in values.items()},
        # A search for the augmentation takes steps with all of it as well.
        "augment": settings.augment != "none",
        "num_workers": num_workers,
        "image_size": manifest.image_size,
        "channels": manifest.channels,
        "num_classes": manifest.num_classes,
        "precision": batch.precision,
        "given_size": batch.given_size,
        "memory_limit_gib": batch.memory_limit_gib,
        "devices": resources.devices,
        "packages": {name: version(name) for name in _KEY_PACKAGES},
    }
    return storage.keyed_uri(storage_uri, "batch_sizes", key)


def forget_table(table_name: str, storage_uri: str) -> None:
    """Delete a table, so that the next run measures again."""
    storage.delete_file(storage.join(storage.resolve_uri(storage_uri), "batch_sizes", table_name))


def _read_table(uri: str, resources: Resources) -> BatchTable | None:
    try:
        table = BatchTable.parse(storage.read_bytes(uri), uri)
    except (FileNotFoundError, RecordError):
        return None  # a table of another version is measured again
    change = abs(resources.node_memory_gib / table.node_memory_gib - 1)
    return table if change <= _MEMORY_TOLERANCE else None


def _recall(table: BatchTable, search: Search) -> Known:
    known = Known(memory_limit_gib=table.memory_limit_gib, measured=table.measurements, failed=table.failed)
    if len(search.precisions) == 1 or len(table.measurements) > 1 or table.failed:
        return replace(known, precision=(table.precision, table.precision_reason))
    # The run that measured was too short to measure other precisions; this one may not be.
    return settle_precision(search, known)


class _Finder:
    """State of one search."""

    def __init__(
        self, run: RunRequest, manifest: Manifest, num_workers: int, resources: Resources, on_event: OnEvent
    ) -> None:
        self._run, self._manifest, self._num_workers, self._request = run, manifest, num_workers, run.batch
        self._resources, self._on_event = resources, on_event
        self.known = Known()
        self.trials = 0
        self._probes = 0

    def find(self, search: Search, cached: BatchTable | None) -> BatchTable:
        """Measure what a search needs in addition to a table, and return the complete table."""
        if cached is not None:
            self.known, self.trials = _recall(cached, search), cached.trials
        most = self.trials + _MOST_TRIALS
        while self.trials < most and not self.run_trial(search):
            pass
        self.known = settle_precision(search, self.known)
        precision, reason = self.known.precision or (search.precisions[0], "nothing was measured")
        return BatchTable(
            num_replicas=self._num_workers,
            memory_limit_gib=self.known.memory_limit_gib,
            node_memory_gib=self._resources.node_memory_gib,
            precision=precision,
            precision_reason=reason,
            measurements={precision: (), **self.known.measured},
            failed=dict(self.known.failed),
            trials=self.trials,
            measured=datetime.now(UTC),
        )

    def _describe_probe(self, search: Search, started: SizeStarted) -> StageProgressed:
        self._probes += 1
        detail = f"batch {self._num_workers} x {started.size}, {started.precision}"
        return StageProgressed("probe", self._probes, max(count_probes(search), self._probes), detail)

    def run_trial(self, search: Search) -> bool:
        """Measure in one group of processes, and return whether the search has ended.

        Whatever the processes sent before they ended or died is kept.
        """
        self.trials += 1
        probe = next_probe(search, settle_precision(search, self.known))
        # Workers may die before they report their first size.
        started = SizeStarted(probe.precisions[0], probe.size) if probe else None

        def collect(event: Event) -> None:
            nonlocal started
            if isinstance(event, TrialStarted):
                # A worker may be killed before it reports its limit.
                self.known = self.known.limit(event.memory_limit_gib)
            elif isinstance(event, SizeStarted):
                started = event
                self._on_event(self._describe_probe(search, event))
            elif isinstance(event, SizeMeasured | LossesMeasured):
                self.known = self.known.add(event)
                if isinstance(event, SizeMeasured):
                    started = None
                    self._on_event(event)

        count = self._num_workers
        config = _resolve_at(self._run, self._manifest, count, search.start, search.precisions[0])
        job = TrialJob(config, self._manifest, search, self.known, self._request.memory_limit_gib)

        def work(send_event: OnEvent) -> TrialResult:
            from trainer.batch.trial import run_trial

            return run_trial(job, send_event)

        self._on_event(StageProgressed(f"batch trial {self.trials}", 0, 1))
        if self.trials > 1:
            discard_kept_worker(self._resources)
        try:
            workers = WorkerCount(count, count, count)
            result: TrialResult = run_workers(
                work, "batch-trial", workers, self._resources, keep=True, on_event=collect
            )
        except WorkersFailedError as error:
            if not _ran_out_of_memory(error):
                raise JobError(f"a trial of batch sizes from {search.start} failed: {error}") from error
            # If the workers died after a size, that size did not fail.
            if started is not None:
                self.known = self.known.add_failure(started.precision, started.size)
            self.known = settle_precision(search, self.known)
            return next_probe(search, self.known) is None
        self.known = result.known
        return result.is_complete


def _ran_out_of_memory(error: WorkersFailedError) -> bool:
    return bool(error.causes) and all(
        isinstance(cause, _OUT_OF_MEMORY) or type(cause).__name__ in _LOST_PEER for cause in error.causes
    )
