"""Seconds from the shell to the first optimizer step: TensorflowTrainer against DataParallelTrainer with TF_CONFIG.

Each run is a process of its own with a cluster of its own and two workers that take one step of a toy network; the two
trainers take turns. Run: python -m benchmarks trainer_start [--runs 5]
"""

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.table import format_ratio, format_spread, report

TRAINERS = ("TensorflowTrainer", "DataParallelTrainer + TF_CONFIG")


def first_step(config: dict[str, float]) -> float:
    """Take one step under MultiWorkerMirroredStrategy and return the seconds since the process began."""
    import tensorflow as tf
    import tf_keras as keras

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(tf.zeros((4, 8)), tf.zeros((4, 1)), batch_size=4, steps_per_epoch=1, verbose=0)
    return time.time() - config["began"]


def run_one(trainer_name: str, began: float) -> float:
    """Run one trainer to its end and return when its first step was taken."""
    from ray.train import RunConfig, ScalingConfig

    from trainer.runtime.cluster import connect

    with connect(), tempfile.TemporaryDirectory() as folder:
        options = {
            "train_loop_config": {"began": began},
            "scaling_config": ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            "run_config": RunConfig(storage_path=folder),
        }
        if trainer_name == TRAINERS[0]:
            from ray.train.tensorflow import TensorflowTrainer

            trainer = TensorflowTrainer(first_step, **options)
        else:
            from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

            from trainer.workers.backend import TensorFlowConfig

            trainer = DataParallelTrainer(first_step, backend_config=TensorFlowConfig(), **options)
        seconds: float = trainer.fit().return_value
    return seconds


def main(runs: Annotated[int, typer.Option(min=1)] = 5) -> None:
    first: dict[str, list[float]] = {name: [] for name in TRAINERS}
    whole: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for _ in range(runs):
        for name in TRAINERS:
            began = time.time()
            command = [sys.executable, "-m", "benchmarks.trainer_start", "--one", name, str(began)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            whole[name].append(time.time() - began)
            first[name].append(float(output.rpartition("first step after ")[2]))
    table = Table("trainer", "first step, s: median (min-max)", "whole, s: median", "ratio of first steps")
    for name in TRAINERS:
        ratio = format_ratio(first[name], first[TRAINERS[0]])
        table.add_row(name, format_spread(first[name], 1), f"{statistics.median(whole[name]):.1f}", ratio)
    report(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(f"first step after {run_one(sys.argv[2], float(sys.argv[3]))}")
    else:
        typer.run(main)
