"""Whether the scaling rule holds: the best base learning rate at each batch, where all rows see the same images.

A cell is a run of jobs/train.py at a base rate, which the rule (`TrainConfig.peak_learning_rate`) scales to the batch:
by the square root. Where the rule holds, the best base rate is the same at every batch, within a factor of 2. Runs
that are finished in STORAGE are not trained again. The best epoch counts, by validation loss.

Run: python -m benchmarks learning_rates DATASET STORAGE --arch cnn_tapered [--optimizer adamw] [--batch 16 --batch 64]
"""

import math
import subprocess
import sys
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.table import report
from trainer.config.recipes import RECIPES
from trainer.record.evaluation_result import describe_accuracy
from trainer.record.run_folder import RunFolder
from trainer.training.dataset import load_manifest

_SMALLEST = 16
# Rates of the recipe times these.
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def main(
    dataset: Annotated[str, typer.Argument()],
    storage: Annotated[str, typer.Argument()],
    arch: Annotated[str, typer.Option()],
    optimizer: Annotated[str, typer.Option()] = "adamw",
    batch: Annotated[list[int], typer.Option(help="Default: doubled from 16 to a tenth of the train split.")] = [],  # noqa: B006
    rate: Annotated[
        list[float],
        typer.Option(help="Base rates. Default: the recipe's, or 0.04 for sgd and 0.002 for others, x 1/4 to 4."),
    ] = [],  # noqa: B006
    epochs: Annotated[int, typer.Option(help="Passes over the images, the same at every batch.")] = 20,
    seed: Annotated[list[int], typer.Option()] = [0],  # noqa: B006
    precision: Annotated[str, typer.Option()] = "float32",
    option: Annotated[list[str], typer.Option(help="Further words for train.py, such as --augment-rotation=0.")] = [],  # noqa: B006
) -> None:
    rows = load_manifest(dataset).splits["train"].rows
    batches = batch or [_SMALLEST * 2**power for power in range(int(math.log2(rows / 10 / _SMALLEST)) + 1)]
    rates = rate or [_base_rate(arch, optimizer) * factor for factor in _FACTORS]
    table = Table("batch", "steps", "base rate", "rate", "seed", "best epoch", "val", "loss", "status")
    best: list[tuple[int, float, float]] = []
    for size in batches:
        losses = []
        for base in rates:
            of_seeds = []
            for one in seed:
                run = RunFolder(f"{storage}/{arch}-{optimizer}-{size}-{base:g}-{epochs}-{one}")
                command = [sys.executable, "jobs/train.py", "--arch", arch, "--dataset", dataset, "--storage", storage]
                command += ["--run-name", run.name, "--seed", str(one), "--precision", precision, *option]
                command += ["--optimizer", optimizer, "--base-learning-rate", str(base)]
                command += ["--global-batch-size", str(size), "--epochs", str(epochs)]
                # A rate at which training diverges is a result, too.
                subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
                record, result = run.read_record(), run.read_result()
                peak = f"{record.config.peak_learning_rate:.2g}" if record else ""
                if result is None:
                    of_seeds.append(math.inf)
                    table.add_row(str(size), "", f"{base:g}", peak, str(one), "", "", "", "diverged or failed")
                    continue
                of_seeds.append(min(row["val_loss"] for row in run.read_metrics()))
                table.add_row(
                    *(str(size), str(result.steps), f"{base:g}", peak, str(one), str(result.best_epoch)),
                    describe_accuracy(result.val.correct, result.val.total),
                    *(f"{of_seeds[-1]:.3f}", result.status),
                )
            losses.append(sum(of_seeds) / len(of_seeds))
        lowest = min(range(len(rates)), key=losses.__getitem__)
        best.append((size, rates[lowest], losses[lowest]))
    report(table)
    summary = Table("batch", "best base rate", "mean lowest val loss", "at an edge")
    for size, base, loss in best:
        summary.add_row(str(size), f"{base:g}", f"{loss:.3f}", "yes" if base in (rates[0], rates[-1]) else "")
    report(summary)


def _base_rate(arch: str, optimizer: str) -> float:
    recipe = RECIPES["modern"].get(arch, {})
    if recipe.get("optimizer") == optimizer:
        return float(recipe["base_learning_rate"])
    return 0.04 if optimizer == "sgd" else 0.002


if __name__ == "__main__":
    typer.run(main)
