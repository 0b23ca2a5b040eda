"""The note of a run, in the form of the user's own training notes."""

from data_prep.manifest import Manifest
from trainer import storage
from trainer.architectures import ARCHITECTURES
from trainer.config import TrainConfig
from trainer.markdown import format_table
from trainer.run_folder import RunFolder, RunResult


def write_note(run: RunFolder, config: TrainConfig, manifest: Manifest, result: RunResult) -> None:
    """Writes ``note.md``."""
    storage.write_bytes(run.path("note.md"), format_note(run, config, manifest, result).encode())


def format_note(run: RunFolder, config: TrainConfig, manifest: Manifest, result: RunResult) -> str:
    """Returns the note as Markdown: date, architecture, data, what was done, and the numbers."""
    record = run.read_record()
    size, classes = manifest.image_size, manifest.num_classes
    rows = {split: described.rows for split, described in manifest.splits.items()}
    lines = [
        f"### {record.started:%Y-%m-%d}" if record else "###",
        f"#### {config.arch}: {run.name}",
        f"{ARCHITECTURES[config.arch].source}; {result.parameters:,} parameters",
        "",
        f"{rows['train']} training, {rows['val']} validation and {rows['test']} test images, "
        f"{size}x{size}x{manifest.channels}, {classes} classes, from {manifest.source}",
        "",
        f"recipe {config.recipe}: {config.optimizer}, learning rate {config.peak_learning_rate:g} ({config.schedule}), "
        f"batch {config.global_batch_size} over {config.num_workers} workers, {config.precision}, "
        f"epochs={config.epochs}, seed {config.seed}",
        "",
        "```sh",
        record.command if record else "",
        "```",
        f"{result.val}",
    ]
    if result.test is not None:
        lines += ["", f"test: {result.test}"]
    lines += [
        "",
        f"best epoch {result.best_epoch} of {result.epochs}, {result.train_seconds:.0f} s, attempts: {result.attempts}",
    ]
    if result.reason:
        lines += ["", f"diverged: {result.reason}"]
    counts = [(one.name, one.correct, one.total) for one in result.val.per_class]
    lines += ["", *format_table(("class", "right", "of"), counts)]
    return "\n".join(lines) + "\n"
