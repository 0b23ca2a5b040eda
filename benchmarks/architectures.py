"""How well each architecture learns a dataset by each recipe: k of n on validation, epochs, minutes.

Every row is a run of jobs/train.py, one after the other; a run that is finished in STORAGE is not trained again, so the
command goes on where it was interrupted, and `jobs/notes.py STORAGE` makes the page of the same runs. What stands after
`--` goes to each run. Two rows of one architecture on the same images are compared by an exact paired test.

Run: python -m benchmarks architectures DATASET STORAGE [--arch NAME] [--recipe modern] [--seed 0] [-- OPTIONS]
"""

import itertools
import subprocess
import sys
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.table import report
from trainer.config.recipes import RECIPES
from trainer.notes.comparison import compare_predictions
from trainer.record.evaluation_result import describe_accuracy
from trainer.record.run_folder import RunFolder, StartedRun, find_runs


def train(dataset: str, storage: str, arch: str, recipe: str, seed: int, options: list[str]) -> None:
    name = f"{arch}-{recipe}-{seed}"
    command = [sys.executable, "jobs/train.py", "--arch", arch, "--dataset", dataset, "--storage", storage]
    command += ["--run-name", name, "--recipe", recipe, "--seed", str(seed), *options]
    print(" ".join(command), file=sys.stderr, flush=True)
    code = subprocess.run(command).returncode
    if code:
        # A run that diverged is a row too, and the others go on.
        print(f"{name} ended with {code}", file=sys.stderr, flush=True)


def print_outcomes(runs: list[StartedRun]) -> None:
    table = Table("architecture", "recipe", "seed", "precision", "batch", "val", "loss", "epochs", "steps", "minutes")
    by_arch: dict[str, list[RunFolder]] = {}
    for run in runs:
        config, result = run.record.config, run.folder.read_result()
        if result is None:
            continue
        by_arch.setdefault(config.arch, []).append(run.folder)
        table.add_row(
            *(config.arch, config.recipe, str(config.seed), config.precision, str(config.global_batch_size)),
            describe_accuracy(result.val.correct, result.val.total) if result.status == "completed" else result.status,
            *(f"{result.val.loss:.3f}", str(result.epochs), str(result.steps), f"{result.train_seconds / 60:.1f}"),
        )
    report(table)
    for same_arch in by_arch.values():
        for first, second in itertools.combinations(same_arch, 2):
            predictions = first.read_predictions(), second.read_predictions()
            if all(table is not None for table in predictions):
                print(compare_predictions(*predictions).describe(first.name, second.name))


def main(
    dataset: Annotated[str, typer.Argument()],
    storage: Annotated[str, typer.Argument()],
    options: Annotated[list[str] | None, typer.Argument()] = None,
    arch: Annotated[list[str], typer.Option(help="Default: all of the recipe.")] = [],  # noqa: B006
    recipe: Annotated[list[str], typer.Option()] = ["modern"],  # noqa: B006
    seed: Annotated[list[int], typer.Option()] = [0],  # noqa: B006
) -> None:
    for a_seed, a_recipe in itertools.product(seed, recipe):
        for name in arch or RECIPES[a_recipe]:
            train(dataset, storage, name, a_recipe, a_seed, options or [])
    print_outcomes(find_runs(storage)[0])


if __name__ == "__main__":
    typer.run(main)
