"""Predict the time and cost of training with more workers, from the measurements of a finished run."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from trainer.runtime import console
from trainer.runtime.commands import JobCommand

if TYPE_CHECKING:
    from trainer.plan import Prediction

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    run: Annotated[str, Argument(help="Folder or s3:// prefix of a finished run on the same kind of worker.")],
    workers: Annotated[int, Option(min=1, help="Largest number of workers to predict for, one GPU each.")] = 8,
    workers_per_node: Annotated[int, Option(min=1, help="Number of GPUs per node.")] = 8,
    link_gbit: Annotated[float, Option(min=0.1, help="Bandwidth between two nodes in Gbit/s.")] = 25.0,
    local_gbit: Annotated[float, Option(min=0.1, help="Bandwidth between two GPUs of a node in Gbit/s.")] = 600.0,
    images: Annotated[int, Option(min=0, help="Number of training images; 0: that of the run.")] = 0,
    epochs: Annotated[int, Option(min=0, help="Number of epochs; 0: that of the run.")] = 0,
    batch: Annotated[int, Option(min=0, help="Images per step and worker; 0: that of the run.")] = 0,
    node_price: Annotated[float, Option(min=0, help="Price per node and hour, in any currency.")] = 0.0,
    as_json: Annotated[bool, Option("--json", help="Print the predictions as JSON.")] = False,
) -> None:
    """Print time, throughput, efficiency, traffic and cost for 1, 2, 4, ... workers, up to --workers."""
    with console.exit_codes():
        from trainer.config.batch_table import format_noise_scale
        from trainer.plan import Machines, find_advice, predict_up_to, read_workload

        given = {"rows": images, "epochs": epochs, "per_replica_batch_size": batch}
        workload = read_workload(run)
        workload = dataclasses.replace(workload, **{name: value for name, value in given.items() if value})
        if images or epochs:
            # The run says nothing of the steps that other images or epochs take.
            workload = dataclasses.replace(workload, noise_scale=None)
        machines = Machines(workers_per_node, link_gbit, local_gbit, node_price)
        predictions = predict_up_to(workload, machines, workers)
        if as_json:
            console.stdout.print_json(json.dumps([dataclasses.asdict(one) for one in predictions]))
            return
        print_predictions(predictions)
        until = "for the same epochs"
        if workload.noise_scale is not None:
            until = (
                f"to the result of the run, by its gradient noise scale of {format_noise_scale(workload.noise_scale)}"
            )
        console.stdout.print(f"hours   {until}", markup=False)
        console.stdout.print(f"memory  {workload.worker_gib:.2f} GiB per worker, as measured", markup=False)
        for line in find_advice(workload, machines, predictions):
            console.stdout.print(line, markup=False)


def print_predictions(predictions: "list[Prediction]") -> None:
    """Print a table with a row for each number of workers."""
    columns = (
        "workers",
        "nodes",
        "batch",
        "steps",
        "ms per step",
        "images/s",
        "efficiency",
        "hours",
        "GiB read",
        "GiB written",
    )
    table = Table(*columns, "cost", box=None)
    for one in predictions:
        table.add_row(
            *(str(one.workers), str(one.nodes), str(one.global_batch_size), str(one.steps_per_epoch)),
            *(f"{one.step_seconds * 1000:.1f}", f"{one.images_per_second:.0f}", f"{one.efficiency:.0%}"),
            *(f"{one.hours:.2f}", f"{one.read_gib:.2f}", f"{one.written_gib:.2f}", f"{one.cost:.2f}"),
        )
    console.stdout.print(table)


if __name__ == "__main__":
    app()
