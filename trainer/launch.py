"""Start a run from the driver: check everything that can be checked, run the workers, close the run folder.

`jobs/train.py` and `jobs/sweep.py` start runs through `launch` alone.
"""

import contextlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import ray

from data_prep.manifest import Manifest, read_manifest
from trainer.architectures import ARCHITECTURES
from trainer.batch.finder import choose_batch, forget_table, measure_size
from trainer.config.batch_table import (
    BatchChoice,
    find_bottlenecks,
    find_contradiction,
    find_noise_surprise,
    given_batch,
)
from trainer.config.config import TrainConfig, find_differences, replace_values, resize_batch
from trainer.config.pretrained import fetch_published, find_published
from trainer.config.recipes import describe_rescaling
from trainer.config.request import RunRequest, resolve
from trainer.notes.diagnostics import History, find_symptoms
from trainer.notes.note import compare_with_previous, find_compared, write_note
from trainer.record import checkpoint as checkpoints
from trainer.record.augmentation_choice import AugmentationChoice, describe_trials, read_choice, write_choice
from trainer.record.epoch_row import Metrics, main_path
from trainer.record.evaluation_result import average_last, summarise
from trainer.record.last_run import replace_last_run
from trainer.record.noise_scale import remember_noise_scale, summarize_noise
from trainer.record.run_folder import RunFolder, RunInterruption, RunRecord, RunResult, describe_run
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError, JobError, WorkerDiedError, WorkersFailedError
from trainer.runtime.events import (
    AttemptStarted,
    AugmentationChosen,
    BatchChosen,
    EmbeddedDatasetChosen,
    EpochFinished,
    Event,
    GlyphsMissing,
    OnEvent,
    RunStarted,
    StageProgressed,
    WorkersLost,
    ignore_event,
)
from trainer.runtime.folders import cache_folder
from trainer.runtime.gauges import serve_metrics
from trainer.runtime.lease import hold_lease
from trainer.runtime.markdown import format_count
from trainer.runtime.signals import failure_reason, received_signal
from trainer.training.dataset import load_manifest
from trainer.training.job import WorkerJob, WorkerResult
from trainer.training.tracking import FinishedRun, end_trackers
from trainer.workers.groups import WorkerCount, needs_cluster, parse_num_workers, run_workers


def check_dataset(arch: str, dataset: str) -> Manifest:
    """Return the manifest of a dataset that an architecture can be trained on.

    Raises:
        InputError: there is no committed dataset, or the architecture cannot take it.
    """
    manifest = load_manifest(storage.resolve_uri(dataset))
    smallest = ARCHITECTURES[arch].min_image_size
    if manifest.image_size < smallest:
        raise InputError(
            f"--arch {arch} needs images of {smallest}x{smallest} pixels or more, {dataset} has "
            f"{manifest.image_size}x{manifest.image_size}; prepare it with --image-size {smallest} or more"
        )
    for split in ("train", "val"):
        if not manifest.splits[split].rows:
            largest = max(map(sum, zip(*(one.rows_per_class for one in manifest.splits.values()), strict=True)))
            raise InputError(
                f"{dataset} has no {split} images: its largest class has {largest}, and --val-fraction was "
                f"{manifest.val_fraction:g}; prepare it again with more images"
                + (" or a larger --val-fraction" if largest > 1 else "")
            )
    return manifest


def embedded_image_size(arch: str) -> int:
    """Return the image size of the embedded dataset for an architecture, in pixels.

    It is as small as the architecture allows: enlarged digits take time and tell a network nothing.
    """
    return max(28, ARCHITECTURES[arch].min_image_size)


def embedded_dataset(arch: str, storage_uri: str) -> tuple[str, int]:
    """Return where the embedded dataset of an architecture is kept, and its image size in pixels.

    Raises:
        InputError: it is kept in the cache of this machine, which cannot be written.
    """
    image_size = embedded_image_size(arch)
    root = storage.resolve_uri(storage_uri)
    folder = str(cache_folder()) if storage.is_local(root) else root
    return storage.join(folder, "datasets", f"mnist-5000-{image_size}"), image_size


def choose_dataset(
    request: RunRequest, storage_uri: str, prepare: Callable[[str, int, OnEvent], str], on_event: OnEvent
) -> RunRequest:
    """Return the request with a dataset: its own, or the embedded one, which is prepared if it does not exist yet.

    Args:
        request: the request.
        storage_uri: storage of the runs.
        prepare: `data_prep.embedded.prepare_embedded`, which this package must not import.
        on_event: called with the progress of the preparation.
    """
    if request.dataset:
        return request
    dataset, image_size = embedded_dataset(request.arch, storage_uri)
    on_event(EmbeddedDatasetChosen(dataset))
    return request.on_dataset(prepare(dataset, image_size, on_event))


def needs_one_process(request: RunRequest, storage_uri: str) -> bool:
    """Return whether one worker does everything: the dataset exists, and ``--num-workers`` asks for no more.

    The embedded dataset, for which ``dataset`` is empty, is prepared once, on a cluster.

    Raises:
        InputError: `parse_num_workers` does not accept ``num_workers``.
    """
    if needs_cluster(request.num_workers):
        return False
    return bool(request.dataset) or read_manifest(embedded_dataset(request.arch, storage_uri)[0]) is not None


@contextlib.contextmanager
def open_run(
    storage_uri: str, run_name: str, arch: str, resources: Resources, *, wait: bool = False
) -> Iterator[RunFolder]:
    """Yield a new or existing run folder, which no other job can open during the context.

    Args:
        storage_uri: storage of the run folders.
        run_name: name of the run; empty for one made from the architecture and the time.
        arch: architecture of the run.
        resources: resources of the cluster.
        wait: wait until the lease expires, in case the job that holds the run is dead.

    Raises:
        InputError: the name is not allowed, the nodes do not share the storage, or another job holds the run.
    """
    name = run_name or f"{arch}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    _check_run_name(name)
    uri = storage.join(storage.resolve_uri(storage_uri), name)
    check_shared("--storage", uri, resources)
    with hold_lease(storage.join(uri, "lease.json"), f"run {name}", wait=wait) as lease:
        yield RunFolder(uri, lease)


def _check_run_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"--run-name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )


def check_shared(option: str, uri: str, resources: Resources) -> None:
    """Raise InputError if the nodes of the cluster do not share a place."""
    if storage.is_local(uri) and resources.num_nodes > 1:
        raise InputError(
            f"{option} {uri} is a local path and the cluster has {resources.num_nodes} nodes, which do not share it; "
            "give s3://bucket/prefix"
        )


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before the workers of a run start."""

    config: TrainConfig
    manifest: Manifest
    batch: BatchChoice
    workers: WorkerCount
    command: str = ""
    """Command line that starts the same run; empty for that of this process."""


def check_request(request: RunRequest, storage_uri: str, run_name: str = "") -> None:
    """Check everything that does not depend on the cluster, before connecting to one.

    Args:
        request: request for the run.
        storage_uri: storage of the runs; access to it is tried.
        run_name: name of the run; empty for a generated one.

    Raises:
        InputError: something is wrong.
    """
    if run_name:
        _check_run_name(run_name)
    storage.check_access(storage.resolve_uri(storage_uri))
    if request.dataset:
        _check_fits(request, check_dataset(request.arch, request.dataset))


def load_checked_manifest(request: RunRequest, resources: Resources) -> Manifest:
    """Load the manifest of a request's dataset.

    Raises:
        InputError: the nodes do not share the dataset, or it lacks what the request needs.
    """
    check_shared("--dataset", request.dataset, resources)
    manifest = check_dataset(request.arch, request.dataset)
    _check_fits(request, manifest)
    return manifest


def _check_fits(request: RunRequest, manifest: Manifest) -> None:
    """Raise InputError if a dataset lacks what a request needs, or if the weights to start from do not exist."""
    rows, settings, given_size = manifest.splits["train"].rows, request.settings, request.batch.given_size
    if given_size is not None and given_size > rows:
        raise InputError(
            f"--global-batch-size {given_size} is more than the {format_count(rows, 'train image')} of "
            f"{request.dataset}; give {rows} or less"
        )
    is_location = settings.init_from and not find_published(settings.init_from)
    if is_location and not storage.exists(settings.init_from):
        raise InputError(
            f"--init-from {settings.init_from}: there is no such run or file; give a run folder or a weights file "
            "(.safetensors or .h5), or keras:NAME"
        )
    if settings.export == "onnx" and importlib.util.find_spec("tf2onnx") is None:
        raise InputError("--export onnx needs a package that is not installed: pip install -e '.[onnx]'")
    if settings.evaluate_test and not manifest.splits["test"].rows:
        raise InputError(f"--evaluate-test: {request.dataset} has no test images; prepare it with a --test-fraction")


def measure_batches(
    request: RunRequest,
    storage_uri: str,
    resources: Resources,
    *,
    probe_again: bool = False,
    on_event: OnEvent = ignore_event,
) -> tuple[BatchChoice, list[str]]:
    """Find the batch that a run with this request would use, and what keeps larger ones from being faster.

    Args:
        request: request for the run.
        storage_uri: storage of the runs, which also keeps the tables.
        resources: resources of the connected cluster.
        probe_again: measure even if the storage has a table.
        on_event: called with the events of the trials.

    Raises:
        InputError: a value is not allowed, or no batch fits.
        JobError: a trial failed.
    """
    manifest = load_checked_manifest(request, resources)
    num_workers = parse_num_workers(request.num_workers, resources).now
    root = storage.resolve_uri(storage_uri)
    choice = choose_batch(
        request, manifest, num_workers, root, resources, probe_again=probe_again, every_size=True, on_event=on_event
    )
    if choice.table is None:
        return choice, []
    alone = None
    if choice.table.num_replicas > 1:
        alone = measure_size(request, manifest, 1, choice.table.knee.size, choice.precision, resources)
    return choice, find_bottlenecks(choice.table, alone)


def plan_run(
    request: RunRequest,
    run: RunFolder,
    resources: Resources,
    *,
    memory_uri: str = "",
    probe_again: bool = False,
    on_event: OnEvent = ignore_event,
) -> RunPlan:
    """Make the complete config of a run; values that the request leaves open are measured, or those the run began with.

    Args:
        request: request for the run.
        run: folder of the run, from `open_run`.
        resources: resources of the connected cluster.
        memory_uri: storage with the noise scales and augmentations of earlier runs; empty for that of the run.
        probe_again: measure batch sizes and try the augmentation even if the storage has what earlier runs found.
        on_event: called with the events of the trials.

    Raises:
        InputError: a value is not allowed, or no batch fits.
        JobError: a trial failed.
    """
    manifest = load_checked_manifest(request, resources)
    workers = parse_num_workers(request.num_workers, resources)
    # A scheduled job must recover by itself.
    repaired = [run.repair_ending(), run.repair_record()]
    record = run.read_begun_record()
    if record is None:
        run.check_names_are_free()
    else:
        _check_same_request(run, record, request, manifest)
        repaired.append(run.repair_manifest(manifest))
    for event in filter(None, repaired):
        on_event(event)
    published = find_published(request.settings.init_from)
    if published and not checkpoints.find_last(run.checkpoints):
        fetch_published(published, storage.parent(run.uri), on_event)
    if record is not None and record.batch is not None and record.batch.request == request.batch:
        batch = record.batch
    else:
        batch = choose_batch(
            request,
            manifest,
            workers.now,
            storage.parent(run.uri),
            resources,
            noise_storage_uri=memory_uri,
            probe_again=probe_again,
            on_event=on_event,
        )
    config = resolve(request, manifest, workers.now, batch)
    if record is not None:
        config = replace_values(config, known_augmentation=record.config.known_augmentation)
        if request.epochs is None and request.steps is None:
            # The recipe may have changed since.
            config = replace_values(config, epochs=record.config.epochs, patience=record.config.patience)
    elif config.augment == "auto" and not probe_again:
        config = _recall_augmentation(config, memory_uri or storage.parent(run.uri), on_event)
    return RunPlan(config, manifest, batch, workers)


def _recall_augmentation(config: TrainConfig, storage_uri: str, on_event: OnEvent) -> TrainConfig:
    """Return the config with the augmentation that an earlier run chose for the same dataset, if there is one."""
    choice = read_choice(storage_uri, config)
    if choice is None:
        return config
    on_event(AugmentationChosen(choice.augmentation, f"chosen in run {choice.run}: {choice.figures}"))
    return replace_values(config, known_augmentation=choice.augmentation)


def _keep_augmentation(run: RunFolder, config: TrainConfig, figures: str, history: Sequence[Metrics]) -> None:
    """Keep the augmentation that a run chose for later runs, if the run got far enough to choose one."""
    chosen = [row["augmentation"] for row in history if row["stage"] in ("train", "decay")]
    if chosen:
        choice = AugmentationChoice(augmentation=chosen[0], figures=figures, run=run.name, chosen=datetime.now(UTC))
        write_choice(storage.parent(run.uri), config, choice)


def _check_same_request(run: RunFolder, record: RunRecord, request: RunRequest, manifest: Manifest) -> None:
    """Raise InputError if a run was started with other options, before anything is measured for them."""
    begun = record.config
    batch = given_batch(request.batch, begun.global_batch_size, begun.precision)
    config = resolve(request, manifest, begun.num_workers, batch)
    if request.epochs or request.steps:
        _check_same_config(run, _continued_config(begun, config), config, ["known_augmentation"])
    else:
        _check_same_config(run, begun, config, ["known_augmentation", "epochs", "patience"])


def _continued_config(begun: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Return the config with which a run continues: the one it began with, with more epochs if more are requested.

    After a cosine the learning rate is zero, so a run cannot continue.
    """
    if begun.schedule == "cosine" or config.epochs <= begun.epochs:
        return begun
    return replace_values(begun, epochs=config.epochs, patience=config.patience)


def launch(
    plan: RunPlan,
    run: RunFolder,
    resources: Resources,
    *,
    max_failures: int = 3,
    trackers: tuple[str, ...] = (),
    profile_steps: int = 0,
    remember: bool = True,
    on_event: OnEvent = ignore_event,
) -> RunResult:
    """Start a run, or continue it from its last checkpoint, and return its result.

    If the run is finished, its result is returned; with more epochs than before, it continues.

    Args:
        plan: plan of the run, from `plan_run`.
        run: folder of the run, from `open_run`.
        resources: resources of the connected cluster.
        max_failures: how often the workers are restarted after they were lost.
        trackers: names from `trainer.training.tracking`: where metrics go in addition to the run folder.
        profile_steps: number of steps to trace, without the first ones; 0 for none.
        remember: keep the noise scale and the augmentation in the storage for the next similar run. The trials of a
            study do not, so that all of them start from the same.
        on_event: called with the progress of the run.

    Raises:
        InputError: the run name is used by another config.
        JobError: the workers failed more often than allowed.
        KeyboardInterrupt: the process received a signal to stop; ``result.json`` says which.
    """
    config, manifest = plan.config, plan.manifest
    num_workers = config.num_workers
    record = run.read_begun_record()
    if record is not None:
        # The number of workers may differ: each attempt computes its batch again.
        config = _continued_config(record.config, plan.config)
        _check_same_config(run, config, plan.config, ["num_workers"])
    is_longer = record is not None and config != record.config
    if not is_longer and (result := run.read_result()):
        return result
    # Before anything deletes how it ended.
    _record_lost_job(run)
    if record is None:
        run.write_manifest(manifest)
    if record is None or is_longer:
        # Delete the result first: if this job is interrupted here, the next one extends the run.
        run.delete_interruption()
        described = describe_run(config, resources.hardware, plan.batch, plan.command)
        if record is None:
            kept = {"previous": replace_last_run(storage.parent(run.uri), config, run.name)}
        else:
            kept = record.model_dump(include={"started", "previous"})
        run.write_record(described.model_copy(update=kept))
    if rescaling := describe_rescaling(config):
        on_event(BatchChosen(rescaling))
    largest_per_replica = plan.batch.largest_per_replica
    last = checkpoints.find_last(run.checkpoints)
    resized = resize_batch(config, num_workers, largest_per_replica)
    on_event(describe_steps(resized, manifest, finished_epochs=last.epoch if last else 0))
    on_event(StageProgressed("starting workers", 0, num_workers))
    job = WorkerJob(config, manifest, run.uri, run.lease, trackers, profile_steps, largest_per_replica, ignore_event)
    run.delete_interruption()
    threading.Thread(target=_load_ending, name="ending", daemon=True).start()
    try:
        worker_result = _run_workers(job, plan.workers, resources, max_failures, on_event)
        return _close_run(job, worker_result, remember, on_event)
    except KeyboardInterrupt:
        # First of all, because `ray job stop` kills after three seconds.
        if not failure_reason():
            run.write_interruption("interrupted", received_signal().name)
        raise
    except (InputError, JobError) as error:
        _record_failure(run, error)
        raise


def _record_lost_job(run: RunFolder) -> None:
    """Record how the attempt before this job ended, unless it is recorded already."""
    attempt = run.find_latest_attempt()
    if not attempt or attempt in [one.attempt for one in run.read_incidents() if one.kind == "workers lost"]:
        return
    match run.read_ending():
        case RunInterruption(status="interrupted", reason=reason):
            run.record_loss(f"its job was interrupted by {reason}")
        case RunInterruption(status=status, reason=reason):
            run.record_loss(f"its job ended as {status}: {reason}")
        case None:
            run.record_loss("its job ended without a message: it was killed, or its machine was lost")


def _record_failure(run: RunFolder, error: InputError | JobError) -> None:
    """Record why a run has no result, unless it is recorded already or the storage has failed."""
    with contextlib.suppress(InputError, JobError):
        if run.read_ending() is None:
            run.write_interruption("refused" if isinstance(error, InputError) else "failed", str(error))


def _check_same_config(run: RunFolder, begun: TrainConfig, config: TrainConfig, ignored: list[str]) -> None:
    """Raise InputError if a run was started with another config; some fields may differ."""
    same = {name: getattr(begun, name) for name in ignored}
    if differences := find_differences(begun, replace_values(config, **same)):
        raise InputError(
            f"run {run.name} in {run.uri} was started with another config ({'; '.join(differences)}); choose another "
            f"--run-name, with --init-from {run.uri} to start from its weights, or the same options to continue it: "
            f"--config {run.path('config.json')} has all of them"
        )


def describe_steps(config: TrainConfig, manifest: Manifest, finished_epochs: int = 0) -> RunStarted:
    """Describe how the images of a run are divided into steps."""
    rows = manifest.splits["train"].rows
    return RunStarted(
        global_batch_size=config.global_batch_size,
        num_replicas=config.num_workers,
        per_replica_batch_size=config.per_replica_batch_size,
        steps_per_epoch=rows // config.global_batch_size,
        rows=rows,
        epochs=config.epochs,
        finished_epochs=finished_epochs,
        normalizes_alone=config.num_workers > 1 and not config.synchronizes_batch_norm,
    )


def _run_workers(
    job: WorkerJob, workers: WorkerCount, resources: Resources, max_failures: int, on_event: OnEvent
) -> WorkerResult:
    def train(send_event: OnEvent) -> WorkerResult:
        from trainer.training.loop import train_worker

        return train_worker(replace(job, send_event=send_event))

    num_workers = workers.now

    def record(event: Event) -> None:
        nonlocal num_workers
        if isinstance(event, WorkersLost):
            run.record_loss(event.reason, event.tail)
        elif isinstance(event, AttemptStarted):
            run.record_next_step(event.step)
            event, num_workers = replace(event, previous_num_workers=num_workers), event.num_workers
        elif isinstance(event, EpochFinished):
            serve(event.row)
        on_event(event)

    run = RunFolder(job.run, job.lease)
    try:
        with serve_metrics(run.name) as serve:
            result: WorkerResult = run_workers(
                train,
                run.name,
                workers,
                resources,
                max_failures=max_failures,
                shown={"run": job.run, **job.config.model_dump()},
                on_event=record,
            )
    except WorkersFailedError as error:
        for cause in error.causes:
            if isinstance(cause, WorkerDiedError):
                run.record_loss(str(cause), cause.tail)
        raise JobError(f"run {run.name}: {error}; the same command continues it from its last checkpoint") from error
    return result


def _load_ending() -> None:
    """Import what the end of a run needs while its workers train, which takes a second."""
    for name in ("trainer.notes.plots", "scipy.stats"):
        importlib.import_module(name)


def _learn_about_batch(
    run: RunFolder, manifest: Manifest, history: History, noise_scale: float | None
) -> tuple[str, ...]:
    """Return what a finished run shows about the choice of its batch, and delete a table that it contradicts."""
    record = run.read_record()
    if record is None or record.batch is None:
        return ()
    contradiction = find_contradiction(record.batch, history)
    if contradiction:
        forget_table(record.batch.table_name, storage.parent(run.uri))
    rows = manifest.splits["train"].rows
    surprise = find_noise_surprise(record.batch, noise_scale, rows)
    return tuple(line for line in (contradiction, surprise) if line)


def _find_augmentation(path: History) -> str:
    """Return the augmentation of the last epoch that had the one of its stage: `clean` has none."""
    return next((row.get("augmentation", "") for row in reversed(path) if row.get("stage") != "clean"), "")


def _close_run(job: WorkerJob, worker_result: WorkerResult, remember: bool, on_event: OnEvent) -> RunResult:
    """Write the results of a run after its workers have ended: plots, note and ``result.json``."""
    # Loaded by now, in `_load_ending`.
    from trainer.notes.plots import write_batch_sizes, write_mistakes, write_plots

    run, config, manifest = RunFolder(job.run, job.lease), job.config, job.manifest
    run.check_owner()
    best = checkpoints.find_best(run.checkpoints)
    last = checkpoints.find_last(run.checkpoints)
    if not worker_result.reason and (best is None or last is None):
        raise JobError(f"run {run.name}: none of its checkpoints is intact any more; the same command trains it again")
    if best is None or last is None:
        run.write_interruption("diverged", worker_result.reason)
        raise JobError(
            f"run {run.name} diverged in its first epoch: {worker_result.reason}; lower "
            "--base-learning-rate or set --clip-norm"
        )
    predictions = storage.parquet_table(checkpoints.read_file(run.checkpoints, best, checkpoints.PREDICTIONS_NAME))
    test = None
    if config.evaluate_test and not worker_result.reason:
        content = storage.read_bytes(run.path("test_predictions.parquet"))
        test = summarise("test", storage.parquet_table(content), manifest.class_names)
    val, path = summarise("val", predictions, manifest.class_names), main_path(last.history)
    runs = find_compared(run)
    steps = storage.parquet_table(checkpoints.read_file(run.checkpoints, last, checkpoints.STEPS_NAME))
    noise_scale = summarize_noise(steps, config.global_batch_size)
    result = RunResult(
        status="diverged" if worker_result.reason else "completed",
        reason=worker_result.reason,
        parameters=worker_result.parameters,
        best_epoch=best.epoch,
        best_checkpoint=best.name,
        val=val,
        late=average_last(path, val.total) if len(path) > 1 else None,
        comparison=compare_with_previous(runs, predictions),
        test=test,
        epochs=last.epoch,
        steps=last.step,
        attempts=worker_result.attempts,
        incidents=tuple(run.read_incidents()),
        layers=worker_result.layers,
        augmentation=describe_trials(last.history),
        augmentation_used=_find_augmentation(path),
        augmentation_of_best=_find_augmentation(main_path(last.history[: best.epoch])),
        findings=find_symptoms(last.history, val, config, worker_result.reason),
        batch_remarks=_learn_about_batch(run, manifest, last.history, noise_scale),
        noise_scale=noise_scale,
        weights_crc32=worker_result.weights_crc32,
        train_seconds=sum(row["epoch_seconds"] for row in last.history),
    )
    if remember and result.augmentation:
        _keep_augmentation(run, config, result.augmentation, last.history)
    run.write_metrics(last.history)
    run.write_steps(steps)
    if missing := write_plots(run, last.history, steps, result, config.clip_norm):
        on_event(GlyphsMissing(missing))
    named = run.read_predictions()
    if named is not None:
        write_mistakes(run, worker_result.mistakes, named)
    if (record := run.read_record()) and record.batch and record.batch.table:
        write_batch_sizes(run, record.batch.table)
    if job.profile_steps and ray.is_initialized():
        # Chrome's trace viewer and ui.perfetto.dev show it.
        run.write(json.dumps(ray.timeline()).encode(), "profile", "ray_timeline.json")
    if remember and not worker_result.reason and result.noise_scale is not None:
        remember_noise_scale(
            config.arch,
            config,
            config.dataset_fingerprint,
            storage.parent(run.uri),
            run=run.name,
            noise_scale=result.noise_scale,
            global_batch_size=config.global_batch_size,
        )
    write_note(run, runs, result)
    end_trackers(job.trackers, FinishedRun(run, config, last.history, result))
    run.write_ending(result)
    return result
