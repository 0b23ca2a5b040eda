"""The run folder: the names of its files, and the records that open and close a run.

STORAGE/RUN/config.json      RunRecord; before step 1
STORAGE/RUN/dataset.json     the manifest of its dataset, so that the run is usable without the dataset
STORAGE/RUN/lease.json       the job that holds the run; absent when no job does
STORAGE/RUN/attempts/        one Attempt for each start of the workers
STORAGE/RUN/incidents/       one Incident for each loss of the workers, with the end of their output, and for each time
                             damaged files were set aside; of earlier versions there are losses/ and recoveries/
STORAGE/RUN/damaged/         records that could not be read and were replaced, for inspection
STORAGE/RUN/checkpoints/     see `trainer.record.checkpoint`
STORAGE/RUN/metrics.parquet  one EpochRow per epoch; metrics.csv is the same
STORAGE/RUN/steps.parquet    one row per optimizer step
STORAGE/RUN/predictions.parquet, thumbnails.parquet  the best epoch on val; see `trainer.record.predictions`
STORAGE/RUN/model.keras      the best weights, for Keras 3 and tf_keras; on request one of saved_model/,
                             model.tflite and model.onnx
STORAGE/RUN/plots/*.png      curves, confusion matrix, gradient norms, worst mistakes
STORAGE/RUN/profile/         a trace of a few steps, for TensorBoard; Ray's timeline of the whole run
STORAGE/RUN/note.md          the note of the run
STORAGE/RUN/test_reads/      one SplitRead for each evaluation of the test split
STORAGE/RUN/test_predictions.parquet  predictions of the best checkpoint on the test split, on request
STORAGE/RUN/tensorboard/     event files for TensorBoard, on request
STORAGE/RUN/evaluations/     written by jobs/evaluate.py
STORAGE/RUN/explanations/    written by jobs/explain.py
STORAGE/RUN/result.json      RunResult; written last; or a RunInterruption
"""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.csv

from data_prep.manifest import Manifest
from trainer.config.batch_table import BatchChoice
from trainer.config.config import TrainConfig
from trainer.config.former import CONFIG_FORMAT, FORMER_VALUES, find_former_arguments, find_former_rate
from trainer.record import checkpoint as checkpoints
from trainer.record.epoch_row import Metrics
from trainer.record.evaluation_result import EvaluationResult, LateEpochs
from trainer.record.incident import Incident, find_former_incidents
from trainer.record.predictions import PREDICTIONS_NAME, THUMBNAILS_NAME, name_predictions
from trainer.runtime import storage
from trainer.runtime.ahead import call_ahead
from trainer.runtime.errors import InputError, LeaseLostError, NewerFormatError, RecordError
from trainer.runtime.events import RecordRepaired
from trainer.runtime.lease import Lease
from trainer.runtime.markdown import format_count
from trainer.runtime.record_format import Record

_RECORDED_PACKAGES = ("ray", "tensorflow", "tf_keras", "numpy", "pyarrow", "s3fs", "pillow")


# Files and folders that a run writes after its config.json.
_WRITTEN_NAMES = (
    *(
        "checkpoints",
        "metrics.parquet",
        "metrics.csv",
        "steps.parquet",
        "model.keras",
        "saved_model",
        "plots",
        "profile",
    ),
    *("note.md", PREDICTIONS_NAME, THUMBNAILS_NAME),
    *("model.tflite", "model.onnx"),
    *("test_predictions.parquet", "tensorboard", "evaluations", "explanations"),
)

# Those of earlier versions are read, and no longer written.
_INCIDENT_FOLDERS = ("losses", "recoveries", "incidents")
# Those of the predictions of a checkpoint.
_LABELS = ("label", "predicted")
# How many incidents a note and a job's summary list.
_MOST_INCIDENTS = 10
# Records are read at once, which hides the latency of a bucket.
_READERS = 16

InterruptionStatus = Literal["interrupted", "diverged", "refused", "failed"]


class RunRecord(Record):
    """What ``config.json`` holds: the config and the circumstances."""

    FORMAT: ClassVar[int] = CONFIG_FORMAT
    ADDED: ClassVar[Mapping[str, Any]] = {
        "batch": None,
        "previous": None,
        "config.optimizer_arguments": lambda record: find_former_arguments(record["config"]),
        **{f"config.{name}": value for name, value in FORMER_VALUES.items()},
    }
    CHANGED: ClassVar[Mapping[str, Callable[[dict[str, Any]], Any]]] = {
        "config.base_learning_rate": lambda record: find_former_rate(record["config"], record.get("format", 1)),
    }

    config: TrainConfig
    batch: BatchChoice | None = None
    """How its batch size and its precision were chosen."""
    command: str
    code_version: str
    """Git commit, with "+changes" where the checkout differed from it, or the installed version."""
    packages: dict[str, str]
    python: str
    hardware: str
    started: datetime
    previous: str | None = None
    """Name of the last run of the same dataset and architecture that was started before; None if it is not known."""


class Attempt(Record):
    """A start of the workers of a run."""

    ADDED: ClassVar[Mapping[str, Any]] = {"record": None}

    started: datetime
    node: str
    """Hostname of the first worker."""
    pid: int
    """Process of the first worker."""
    record: RunRecord | None
    """A copy of ``config.json``, which replaces it if it is damaged."""


class SplitRead(Record):
    """An evaluation of the test split: each makes its result less trustworthy."""

    started: datetime
    reader: str
    """Which job it was."""


class RunResult(Record):
    """What ``result.json`` holds."""

    # 2: one list of incidents instead of lost_attempts and recoveries.
    FORMAT: ClassVar[int] = 2
    ADDED: ClassVar[Mapping[str, Any]] = {
        "incidents": find_former_incidents,
        "late": None,
        "comparison": "",
        "layers": "",
        "findings": (),
        "weights_crc32": (),
    }

    status: Literal["completed", "diverged"]
    reason: str = ""
    parameters: int
    best_epoch: int
    best_checkpoint: str
    val: EvaluationResult
    """Validation of the best checkpoint, the best of all epochs on these very images."""
    late: LateEpochs | None
    """Validation of the last epochs, whichever was best; None for one epoch and runs of earlier versions."""
    comparison: str
    """Whether it differs from the last run of the same dataset and architecture; empty if none has finished."""
    test: EvaluationResult | None = None
    """Test of the best checkpoint, if requested."""
    epochs: int
    steps: int
    attempts: int
    incidents: tuple[Incident, ...]
    """Each loss of the workers, and each time that damaged files were set aside."""
    augmentation: str = ""
    """What was tried for the augmentation, and what each reached; empty if nothing was."""
    augmentation_used: str = ""
    """The augmentation of the last epochs, those without any at the end apart; empty for runs of earlier versions."""
    augmentation_of_best: str = ""
    """The augmentation of the best epoch, by the same rule; a candidate that lost can have had it."""
    layers: str
    """The network's layers, as code."""
    findings: list[str]
    """What `trainer.notes.diagnostics` found, one line each."""
    batch_remarks: tuple[str, ...] = ()
    """What training showed about the choice of the batch, which the next run uses; nothing is wrong with this one."""
    weights_crc32: tuple[int, ...]
    """Checksum of the final weights of each worker: all equal."""
    train_seconds: float
    """Sum of the durations of the epochs, including evaluation."""
    noise_scale: float | None = None
    """Gradient noise scale in images (`trainer.record.noise_scale`); None where it was not measured."""

    @property
    def listed_incidents(self) -> list[str]:
        """The first incidents, one line each, and how many more there are."""
        lines = [str(incident) for incident in self.incidents[:_MOST_INCIDENTS]]
        if more := len(self.incidents) - len(lines):
            lines.append(f"{format_count(more, 'more incident')}; result.json lists all")
        return lines

    @property
    def choice(self) -> str:
        """What the weights were chosen from, which the interval does not account for."""
        return f"best of {format_count(self.epochs, 'epoch')} on validation: epoch {self.best_epoch}"

    @property
    def summary(self) -> list[str]:
        """The outcome of the run, line by line."""
        return [
            f"val         {self.val}",
            f"            {self.choice}",
            *([f"            {self.late}"] if self.late else []),
            *([f"test        {self.test}"] if self.test else []),
            *([f"compared    {self.comparison}"] if self.comparison else []),
            *(f"incident    {incident}" for incident in self.listed_incidents),
            *(f"finding     {finding}" for finding in self.findings),
            *(f"batch       {remark}" for remark in self.batch_remarks),
        ]


class RunInterruption(Record):
    """What ``result.json`` holds for a run without a result."""

    RENAMED: ClassVar[Mapping[str, str]] = {"interrupted": "ended"}

    status: InterruptionStatus
    """Stopped by a signal, diverged in its first epoch, refused by a worker, or failed in another way."""
    reason: str
    """The name of the signal, the steps, or the message of the error."""
    ended: datetime


class RunFolder:
    """The files of one run."""

    def __init__(self, uri: str, lease: Lease | None = None) -> None:
        self.uri = uri
        self.checkpoints = storage.join(uri, "checkpoints")
        self.lease = lease
        """The lease of the job that trains the run; None for all others."""
        self._attempt = 0

    @property
    def name(self) -> str:
        """The run name."""
        return storage.basename(self.uri)

    def path(self, *parts: str) -> str:
        """Return the URI of a file in the folder."""
        return storage.join(self.uri, *parts)

    def check_owner(self) -> None:
        """Raise unless this job still holds the run and, after `start_attempt`, no later attempt has started.

        The job and its workers call this right before every write, so only a write that was already in progress when
        the run was taken over can be late. For checkpoints even that is harmless (`trainer.record.checkpoint`).

        Raises:
            LeaseLostError: this job or attempt must not write any more.
        """
        if self.lease is not None:
            self.lease.check()
        if self._attempt and (latest := self.find_latest_attempt()) > self._attempt:
            raise LeaseLostError(
                f"attempt {self._attempt} at run {self.name} must not write any more: attempt {latest} has started"
            )

    def write(self, content: bytes, *parts: str) -> None:
        """Write a file in the folder.

        Raises:
            LeaseLostError: this job or attempt has lost the run.
        """
        self.check_owner()
        storage.write_bytes(self.path(*parts), content)

    def read_record(self) -> RunRecord | None:
        """Return the record of the run, or None if it was not started.

        Raises:
            RecordError: it cannot be read.
        """
        uri = self.path("config.json")
        try:
            return RunRecord.parse(storage.read_bytes(uri), uri)
        except FileNotFoundError:
            return None

    def check_names_are_free(self) -> None:
        """Check that a new run would not replace files that no run wrote.

        Raises:
            InputError: one of its names is taken; the message says which.
        """
        if storage.exists(self.path("config.json")):
            return
        taken = [name for name in storage.find_files(self.uri) if name.partition("/")[0] in _WRITTEN_NAMES]
        if taken:
            raise InputError(
                f"{self.uri} holds {taken[0]}, which no run wrote and this one would replace; choose another --run-name"
            )

    def read_begun_record(self) -> RunRecord | None:
        """Return the record that a resumed run must match.

        None if there is none, or if the run was refused before its first checkpoint: another option may fix that, under
        the same name.
        """
        ending = self.read_ending()
        if isinstance(ending, RunInterruption) and ending.status == "refused":
            return self.read_record() if checkpoints.find_last(self.checkpoints) else None
        return self.read_record()

    def write_record(self, record: RunRecord) -> None:
        """Write ``config.json``."""
        self.write(record.to_json(), "config.json")

    def write_manifest(self, manifest: Manifest) -> None:
        """Write ``dataset.json``."""
        self.write(manifest.to_json(), "dataset.json")

    def read_manifest(self) -> Manifest:
        """Return the manifest of the dataset that the run was trained on.

        Raises:
            RecordError: there is none, or it cannot be read.
        """
        uri = self.path("dataset.json")
        try:
            return Manifest.parse(storage.read_bytes(uri), uri)
        except FileNotFoundError as error:
            raise RecordError(f"{uri} is missing: this run cannot be used without its dataset's manifest") from error

    def read_ending(self) -> RunResult | RunInterruption | None:
        """Return how the run ended, or None if it has not.

        Raises:
            RecordError: it cannot be read.
        """
        uri = self.path("result.json")
        try:
            content = storage.read_bytes(uri)
        except FileNotFoundError:
            return None
        return RunResult.parse(content, uri) if b'"val"' in content else RunInterruption.parse(content, uri)

    def read_result(self) -> RunResult | None:
        """Return the result of a finished run, or None if it is not finished."""
        ending = self.read_ending()
        return ending if isinstance(ending, RunResult) else None

    def write_ending(self, ending: RunResult | RunInterruption) -> None:
        """Write ``result.json``."""
        self.write(ending.to_json(), "result.json")

    def write_interruption(self, status: InterruptionStatus, reason: str) -> None:
        """Write ``result.json`` for a run that ends without a result."""
        self.write_ending(RunInterruption(status=status, reason=reason, ended=datetime.now(UTC)))

    def delete_interruption(self) -> None:
        """Delete the ``result.json`` of an interrupted run, which continues."""
        self.check_owner()
        storage.delete_file(self.path("result.json"))

    def repair_ending(self) -> RecordRepaired | None:
        """Replace a damaged ``result.json``, so that the run continues from its last checkpoint and writes it again.

        Only the job that holds the run may call this, and `repair_record` and `repair_manifest`.

        Raises:
            NewerFormatError: it is not damaged, but of a newer version.
        """
        if not (damage := _find_damage(self.read_ending)):
            return None
        repaired = RecordRepaired(damage, self._keep_damaged("result.json"), "the run writes it again")
        self.write_interruption("failed", str(repaired))
        return repaired

    def repair_record(self) -> RecordRepaired | None:
        """Replace a damaged ``config.json`` by the copy that the last attempt wrote.

        Raises:
            NewerFormatError: it is not damaged, but of a newer version.
            InputError: there is no copy, so what its checkpoints were trained with is unknown.
        """
        if not (damage := _find_damage(self.read_record)):
            return None
        copy = self._find_copy_of_record()
        if copy is None and (self._find_numbered("attempts") or storage.find_folders(self.checkpoints)):
            raise InputError(
                f"{damage}; no copy is in {self.path('attempts')}, so the run cannot be continued: put config.json "
                "back from a backup, or choose another --run-name"
            )
        instead = "the run starts over" if copy is None else "its copy in attempts/ takes its place"
        repaired = RecordRepaired(damage, self._keep_damaged("config.json"), instead)
        self.record_recovery(str(repaired))
        if copy is None:
            storage.delete_file(self.path("config.json"))
        else:
            self.write_record(copy)
        return repaired

    def repair_manifest(self, manifest: Manifest) -> RecordRepaired | None:
        """Replace a damaged or missing ``dataset.json`` by the manifest of the run's dataset.

        Raises:
            NewerFormatError: it is not damaged, but of a newer version.
        """
        if not (damage := _find_damage(self.read_manifest)):
            return None
        kept = self._keep_damaged("dataset.json")
        repaired = RecordRepaired(damage, kept, "the manifest of the dataset takes its place")
        self.record_recovery(str(repaired))
        self.write_manifest(manifest)
        return repaired

    def _find_copy_of_record(self) -> RunRecord | None:
        for name in reversed(self._find_numbered("attempts").values()):
            with contextlib.suppress(RecordError):
                if copy := Attempt.parse(storage.read_bytes(self.path("attempts", name)), name).record:
                    return copy
        return None

    def _keep_damaged(self, name: str) -> str:
        """Copy a damaged file, and return the URI of the copy; empty if there is no such file."""
        try:
            self.write(storage.read_bytes(self.path(name)), "damaged", name)
        except FileNotFoundError:
            return ""
        return self.path("damaged", name)

    def record_loss(self, reason: str, tail: bytes = b"") -> None:
        """Record that the workers were lost, and the end of the output of one of them."""
        self._record_incident("workers lost", reason, tail)

    def record_recovery(self, what: str) -> None:
        """Record that damaged files were set aside, and what is used instead."""
        self._record_incident("files damaged", what)

    def _record_incident(self, kind: Literal["workers lost", "files damaged"], what: str, tail: bytes = b"") -> None:
        name = f"{max(self._find_numbered('incidents'), default=0) + 1:04d}"
        log = f"incidents/{name}.log" if tail else ""
        if tail:
            self.write(tail, log)
        incident = Incident(kind=kind, attempt=self.find_latest_attempt(), at=datetime.now(UTC), what=what, log=log)
        self.write(incident.to_json(), "incidents", f"{name}.json")

    def record_next_step(self, step: int) -> None:
        """Record after how many steps the run resumed, for each loss of workers without such a record."""
        for path, incident in self._read_incidents().items():
            if incident.kind == "workers lost" and incident.next_step is None:
                self.write(incident.model_copy(update={"next_step": step}).to_json(), path)

    def read_incidents(self) -> list[Incident]:
        """Return the incidents of the run in order of time; those that cannot be read are left out."""
        return sorted(self._read_incidents().values(), key=lambda incident: incident.at)

    def _read_incidents(self) -> dict[str, Incident]:
        """Return the readable incidents by their paths in the run folder."""
        incidents = {}
        for folder in _INCIDENT_FOLDERS:
            for name in self._find_numbered(folder).values():
                with contextlib.suppress(RecordError):
                    incidents[f"{folder}/{name}"] = Incident.parse(storage.read_bytes(self.path(folder, name)), name)
        return incidents

    def _find_numbered(self, folder: str) -> dict[int, str]:
        """Return the names of the files NUMBER.json in a folder by their numbers, in order; other files are ignored."""
        numbers = {name: name.removesuffix(".json") for name in storage.find_files(self.path(folder))}
        found = {int(number): name for name, number in numbers.items() if number != name and number.isdecimal()}
        return dict(sorted(found.items()))

    def start_attempt(self) -> int:
        """Record that the workers have started, and return the number of this attempt, from 1.

        From now on `check_owner` refuses writes of earlier attempts.

        Raises:
            LeaseLostError: the job that started the workers has lost the run.
        """
        self.check_owner()
        record = None if _find_damage(self.read_record) else self.read_record()
        started = Attempt(started=datetime.now(UTC), node=platform.node(), pid=os.getpid(), record=record)
        attempt = 1 + max(self.find_latest_attempt(), checkpoints.find_latest_attempt(self.checkpoints))
        # Workers of a job that has lost the run may start at the same moment.
        while not storage.create_file(self.path("attempts", f"{attempt:04d}.json"), started.to_json()):
            attempt += 1
        self._attempt = attempt
        return attempt

    def find_latest_attempt(self) -> int:
        """Return the number of the latest attempt; 0 before the first."""
        return max(self._find_numbered("attempts"), default=0)

    def record_test_read(self, reader: str) -> None:
        """Record that the test split is about to be evaluated, and by which job."""
        number = max(self._find_numbered("test_reads"), default=0) + 1
        read = SplitRead(started=datetime.now(UTC), reader=reader)
        self.write(read.to_json(), "test_reads", f"{number:04d}.json")

    def count_test_reads(self) -> int:
        """Return how often the test split has been evaluated: each time makes its result less trustworthy."""
        return len(self._find_numbered("test_reads"))

    def describe_test_reads(self) -> str:
        """Return how often the test split has been evaluated, in words."""
        return f"the test split has been read {format_count(self.count_test_reads(), 'time')} for this run"

    def write_metrics(self, history: list[Metrics]) -> None:
        """Rewrite ``metrics.parquet`` and ``metrics.csv``; rows of an earlier version lack some of the columns."""
        names = dict.fromkeys(name for row in history for name in row)
        table = pa.table({name: [row.get(name) for row in history] for name in names})
        self.write(storage.parquet_bytes(table), "metrics.parquet")
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(table, sink, pa.csv.WriteOptions(quoting_style="needed"))
        self.write(sink.getvalue().to_pybytes(), "metrics.csv")

    def read_metrics(self) -> list[Metrics]:
        """Return one row of metrics per epoch; empty before the first.

        Raises:
            RecordError: the file is damaged.
        """
        table = _read_table(self.path("metrics.parquet"))
        rows: list[Metrics] = [] if table is None else table.to_pylist()
        return rows

    def write_steps(self, steps: pa.Table) -> None:
        """Rewrite ``steps.parquet``."""
        self.write(storage.parquet_bytes(steps), "steps.parquet")

    def read_steps(self) -> pa.Table | None:
        """Return loss, accuracy and gradient of each optimizer step; None before the first checkpoint.

        Raises:
            RecordError: the file is damaged.
        """
        return _read_table(self.path("steps.parquet"))

    def read_predictions(self) -> pa.Table | None:
        """Return the validation predictions of the best checkpoint in row order, or None if there is none.

        The columns are those of `trainer.record.predictions`; of runs that earlier versions wrote, and of one that has
        not ended, those that its checkpoint has.
        """
        if (table := _read_table(self.path(PREDICTIONS_NAME))) is not None:
            return table
        best = checkpoints.find_best(self.checkpoints)
        if best is None:
            return None
        table = storage.parquet_table(checkpoints.read_file(self.checkpoints, best, checkpoints.PREDICTIONS_NAME))
        try:
            class_names = self.read_manifest().class_names
        except RecordError:
            # Their numbers, which tell as well which predictions are correct.
            class_names = [str(label) for label in range(1 + max(max(table[name].to_pylist()) for name in _LABELS))]
        return name_predictions(table, None, class_names)

    def read_thumbnails(self) -> dict[int, bytes]:
        """Return small pictures, WEBP files, by their rows of `read_predictions`; none in runs of earlier versions.

        Raises:
            RecordError: the file is damaged.
        """
        table = _read_table(self.path(THUMBNAILS_NAME))
        return {} if table is None else dict(zip(table["row"].to_pylist(), table["image"].to_pylist(), strict=True))


def _find_damage(read: Callable[[], Any]) -> str:
    """Return what is wrong with a record; empty if it can be read or is absent."""
    try:
        read()
    except NewerFormatError:
        raise
    except RecordError as error:
        return str(error)
    return ""


def _read_table(uri: str) -> pa.Table | None:
    """Return the table of a Parquet file, or None if it does not exist."""
    try:
        return storage.parquet_table(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except pa.ArrowException as error:
        raise RecordError(f"{uri} cannot be read: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class StartedRun:
    """A run folder and the record in its ``config.json``."""

    folder: RunFolder
    record: RunRecord


def find_runs(storage_uri: str) -> tuple[list[StartedRun], list[str]]:
    """Find the runs below a storage.

    Returns:
        The runs in the order of their start; one line for each ``config.json`` that cannot be read.
    """
    runs, left_out = [], []
    folders = [RunFolder(storage.join(storage_uri, name)) for name in storage.find_folders(storage_uri)]
    records = call_ahead(RunFolder.read_record, folders, ahead=_READERS, threads=_READERS)
    for folder, read in zip(folders, records, strict=True):
        try:
            record = read.result()
        except InputError as error:
            left_out.append(str(error))
            continue
        if record is not None:
            runs.append(StartedRun(folder, record))
    return sorted(runs, key=lambda run: (run.record.started, run.folder.name)), left_out


def describe_run(config: TrainConfig, hardware: str, batch: BatchChoice | None = None, command: str = "") -> RunRecord:
    """Return the record of a run that starts now; without a command, with that of this process."""
    return RunRecord(
        config=config,
        batch=batch,
        command=command or shlex.join(["python", *sys.argv]),
        code_version=_code_version(),
        packages={name: version(name) for name in _RECORDED_PACKAGES},
        python=platform.python_version(),
        hardware=hardware,
        started=datetime.now(UTC),
    )


def _code_version() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return version("training-notes")  # shipped without its repository
