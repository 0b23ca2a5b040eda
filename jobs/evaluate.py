"""Evaluates the best checkpoint of a run on a whole split."""

from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from trainer import console
from trainer.options import Wait

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[str, Argument(help="Run folder, local or s3://.")],
    split: Annotated[Literal["val", "test"], Option(help="Reading test is counted in the run's folder.")] = "val",
    dataset: Annotated[str, Option(help="Another prepared dataset; default: the run's own.")] = "",
    as_json: Annotated[bool, Option("--json", help="Print the whole result as JSON.")] = False,
    wait: Wait = 0,
) -> None:
    """Print loss, accuracy and what they are made of, over every image of a split once."""
    with console.exit_codes():
        from trainer.cluster import connect
        from trainer.inference import evaluate_run, read_finished_run

        folder, _, result = read_finished_run(run)
        with connect(wait_seconds=wait, one_process=True) as resources:
            evaluation = evaluate_run(run, split, dataset, resources)
        if as_json:
            console.stdout.print(evaluation.model_dump_json(), markup=False)
            return
        table = Table("class", "right", "of")
        for one in evaluation.listed:
            table.add_row(Text(one.name), str(one.correct), str(one.total))
        console.stdout.print(table)
        if len(evaluation.listed) < len(evaluation.per_class):
            console.stdout.print(f"lowest shares right of {len(evaluation.per_class)} classes; --json prints all")
        console.stdout.print(f"{split}  {evaluation}", markup=False)
        console.stdout.print(
            f"top {evaluation.top_k}: {evaluation.top_k_correct} of {evaluation.total}; "
            f"calibration error: {evaluation.calibration_error:.3f}"
        )
        if split == "test":
            console.stdout.print(folder.describe_test_reads())
        elif not dataset:
            same = evaluation == result.val
            console.stdout.print("exactly as recorded" if same else f"recorded were {result.val}", markup=False)


if __name__ == "__main__":
    app()
