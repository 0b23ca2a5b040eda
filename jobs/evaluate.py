"""Evaluate the best checkpoint of a run on a whole split."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.commands import JobCommand

if TYPE_CHECKING:
    from trainer.inference import EvaluationRequest
    from trainer.record.evaluation_result import EvaluationResult

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    run: Annotated[str, Argument(help="Folder or s3:// prefix of a finished run.")],
    split: Annotated[
        Literal["val", "test", "train"],
        Option(
            help="Split to evaluate. Each evaluation on test is counted, in RUN or, if given, in --output; train is "
            "for finding images that were learned with a wrong label or not at all."
        ),
    ] = "val",
    dataset: Annotated[str, Option(help="Prepared dataset to evaluate on. Default: that of the run.")] = "",
    output: Annotated[str, Option(help="Folder or s3:// prefix for the results. Default: RUN/evaluations.")] = "",
    as_json: Annotated[bool, Option("--json", help="Print the complete result as JSON.")] = False,
    wait: Wait = 0,
) -> None:
    """Evaluate the best checkpoint on every image of a split; print loss, accuracy and counts for each class."""
    with console.exit_codes():
        from trainer.inference import evaluate_run, request_evaluation, save_evaluation
        from trainer.runtime.cluster import connect

        request = request_evaluation(run, split, dataset, output)
        with connect(wait_seconds=wait, one_process=True) as resources:
            evaluation, predictions = evaluate_run(request, resources)
        if as_json:
            console.stdout.print(evaluation.model_dump_json(), markup=False)
        else:
            print_evaluation(request, evaluation, is_own=not dataset)
        # Last, so that the results have been printed if the output can no longer be written.
        save_evaluation(request, evaluation, predictions)


def print_evaluation(request: "EvaluationRequest", evaluation: "EvaluationResult", *, is_own: bool) -> None:
    """Print the results and, on the run's own dataset, whether they equal those that the run recorded."""
    from trainer.inference import describe_test_reads

    table, scores = Table("class", "correct", "of", "precision", "recall", "F1"), evaluation.scores
    for one in evaluation.listed:
        table.add_row(Text(one.name), str(one.correct), str(one.total), *scores[one.name].cells)
    console.stdout.print(table)
    if len(evaluation.listed) < len(evaluation.per_class):
        console.stdout.print(f"lowest accuracies of {len(evaluation.per_class)} classes; --json prints all")
    console.stdout.print(f"{request.split}  {evaluation}", markup=False)
    console.stdout.print(
        f"top {evaluation.top_k}: {evaluation.top_k_correct} of {evaluation.total}; "
        f"calibration error: {evaluation.calibration_error:.3f}"
    )
    if request.split == "test":
        console.stdout.print(describe_test_reads(request), markup=False)
    elif is_own:
        recorded = request.result.val
        same = evaluation == recorded
        console.stdout.print("exactly as recorded" if same else f"the run recorded {recorded}", markup=False)


if __name__ == "__main__":
    app()
