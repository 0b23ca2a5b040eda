"""Notes in the form of the user's own: one for each run, and a notebook of all runs."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from trainer.architectures import ARCHITECTURES
from trainer.config.batch_table import format_noise_scale
from trainer.config.config import TrainConfig, find_differences
from trainer.config.optimizers import complete_arguments
from trainer.config.recipes import describe_rescaling
from trainer.notes.comparison import compare_predictions
from trainer.record.evaluation_result import EvaluationResult
from trainer.record.run_folder import RunFolder, RunInterruption, RunRecord, RunResult, StartedRun, find_runs
from trainer.runtime import storage
from trainer.runtime.errors import InputError, RecordError
from trainer.runtime.html import link
from trainer.runtime.markdown import MOST_CLASSES, format_count, format_table

NOTEBOOK_NAME = "NOTES.md"
_MODEL = """
`model.keras` holds the weights of the best epoch, the scaling of the pixels and the names of the classes. Keras 3 and
`tf_keras` open it. Images have pixels from 0 to 255, scores are in the order of the names:

```python
import json, zipfile, keras
model = keras.saving.load_model("model.keras")
class_names = json.loads(zipfile.ZipFile("model.keras").read("metadata.json"))["class_names"]
scores = model.predict(images)
```
"""
_PICTURES = ("curves", "confusion", "mistakes")
_CONTINUES = "the same command continues"
# Options that another part of the sentence or of the note states, or that do not change what is learned.
_SAID_ELSEWHERE = {
    *("recipe", "optimizer", "base_learning_rate", "schedule", "global_batch_size", "num_workers", "epochs"),
    *("precision", "seed", "arch", "arch_arguments", "dataset", "dataset_fingerprint"),
    *("augment", "patience", "checkpoint_every", "keep_best", "evaluate_test", "export", "cache_gib"),
    *("save_probabilities", "known_augmentation"),
}


def write_note(run: RunFolder, runs: Sequence[StartedRun], result: RunResult) -> None:
    """Write ``note.md`` into the folder of a run: its note, and how to load its model.

    Args:
        run: the run.
        runs: from `find_compared`.
        result: of the run.
    """
    run.write((format_note(runs[-1], runs, result, run.uri) + _MODEL).encode(), "note.md")


def find_compared(run: RunFolder) -> list[StartedRun]:
    """Return a run, the last one, after those among which is the one that it is compared with, by order of their start.

    That one is named in the record of the run. All runs of the storage are read only if it is not known or not there.
    """
    storage_uri, record = storage.parent(run.uri), run.read_record()
    if record is not None and record.previous is not None:
        before = RunFolder(storage.join(storage_uri, record.previous))
        with contextlib.suppress(InputError):
            if of_before := before.read_record():
                found = [StartedRun(before, of_before), StartedRun(run, record)]
                if find_previous(found[-1], found):
                    return found
    runs, _ = find_runs(storage_uri)
    place = next(number for number, one in enumerate(runs) if one.folder.uri == run.uri)
    return runs[: place + 1]


def format_notebook(runs: Sequence[StartedRun], left_out: Sequence[str], folder: str) -> str:
    """Format the notes of all runs as Markdown.

    Args:
        runs: all runs of one storage, in the order in which they were started.
        left_out: a line for each run that cannot be read.
        folder: URI of the folder that the notebook is for, from which its pictures are linked.
    """
    notes = ["# Training notes", "", *(_format_readable_note(run, runs, folder) for run in runs)]
    if left_out:
        notes += ["### Left out", "", *(f"- {line}" for line in left_out), ""]
    return "\n".join(notes)


def _format_readable_note(run: StartedRun, runs: Sequence[StartedRun], folder: str) -> str:
    """Format the note of a run; if the record of its end cannot be read, with the reason."""
    try:
        return format_note(run, runs, run.folder.read_ending(), folder)
    except InputError as error:
        return "\n".join([*_format_head(run, runs), "```sh", run.record.command, "```", str(error), ""])


def format_note(
    run: StartedRun, runs: Sequence[StartedRun], ending: RunResult | RunInterruption | None, folder: str
) -> str:
    """Format the note of a run as Markdown: date, what changed, the network, how it was trained, the numbers, pictures.

    Args:
        run: the run.
        runs: all runs of the same storage, in the order in which they were started.
        ending: how the run ended; None if it has not ended.
        folder: URI of the folder that the note is for, from which its pictures are linked.
    """
    lines = _format_head(run, runs)
    if isinstance(ending, RunResult):
        lines += [*_format_finished(run.folder, run.record, ending), *_format_pictures(run.folder, folder)]
    else:
        lines += ["```sh", run.record.command, "```", describe_unfinished(ending)]
    return "\n".join(lines) + "\n"


def _format_head(run: StartedRun, runs: Sequence[StartedRun]) -> list[str]:
    title = f"#### {run.record.config.arch}: {run.folder.name}"
    return [f"### {run.record.started:%Y-%m-%d}", title, describe_change(run, runs), ""]


def describe_change(run: StartedRun, runs: Sequence[StartedRun]) -> str:
    """Describe how the config differs from that of the previous run of the same dataset and architecture.

    Args:
        run: one of ``runs``.
        runs: all runs of one storage, in the order in which they were started.
    """
    previous, config = find_previous(run, runs), run.record.config
    if previous is None:
        return f"the first {config.arch} run on this dataset here"
    before = previous.record.config
    # What the program filled in itself is no change that somebody made.
    same: dict[str, Any] = {"known_augmentation": config.known_augmentation}
    if before.optimizer != config.optimizer:
        same["optimizer_arguments"] = config.optimizer_arguments
    changes = find_differences(before.model_copy(update=same), config)
    return f"after {previous.folder.name}: {'; '.join(changes) or 'no changes'}"


def find_previous(run: StartedRun, runs: Sequence[StartedRun]) -> StartedRun | None:
    """Return the last run of the same dataset and architecture that was started before, or None."""

    def key(one: StartedRun) -> tuple[str, str]:
        return one.record.config.arch, one.record.config.dataset_fingerprint

    return next((one for one in reversed(runs[: runs.index(run)]) if key(one) == key(run)), None)


def compare_with_previous(runs: Sequence[StartedRun], predictions: pa.Table) -> str:
    """Describe whether the last of some runs differs from the one before of the same dataset and architecture.

    Args:
        runs: from `find_compared`.
        predictions: the validation predictions of the last one.

    Returns:
        The verdict in words; empty if there is no such run, or if it has not finished or cannot be read.
    """
    previous = find_previous(runs[-1], runs)
    try:
        if previous is None or previous.folder.read_result() is None:
            return ""
        others = previous.folder.read_predictions()
    except InputError:
        return ""
    if others is None or len(others) != len(predictions):
        return ""
    return compare_predictions(others, predictions).describe(previous.folder.name, runs[-1].folder.name)


def describe_unfinished(ending: RunInterruption | None) -> str:
    """Describe why a run has no result, and how to get one."""
    match ending:
        case RunInterruption(status="diverged", reason=reason):
            return f"diverged in its first epoch: {reason}; try half the --base-learning-rate, or --clip-norm 1"
        case RunInterruption(status="refused", reason=reason):
            return f"refused: {reason}"
        case RunInterruption(status="failed", reason=reason) if _CONTINUES in reason:
            return f"failed: {reason}"
        case RunInterruption(status="failed", reason=reason):
            return f"failed: {reason}; {_CONTINUES} it"
        case RunInterruption(reason=reason):
            return f"interrupted by {reason}: {_CONTINUES} it"
    return f"not finished: {_CONTINUES} it"


def describe_training(config: TrainConfig, steps: int) -> str:
    """Describe how a run was trained, in one line, with the learning rate for its global batch.

    The line has every option that is not at its default, except those that the note states elsewhere.
    """
    values = config.model_dump()
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    values |= values.pop("optimizer_arguments")
    # One worker has the whole batch.
    is_alone = config.num_workers > 1 and not config.synchronizes_batch_norm
    values["batch_norm"] = "replica" if is_alone else defaults["batch_norm"]
    defaults |= complete_arguments(config.optimizer, {})
    used = {name: value for name, value in values.items() if name not in _SAID_ELSEWHERE and value != defaults[name]}
    texts = [_describe_value(name, value) for name, value in used.items() if not name.startswith("augment_")]
    varied = [_describe_value(name, value) for name, value in used.items() if name.startswith("augment_")]
    if config.augment == "auto":
        # What of these was used, if any, is another line of the note.
        texts.append("augment auto" + (f" ({', '.join(varied).replace('augment ', '')})" if varied else ""))
    elif config.augment != "none":
        texts += varied
    return (
        f"recipe {config.recipe}: {config.optimizer}, learning rate {config.peak_learning_rate:g} ({config.schedule}) "
        f"at global batch {config.global_batch_size} = {config.num_workers} x {config.per_replica_batch_size}, "
        f"epochs={config.epochs}, {format_count(steps, 'step')}, {config.precision}, seed {config.seed}"
        + (f"; {', '.join(texts)}" if texts else "")
    )


def _describe_value(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def _describe_dataset(run: RunFolder) -> str:
    try:
        manifest = run.read_manifest()
    except RecordError as error:
        return str(error)
    rows, size = {split: described.rows for split, described in manifest.splits.items()}, manifest.image_size
    return (
        f"{rows['train']} training, {rows['val']} validation and {format_count(rows['test'], 'test image')}, "
        f"{size}x{size}x{manifest.channels}, {format_count(manifest.num_classes, 'class')}, from {manifest.source}"
    )


def _format_finished(run: RunFolder, record: RunRecord, result: RunResult) -> list[str]:
    config = record.config
    # Runs of earlier versions may lack the architecture or the layers.
    source = f"{ARCHITECTURES[config.arch].source}; " if config.arch in ARCHITECTURES else ""
    lines = [
        *(["```python", result.layers, "```"] if result.layers else []),
        f"{source}{result.parameters:,} parameters",
        "",
        _describe_dataset(run),
        "",
        describe_training(config, result.steps),
        "",
        "```sh",
        record.command,
        "```",
        f"{result.val}, {result.choice}",
    ]
    if result.late is not None:
        lines += ["", f"{result.late}, whatever their accuracy"]
    if result.comparison:
        lines += ["", result.comparison]
    if result.test is not None:
        lines += ["", f"test: {result.test}; {run.describe_test_reads()}"]
    lines += [
        "",
        "; ".join([f"{result.train_seconds:.0f} s of training, attempts: {result.attempts}", *result.val.details]),
        *(f"\n{line}" for line in describe_choices(config, result)),
        *(f"\n{incident}" for incident in result.listed_incidents),
        *(f"\n{finding}" for finding in result.findings),
    ]
    remarks = [line for remark in result.batch_remarks for line in ("", remark)]
    return [*lines, *_format_classes(result.val), *_format_batch(record), *remarks]


def describe_choices(config: TrainConfig, result: RunResult) -> list[str]:
    """Describe which augmentation a run with ``augment=auto`` used, and why, and its gradient noise scale."""
    lines = []
    if config.augment == "auto" and result.augmentation_used:
        if result.augmentation:
            reason = f"validation loss of those tried: {result.augmentation}"
        elif config.known_augmentation:
            reason = "chosen by an earlier run"
        elif config.schedule != "plateau":
            reason = "only --schedule plateau tries others"
        else:
            reason = "too few epochs to try others"
        if result.augmentation_of_best not in ("", result.augmentation_used):
            reason += f"; the best epoch, whose weights are kept, had: {result.augmentation_of_best}"
        lines.append(f"augmentation: {result.augmentation_used}; {reason}")
    elif result.augmentation:
        # A run of an earlier version.
        lines.append(f"augmentation tried: {result.augmentation}")
    if result.noise_scale is not None:
        lines.append(f"gradient noise scale: {format_noise_scale(result.noise_scale)}")
    return lines


def _format_pictures(run: RunFolder, folder: str) -> list[str]:
    """Format the pictures that every finished run has."""
    return [line for name in _PICTURES for line in ("", f"![{name}]({link(folder, run.path('plots', f'{name}.png'))})")]


def _format_classes(val: EvaluationResult) -> list[str]:
    """Format how many images of each class are correct; of many classes, only the worst."""
    lines, many = [], len(val.per_class) > MOST_CLASSES
    if many and val.correct == val.total:
        return ["", f"no mistakes in {len(val.per_class)} classes"]
    if many:
        confused = format_table(("class", "predicted as", "images"), val.most_confused)
        lines = ["", *confused, "", f"lowest accuracies of {len(val.per_class)} classes; result.json lists all:"]
    scores = val.scores
    counts = [(one.name, one.correct, one.total, *scores[one.name].cells) for one in val.listed]
    return [*lines, "", *format_table(("class", "correct", "of", "precision", "recall", "F1"), counts)]


def _format_batch(record: RunRecord) -> list[str]:
    """Format how the batch was found, and how values tuned at another batch were scaled."""
    lines, config = [], record.config
    if record.batch is not None and record.batch.explanation:
        lines += ["", record.batch.explanation]
    if rescaling := describe_rescaling(config):
        lines += ["", rescaling]
    if record.batch is None or record.batch.table is None:
        return lines
    table = record.batch.table
    rows = [
        (
            *(one.precision, f"{one.num_replicas} x {one.size}", f"{one.images_per_second:.0f}"),
            *(f"{one.seconds_per_step * 1000:.0f}", f"{one.peak_memory_gib:.2f}", table.verdict(one)),
        )
        for measured in table.measurements.values()
        for one in measured
    ]
    columns = ("precision", "batch", "images/s", "ms per step", "GiB per worker", "verdict")
    return [*lines, "", *format_table(columns, rows)]
