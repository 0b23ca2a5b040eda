"""The largest batch against a small one, over equal epochs and over equal optimizer steps: k of n on validation.

Each row is a run of jobs/train.py with the recipe's rate scaled by its rule (`TrainConfig.peak_learning_rate`); rows
that are finished in STORAGE are not trained again. Equal epochs cost the same images, equal steps the same updates.

Run: python -m benchmarks large_batch DATASET STORAGE --arch cnn_tapered [--small 32] [--large 144] [--seed 0]
"""

import subprocess
import sys
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.table import report
from trainer.config.recipes import recipe_epochs
from trainer.record.evaluation_result import describe_accuracy
from trainer.record.run_folder import RunFolder
from trainer.training.dataset import load_manifest


def main(
    dataset: Annotated[str, typer.Argument()],
    storage: Annotated[str, typer.Argument()],
    arch: Annotated[list[str], typer.Option()],
    small: Annotated[int, typer.Option(help="Global batch.")] = 32,
    large: Annotated[int, typer.Option(help="Global batch; default: a tenth of the train split.")] = 0,
    seed: Annotated[list[int], typer.Option()] = [0],  # noqa: B006
    precision: Annotated[str, typer.Option()] = "mixed_bfloat16",
) -> None:
    rows = load_manifest(dataset).splits["train"].rows
    large = large or rows // 10
    table = Table("architecture", "seed", "what", "batch", "epochs", "steps", "rate", "val", "loss", "minutes")
    for name in arch:
        epochs = recipe_epochs("modern", name, rows // small)
        same_steps = round(epochs * (rows // small) / (rows // large))
        for what, batch, count in (
            ("small", small, epochs),
            ("large, equal epochs", large, epochs),
            ("large, as left open", large, recipe_epochs("modern", name, rows // large)),
            ("large, equal steps", large, same_steps),
        ):
            for one in seed:
                run = RunFolder(f"{storage}/{name}-{batch}-{count}-{one}")
                command = [sys.executable, "jobs/train.py", "--arch", name, "--dataset", dataset, "--storage", storage]
                command += ["--run-name", run.name, "--seed", str(one), "--precision", precision]
                command += ["--global-batch-size", str(batch), "--epochs", str(count)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                result, config = run.read_result(), run.read_record().config
                table.add_row(
                    *(name, str(one), what, str(batch), str(count), str(result.steps)),
                    f"{config.peak_learning_rate:.2g}",
                    describe_accuracy(result.val.correct, result.val.total),
                    *(f"{result.val.loss:.3f}", f"{result.train_seconds / 60:.1f}"),
                )
    report(table)


if __name__ == "__main__":
    typer.run(main)
