"""Training by this project against the notes' own script and Ray's stock path: rate, start, end, and peak memory.

The notes' script is `benchmarks.notes_script`: `model.fit` on arrays in memory, as on the laptop. Ray's stock path,
with --source, is what its documentation shows: read_images, to_tf, prepare_dataset_shard, report. Where PyTorch is
installed there is a loop in it too (`benchmarks.torch_loop`). All train the same images in processes of their own,
taking turns. Rates leave the first epoch out.

Marks: at least 0.98 of the script's rate at its precision; input wait at most 2% of an epoch; the first step after at
most 2.5 times the script's seconds; at most 3 s from the last epoch to the end; at most 1.2 times its memory.

Run: python -m benchmarks training DATASET [--source IMAGES] [--arch cnn_tapered] [--rounds 3] [--json]
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.notes_script import BATCH, build_script
from benchmarks.table import Mark, format_ratio, format_spread, ratio_of, report
from trainer.architectures import ARCHITECTURES
from trainer.training.dataset import load_manifest

HERE = "benchmarks.training"
EPOCHS = 4
SCRIPT, STOCK, TORCH = "model.fit, as in the notes", "Ray's stock path", "a PyTorch loop"
PRECISIONS = {"this project, float32": "float32", "this project, bfloat16": "mixed_bfloat16"}


@dataclass(frozen=True)
class Outcome:
    """The measurement of one process."""

    images_per_second: float
    first_step_seconds: float
    """Time since the command was started."""
    end_seconds: float
    """From the end of the last epoch to the end of the process."""
    peak_gib: float
    """Peak memory of the process that trains."""
    wait_share: float = 0.0
    """Share of the seconds of an epoch that the step waits for images."""


def run_script(dataset: str, arch: str) -> None:
    """Run the notes' script; print when its first step and its epochs ended, as JSON."""
    model, (images, labels), val = build_script(dataset, arch)
    import tf_keras as keras

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


def run_stock(source: str, arch: str, image_size: str) -> None:
    """Run Ray's stock path on class folders of images; print as `run_script` does."""
    import ray.data
    import ray.train
    from ray.train import ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer, prepare_dataset_shard

    from trainer.runtime.cluster import connect

    size, class_names = int(image_size), sorted(one.name for one in Path(source).iterdir() if one.is_dir())

    def add_label(row: dict[str, Any]) -> dict[str, Any]:
        label = class_names.index(Path(row["path"]).parent.name)
        return {"image": row["image"][..., None].astype("float32") / 255, "label": label}

    def train() -> dict[str, Any]:
        import tensorflow as tf
        import tf_keras as keras

        from trainer.architectures import build_model

        times: dict[str, list[float]] = {"steps": []}

        class Clock(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                times["steps"] = times["steps"] or [time.time()]

        with tf.distribute.MultiWorkerMirroredStrategy().scope():
            network = build_model(arch, size, 1, len(class_names))
            model = keras.Sequential([network, keras.layers.Activation(ARCHITECTURES[arch].head)])
            model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        shard = ray.train.get_dataset_shard("train")
        rates = []
        for _ in range(EPOCHS):
            began = time.time()
            batches = prepare_dataset_shard(shard.to_tf("image", "label", batch_size=BATCH, drop_last=True))
            history = model.fit(batches, verbose=0, callbacks=[Clock()])
            rates.append(rows // BATCH * BATCH / (time.time() - began))
            ray.train.report({"loss": history.history["loss"][-1]})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"rates": rates, "first_step": times["steps"][0], "last_epoch": time.time(), "peak_gib": peak}

    with connect(), tempfile.TemporaryDirectory() as folder:
        images = ray.data.read_images(source, size=(size, size), mode="L", include_paths=True).map(add_label)
        rows = images.count()
        trainer = TensorflowTrainer(
            train,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(storage_path=folder),
            datasets={"train": images},
        )
        found = trainer.fit().return_value
    print(json.dumps(found))


def measure_script(module: str, *arguments: str) -> Outcome:
    """Run one of the others; its times are what it prints."""
    began = time.time()
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ended, found = time.time(), json.loads(output.splitlines()[-1])
    rate = statistics.median(found["rates"][1:])
    return Outcome(rate, found["first_step"] - began, ended - found["last_epoch"], found["peak_gib"])


def measure_project(dataset: str, arch: str, precision: str, num_workers: int = 1) -> Outcome:
    """Run jobs/train.py; its times are read from its run folder."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "jobs/train.py", "--arch", arch, "--dataset", dataset, "--storage", storage]
        command += ["--run-name", "one", "--global-batch-size", str(BATCH), "--epochs", str(EPOCHS)]
        command += ["--precision", precision, "--recipe", "notes", "--num-workers", str(num_workers)]
        began = time.time()
        subprocess.run(command, check=True, capture_output=True)
        ended = time.time()
        from trainer.record import checkpoint as checkpoints
        from trainer.record.run_folder import RunFolder

        run = RunFolder(str(Path(storage, "one")))
        history = run.read_metrics()
        last = checkpoints.find_last(run.checkpoints)
        # Written when the last epoch is over. What the first epoch takes longer than another is its first step.
        over = Path(run.checkpoints, last.name, "checkpoint.json").stat().st_mtime
        seconds = [row["epoch_seconds"] for row in history]
        first = over - sum(seconds) + max(0.0, seconds[0] - statistics.median(seconds[1:]))
        rate = statistics.median(row["images_per_second"] for row in history[1:])
        peak = max(row["peak_memory_gib"] for row in history)
        wait = statistics.median(row["data_wait_seconds"] / row["epoch_seconds"] for row in history[1:])
        return Outcome(rate, first - began, ended - over, peak, wait)


def main(
    dataset: Annotated[str, typer.Argument(help="Prepared.")],
    source: Annotated[str, typer.Option(help="Class folders, for Ray's stock path too.")] = "",
    arch: Annotated[str, typer.Option()] = "cnn_tapered",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    size = str(load_manifest(dataset).image_size)
    contestants = {SCRIPT: partial(measure_script, HERE, "--script", dataset, arch)}
    contestants |= {name: partial(measure_project, dataset, arch, one) for name, one in PRECISIONS.items()}
    if source:
        contestants[STOCK] = partial(measure_script, HERE, "--stock", source, arch, size)
    if importlib.util.find_spec("torch") and "later_filters" in ARCHITECTURES[arch].arguments:
        contestants[TORCH] = partial(measure_script, "benchmarks.torch_loop", dataset, arch)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            outcomes[name].append(measure())
            print(f"{name}: {outcomes[name][-1]}", file=sys.stderr, flush=True)
    table = Table(arch, "images/s", "ratio", "input wait", "first step, s", "ratio", "end, s", "GiB", "ratio")
    for name, found in outcomes.items():
        cells = []
        for field, digits in (("images_per_second", 0), ("first_step_seconds", 1), ("end_seconds", 1), ("peak_gib", 2)):
            values = [getattr(one, field) for one in found]
            cells.append(format_spread(values, digits))
            if field != "end_seconds":
                cells.append(format_ratio(values, [getattr(one, field) for one in outcomes[SCRIPT]]))
        wait = f"{statistics.median(one.wait_share for one in found):.1%}" if name in PRECISIONS else ""
        table.add_row(name, *cells[:2], wait, *cells[2:])
    records = {name: [asdict(one) for one in found] for name, found in outcomes.items()}
    report(table, records, find_marks(outcomes), as_json=as_json)


def find_marks(outcomes: dict[str, list[Outcome]]) -> list[Mark]:
    """Return the targets of this project against the notes' script."""

    def ratio(name: str, field: str) -> float:
        return ratio_of(*([getattr(one, field) for one in outcomes[which]] for which in (name, SCRIPT)))

    float32, *_ = PRECISIONS
    # `auto` takes the faster of them by trials of its own.
    auto = max(PRECISIONS, key=lambda name: ratio(name, "images_per_second"))
    return [
        Mark("images/s, float32, to the script's", ratio(float32, "images_per_second"), 0.98),
        Mark("images/s, --precision auto, to the script's", ratio(auto, "images_per_second"), 1.0),
        Mark("first step, to the script's", ratio(auto, "first_step_seconds"), 2.5, at_least=False),
        Mark("end, s", statistics.median(one.end_seconds for one in outcomes[auto]), 3.0, at_least=False),
        Mark("GiB, to the script's", ratio(auto, "peak_gib"), 1.2, at_least=False),
        Mark("input wait", statistics.median(one.wait_share for one in outcomes[auto]), 0.02, at_least=False),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:
        run_script(*sys.argv[2:])
    elif sys.argv[1:2] == ["--stock"]:
        run_stock(*sys.argv[2:])
    else:
        typer.run(main)
