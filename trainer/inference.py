"""Use the best checkpoint of a finished run: evaluate it on a split, or predict images."""

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import ray
from pydantic import BaseModel
from ray.util.annotations import RayDeprecationWarning

from data_prep.manifest import Manifest, SplitName
from trainer.config.config import TrainConfig
from trainer.record import checkpoint as checkpoints
from trainer.record.checkpoint import Checkpoint
from trainer.record.evaluation_result import EvaluationResult, summarise
from trainer.record.predictions import name_predictions
from trainer.record.run_folder import RunFolder, RunResult
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import OnEvent, StageProgressed, ignore_event
from trainer.runtime.markdown import format_count
from trainer.runtime.pages import check_place
from trainer.runtime.record_format import Record
from trainer.training.dataset import KnownFiles, load_manifest, open_split, read_known_files, read_sources
from trainer.training.evaluation import Evaluator, predictions_table
from trainer.workers.groups import call_in_worker

# The underscore hides it from readers of the folder as one Parquet dataset.
SUMMARY_NAME = "_summary.json"
# No source has files of this name, so that replacing predictions never deletes images.
_FILE_PREFIX = "predictions-"
_ROWS_PER_FILE = 10_000
NEW = "new"
# In the order in which they are reported.
PARTS = (NEW, "test", "val", "train")
# Largest size of the probabilities in a file: with many classes a file has fewer rows.
_BYTES_PER_FILE = 128 * 2**20


class PartCount(BaseModel):
    """The predicted images that are in one split of the run's dataset, or in none."""

    images: int = 0
    labelled: int = 0
    """Those that were predicted and whose label is a class of the run."""
    correct: int = 0
    """Labeled images that were predicted correctly."""


class PredictionSummary(Record):
    """Contents of ``_summary.json``."""

    ADDED: ClassVar[Mapping[str, Any]] = {"parts": {}, "parts_unknown": "an earlier version did not look"}

    run: str
    checkpoint: str
    class_names: list[str]
    images: int
    rejected: dict[str, int]
    """Number of images that could not be decoded, by reason."""
    labelled: int
    """Images that were predicted and whose label is a class of the run."""
    correct: int
    """Labeled images that were predicted correctly."""
    parts: dict[str, PartCount]
    """The images by the split of the run's dataset that has the same file: new (none), test, val or train."""
    parts_unknown: str
    """Why parts is empty; empty if it is not."""


def read_finished_run(uri: str) -> tuple[RunFolder, TrainConfig, RunResult]:
    """Read a run that has a result.

    Raises:
        InputError: there is no such run, or it is not finished.
    """
    run = RunFolder(storage.resolve_uri(uri))
    record, result = run.read_record(), run.read_result()
    if record is None:
        raise InputError(f"RUN {uri} is not a run: it has no config.json; give a folder that jobs/train.py wrote")
    if result is None:
        raise InputError(f"RUN {uri} is not finished: it has no result.json; run its command again to finish it")
    return run, record.config, result


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation whose inputs and output have been checked before anything is started."""

    run: RunFolder
    config: TrainConfig
    result: RunResult
    trained_on: Manifest
    checkpoint: Checkpoint
    split: SplitName
    dataset: str
    """URI of the prepared dataset to evaluate on."""
    manifest: Manifest
    """Manifest of that dataset."""
    output: str
    """URI of the folder for the metrics and predictions."""

    @property
    def name(self) -> str:
        """Name of both files without suffix."""
        return f"{self.split}-{self.manifest.fingerprint[:12]}"


def request_evaluation(uri: str, split: SplitName, dataset: str = "", output: str = "") -> EvaluationRequest:
    """Check everything that an evaluation of the best checkpoint of a run needs.

    Args:
        uri: URI of the run, which is only read.
        split: split to evaluate on.
        dataset: URI of another prepared dataset; empty for the run's own.
        output: folder or s3:// prefix; empty for the folder evaluations of the run.

    Raises:
        InputError: the run is not finished or its checkpoint is gone, or the dataset does not match it, or the
            output cannot be written or has files of these names that this program did not write.
    """
    run, config, result = read_finished_run(uri)
    checkpoint = checkpoints.find_named(run.checkpoints, result.best_checkpoint)
    trained_on = run.read_manifest()
    dataset_uri = storage.resolve_uri(dataset) if dataset else config.dataset
    manifest = load_manifest(dataset_uri)
    if not dataset and manifest.fingerprint != trained_on.fingerprint:
        raise InputError(
            f"{config.dataset} was prepared again after {uri} was trained on it; give it as --dataset to evaluate the "
            "run on its present images"
        )
    _check_fits(dataset_uri, manifest, trained_on)
    if not manifest.splits[split].rows:
        raise InputError(f"{dataset_uri} has no {split} images; choose another --split")
    folder = storage.choose_output(output, run.path("evaluations"))
    request = EvaluationRequest(run, config, result, trained_on, checkpoint, split, dataset_uri, manifest, folder)
    check_place(folder, f"{request.name}.json", [f"{request.name}.parquet"], ['"accuracy_interval"'], "--output")
    return request


def evaluate_run(request: EvaluationRequest, resources: Resources) -> tuple[EvaluationResult, pa.Table]:
    """Evaluate a run on every row of a split once, and return the metrics and one row of predictions per image.

    The columns are those of `trainer.record.predictions`, without the mean loss and the probabilities.

    With the run's own dataset and split val, the metrics are exactly those of its result on the same kind of machine:
    batch size, precision and computation are the same. Nothing is written except that the test split has been read.

    Raises:
        InputError: a file of the checkpoint or the dataset is damaged.
        JobError: the worker failed.
    """
    if request.split == "test":
        _record_test_read(request)
    predictions, sources = call_in_worker(_evaluate, request, resources=resources)
    class_names = request.manifest.class_names
    return summarise(request.split, predictions, class_names), name_predictions(predictions, sources, class_names)


def save_evaluation(request: EvaluationRequest, evaluation: EvaluationResult, predictions: pa.Table) -> None:
    """Write the metrics and predictions of `evaluate_run` to the output."""
    # The metrics first: they vouch for the other file.
    storage.write_bytes(storage.join(request.output, f"{request.name}.json"), evaluation.to_json())
    storage.write_bytes(storage.join(request.output, f"{request.name}.parquet"), storage.parquet_bytes(predictions))


def describe_test_reads(request: EvaluationRequest) -> str:
    """Describe how often the test split has been read for a run, as far as that could be recorded."""
    text = request.run.describe_test_reads()
    if elsewhere := RunFolder(request.output).count_test_reads():
        reads = format_count(elsewhere, "time")
        text += f", and {reads} more as recorded in {request.output}, because the run is read-only"
    return text


def _record_test_read(request: EvaluationRequest) -> None:
    """Record in the run that its test split is read; if the run is read-only, record it in the output."""
    try:
        request.run.record_test_read("evaluate.py")
    except InputError:
        RunFolder(request.output).record_test_read("evaluate.py")


def _check_fits(dataset: str, manifest: Manifest, trained_on: Manifest) -> None:
    fields = ["image_size", "channels"]
    # Without a value range images have 8 bits per pixel, which mean the same in any dataset.
    if manifest.value_range and trained_on.value_range:
        fields.append("value_range")
    for name in fields:
        there, needed = getattr(manifest, name), getattr(trained_on, name)
        if there != needed:
            raise InputError(
                f"--dataset {dataset} has {name} {there}, the run was trained with {needed}; they must agree"
            )
    names = itertools.zip_longest(manifest.class_names, trained_on.class_names)
    for label, (there, needed) in enumerate(names):
        if there != needed:
            raise InputError(
                f"--dataset {dataset} has class_names that the run was not trained with: {manifest.num_classes} for "
                f"{trained_on.num_classes}, and class {label} is {there!r}, not {needed!r}; they must agree"
            )


def _evaluate(request: EvaluationRequest) -> tuple[pa.Table, pa.Table]:
    """Return the predictions and the source file of each row."""
    # Runs in a worker: the driver must not import TensorFlow.
    from trainer.training.devices import check_gpu
    from trainer.training.network import build_network_for_evaluation
    from trainer.training.step import compile_eval_step

    check_gpu()
    config, trained_on = request.config, request.trained_on
    network = build_network_for_evaluation(trained_on, config)
    content = checkpoints.read_file(request.run.checkpoints, request.checkpoint, checkpoints.MODEL_NAME)
    with network.strategy.scope():
        checkpoints.assign_variables(network.model.variables, checkpoints.from_safetensors(content))
    rows = open_split(request.dataset, request.manifest, request.split, config.cache_gib)
    eval_step = compile_eval_step(network, trained_on, config)
    outcomes = Evaluator(rows, config.per_replica_batch_size, 0, 1, eval_step, lambda values: values).evaluate()
    rows.pixels.finish_check()
    sources = read_sources(request.dataset, request.manifest, request.split)
    return predictions_table(outcomes, rows.labels), sources


def check_output(output: str, *, overwrite: bool = False) -> str:
    """Return the URI to write predictions to: a folder that is empty or has those of an interrupted job.

    Args:
        output: folder or s3:// prefix.
        overwrite: allow a folder that has predictions or other files.

    Raises:
        InputError: the folder is not empty, or cannot be written.
    """
    uri = storage.resolve_uri(output)
    found = storage.find_files(uri)
    # Predictions without the summary, which is written last, were interrupted.
    interrupted = SUMMARY_NAME not in found and all(name.startswith(_FILE_PREFIX) for name in found)
    if found and not overwrite and not interrupted:
        raise InputError(
            f"OUTPUT {uri} is not empty; choose another, or replace the predictions in it with --overwrite"
        )
    storage.check_access(uri)
    return uri


def predict_images(
    images: Any,
    num_images: int,
    uri: str,
    output: str,
    resources: Resources,
    *,
    batch_size: int = 64,
    on_event: OnEvent = ignore_event,
) -> PredictionSummary:
    """Write the predictions of a run's best weights as Parquet files, and a summary, which is written last.

    The columns are path, label (null if there is none), split (train, val or test where the run's dataset has the same
    file, else null), predicted (null if the image could not be decoded), confidence, probabilities (float32
    ``[num_classes]``, in the order of class_names) and error (null, or why the image could not be decoded).

    Args:
        images: a `ray.data.Dataset` with the columns of `data_prep.images.read_images`, of the run's size and channels.
        num_images: number of images, to report progress.
        uri: URI of the run.
        output: URI from `check_output`; earlier predictions there are deleted.
        resources: resources of the cluster; one network is loaded per GPU, or one without GPUs.
        batch_size: number of images that go through the network together.
        on_event: called with the progress.

    Raises:
        InputError: the run is not finished or its checkpoint is gone.
        JobError: a task of Ray Data failed.
    """
    run, config, result = read_finished_run(uri)
    checkpoints.find_named(run.checkpoints, result.best_checkpoint)
    known_files, parts_unknown = _find_known_files(config)
    # Delete the summary first: without it, predictions count as interrupted.
    for name in (SUMMARY_NAME, *storage.find_files(output)):
        if name == SUMMARY_NAME or name.startswith(_FILE_PREFIX):
            storage.delete_file(storage.join(output, name))
    class_names = run.read_manifest().class_names
    # Nodes may be lost, this machine not; and Ray prints an error for each actor that it may restart.
    restarts = {"max_restarts": 0} if resources.folder else {}
    with warnings.catch_warnings():
        # Ray 2.60 says that such arguments go in 2.64, and has no other way to give this one.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        predicted = images.map_batches(
            _Predictor,
            fn_constructor_args=(run.uri, class_names),
            batch_size=batch_size,
            concurrency=max(1, resources.num_gpus),
            # Reserve no core: on a small machine the decoders need it.
            num_cpus=0,
            num_gpus=min(1, resources.num_gpus),
            **restarts,
        )
    rejected: Counter[str] = Counter()
    known = set(class_names)
    parts = {} if parts_unknown else {name: PartCount() for name in PARTS}
    whole = PartCount()
    on_event(StageProgressed("predict", 0, num_images))
    rows = min(_ROWS_PER_FILE, max(1, _BYTES_PER_FILE // (4 * len(class_names))))
    for number, table in enumerate(_iterate(predicted, rows)):
        table = _name_splits(table, known_files)
        file = storage.join(output, f"{_FILE_PREFIX}{number:05d}.parquet")
        storage.write_bytes(file, storage.parquet_bytes(table))
        rejected.update(reason for reason in table["error"].to_pylist() if reason is not None)
        _count(table, known, whole, parts)
        on_event(StageProgressed("predict", whole.images, num_images))
    if parts and parts["test"].labelled:
        # What the test split says is known now; in a run of somebody else that cannot be recorded.
        with contextlib.suppress(InputError):
            run.record_test_read("predict.py")
    summary = PredictionSummary(
        run=run.uri,
        checkpoint=result.best_checkpoint,
        class_names=class_names,
        rejected=dict(rejected.most_common()),
        **whole.model_dump(),
        parts={name: part for name, part in parts.items() if part.images},
        parts_unknown=parts_unknown,
    )
    storage.write_bytes(storage.join(output, SUMMARY_NAME), summary.to_json())
    return summary


def _find_known_files(config: TrainConfig) -> tuple[KnownFiles, str]:
    """Return the splits of the files of a run's dataset, or why they are not known."""
    try:
        manifest = load_manifest(config.dataset)
        if manifest.fingerprint != config.dataset_fingerprint:
            return KnownFiles.none(), f"{config.dataset} was prepared again after the run was trained on it"
        return read_known_files(config.dataset, manifest), ""
    except InputError as error:
        return KnownFiles.none(), str(error)


def _name_splits(table: pa.Table, known: KnownFiles) -> pa.Table:
    """Replace the column of hashes by one of the splits that have them, null for none."""
    place = table.schema.get_field_index("sha256")
    return table.set_column(place, "split", known.find(table["sha256"].to_pylist()))


def _count(table: pa.Table, known: set[str], whole: PartCount, parts: dict[str, PartCount]) -> None:
    """Count the images of a table of predictions.

    Args:
        table: the predictions.
        known: names of the classes of the run.
        whole: counts of all images, which are added to.
        parts: counts by split, which are added to; empty where the splits are not known.
    """
    for row in table.select(["label", "predicted", "split"]).to_pylist():
        is_judged = row["predicted"] is not None and row["label"] in known
        for part in (whole, parts[row["split"] or NEW]) if parts else (whole,):
            part.images += 1
            part.labelled += is_judged
            part.correct += is_judged and row["label"] == row["predicted"]


def _iterate(predicted: Any, rows: int) -> Iterator[pa.Table]:
    """Yield the rows of a `ray.data.Dataset`, a file's worth at a time."""
    try:
        yield from predicted.iter_batches(batch_size=rows, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        # Ray keeps the error of the task only as text, above its own message.
        own = str(error).partition("\n\n")[0].splitlines()[-1]
        raise JobError(f"a task of Ray Data failed: {own}; start it again with --overwrite") from error


class _Predictor:
    """One loaded network: an actor of Ray Data."""

    def __init__(self, run_uri: str, class_names: list[str]) -> None:
        from trainer.training.export import load_export

        self._class_names = np.array(class_names, np.object_)
        self._model = load_export(RunFolder(run_uri))

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        scores = self._model.predict_on_batch(batch["image"])
        errors = batch["error"]
        is_missing = errors != ""
        predicted = self._class_names[scores.argmax(axis=1)]
        probabilities = pa.FixedSizeListArray.from_arrays(
            pa.array(scores.ravel(), pa.float32()), scores.shape[1], mask=pa.array(is_missing)
        )
        return pa.table(
            {
                "path": pa.array(batch["path"], pa.string()),
                "label": pa.array(batch["label"], pa.string(), mask=batch["label"] == ""),
                "sha256": pa.array(batch["sha256"], pa.binary()),
                "predicted": pa.array(predicted, pa.string(), mask=is_missing),
                "confidence": pa.array(scores.max(axis=1), pa.float32(), mask=is_missing),
                "probabilities": probabilities,
                "error": pa.array(errors, pa.string(), mask=~is_missing),
            }
        )
