"""Training by this project against the notes' own script: steady images a second, start, end, and peak memory.

The notes' script is `model.fit` on arrays in memory, as on the laptop: float32 pixels times 1/255, batch 32, the same
network, adam. Both train the same images in processes of their own, taking turns. Rates leave the first epoch out.
Marks: at least 0.98 of the script's rate at its precision; the first step after at most 2.5 times its seconds; at most
3 s from the last step to the end; at most 1.2 times its memory.

Run: python -m benchmarks training DATASET [--arch cnn_tapered] [--rounds 3] [--json]
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

BATCH, EPOCHS = 32, 4
SCRIPT = "model.fit, as in the notes"
CONTESTANTS = {
    SCRIPT: "",
    "this project, float32": "float32",
    "this project, bfloat16": "mixed_bfloat16",
}


@dataclass(frozen=True)
class Outcome:
    """One process."""

    images_per_second: float
    first_step_seconds: float
    """Since the shell."""
    end_seconds: float
    """From the end of the last epoch to the end of the process."""
    peak_gib: float


def run_script(dataset: str, arch: str) -> None:
    """Is the notes' script; prints when its first step and its epochs ended, as JSON."""
    import os

    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tf_keras as keras

    from trainer.architectures import ARCHITECTURES, build_model
    from trainer.dataset import load_manifest, open_split

    manifest = load_manifest(dataset)
    splits = [open_split(dataset, manifest, name) for name in ("train", "val")]
    (images, labels), val = [((split.images / 255.0).astype("float32"), split.labels) for split in splits]
    network = build_model(arch, manifest.image_size, manifest.channels, manifest.num_classes)
    model = keras.Sequential([network, keras.layers.Activation(ARCHITECTURES[arch].head)])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    times: dict[str, list[float]] = {"steps": [], "epochs": []}

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            times["steps"] = times["steps"] or [time.time()]

        def on_test_begin(self, logs=None):
            # Validation is no training.
            times["epochs"].append(time.time())

        def on_epoch_begin(self, epoch, logs=None):
            times["epochs"].append(time.time())

    model.fit(images, labels, batch_size=BATCH, epochs=EPOCHS, validation_data=val, verbose=0, callbacks=[Clock()])
    begun, ended = times["epochs"][::2], times["epochs"][1::2]
    rates = [len(images) / (end - begin) for begin, end in zip(begun, ended, strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rates": rates, "first_step": times["steps"][0], "last_epoch": time.time(), "peak_gib": peak}))


def measure_script(dataset: str, arch: str) -> Outcome:
    began = time.time()
    command = [sys.executable, "-m", "benchmarks.training", "--script", dataset, arch]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ended, found = time.time(), json.loads(output.splitlines()[-1])
    rate = statistics.median(found["rates"][1:])
    return Outcome(rate, found["first_step"] - began, ended - found["last_epoch"], found["peak_gib"])


def measure_project(dataset: str, arch: str, precision: str) -> Outcome:
    """Runs jobs/train.py; its times are read from its run folder."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "jobs/train.py", "--arch", arch, "--dataset", dataset, "--storage", storage]
        command += ["--run-name", "one", "--global-batch-size", str(BATCH), "--epochs", str(EPOCHS)]
        command += ["--precision", precision, "--recipe", "notes"]
        began = time.time()
        subprocess.run(command, check=True, capture_output=True)
        ended = time.time()
        from trainer import checkpoint as checkpoints
        from trainer.run_folder import RunFolder

        run = RunFolder(str(Path(storage, "one")))
        history = run.read_metrics()
        last = checkpoints.find_last(run.checkpoints)
        # Written when the last epoch is over. What the first epoch takes longer than another is its first step.
        over = Path(run.checkpoints, last.name, "checkpoint.json").stat().st_mtime
        seconds = [row["epoch_seconds"] for row in history]
        first = over - sum(seconds) + max(0.0, seconds[0] - statistics.median(seconds[1:]))
        rate = statistics.median(row["images_per_second"] for row in history[1:])
        peak = max(row["peak_memory_gib"] for row in history)
        return Outcome(rate, first - began, ended - over, peak)


def main(
    dataset: Annotated[str, typer.Argument(help="Prepared.")],
    arch: Annotated[str, typer.Option()] = "cnn_tapered",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    outcomes: dict[str, list[Outcome]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, precision in CONTESTANTS.items():
            found = measure_project(dataset, arch, precision) if precision else measure_script(dataset, arch)
            outcomes[name].append(found)
            print(f"{name}: {found}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({name: [asdict(one) for one in found] for name, found in outcomes.items()}))
        return
    table = Table(arch, "images/s", "ratio", "first step, s", "ratio", "end, s", "GiB", "ratio")
    script = outcomes[SCRIPT]
    for name, found in outcomes.items():
        cells = []
        for field, digits in (("images_per_second", 0), ("first_step_seconds", 1), ("end_seconds", 1), ("peak_gib", 2)):
            values = [getattr(one, field) for one in found]
            cells.append(f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})")
            if field != "end_seconds":
                baseline = statistics.median(getattr(one, field) for one in script)
                cells.append(f"{statistics.median(values) / baseline:.2f}")
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:
        run_script(*sys.argv[2:])
    else:
        typer.run(main)
