"""Measure all batch sizes on the training workers: the whole of the table that the choice of a batch is based on."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from trainer.config.options import GroupedCommand, add_run_options, parse_command
from trainer.runtime import console

if TYPE_CHECKING:
    from trainer.config.batch_table import BatchTable

_BAR_WIDTH = 30

# Plain text for wrong options and tracebacks: boxes are hard to read in a job log.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=GroupedCommand)
@add_run_options
def main(
    storage: Annotated[str, Option(help="Folder or s3:// prefix in which the measurements are stored.")] = "runs",
    wait: Annotated[int, Option(min=0, help="Seconds to wait for free workers or starting nodes.")] = 0,
    probe_again: Annotated[
        bool, Option("--probe-again", help="Measure again, also what has been measured before.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print the table as JSON.")] = False,
    **options: Any,
) -> None:
    """Measure throughput and memory by batch size and precision, and print which batch size a run would use and why."""
    with console.exit_codes():
        request = parse_command(options)
        # Not at the top, so that --help and errors in options do not load Ray.
        from data_prep.embedded import prepare_embedded
        from trainer import launch
        from trainer.runtime.cluster import connect
        from trainer.workers.groups import wait_for_workers

        launch.check_request(request, storage)
        one_process = launch.needs_one_process(request, storage)
        with connect(wait_seconds=None, one_process=one_process) as cluster, console.show_events() as on_event:
            resources = wait_for_workers(request.num_workers, cluster, wait, on_event)
            request = launch.choose_dataset(request, storage, prepare_embedded, on_event)
            choice, bottlenecks = launch.measure_batches(
                request, storage, resources, probe_again=probe_again, on_event=on_event
            )
        if as_json:
            console.stdout.print(choice.model_dump_json(indent=2), markup=False)
            return
        if choice.table is not None:
            print_table(choice.table)
        for line in (*bottlenecks, choice.explanation):
            console.stdout.print(line, markup=False)


def print_table(table: "BatchTable") -> None:
    """Print the measurements, those of the chosen precision last."""
    is_terminal = console.stdout.is_terminal
    columns = ["precision", "per replica", "global", "images/s", "ms per step", "spread", "GiB per worker", "verdict"]
    printed = Table(*columns, *(["throughput"] if is_terminal else []))
    order = sorted(table.measurements, key=lambda name: name == table.precision)
    best = max(one.images_per_second for rows in table.measurements.values() for one in rows)
    for name in order:
        for one in table.measurements[name]:
            bar = "█" * round(_BAR_WIDTH * one.images_per_second / best)
            printed.add_row(
                *(name, str(one.size), str(one.size * one.num_replicas), f"{one.images_per_second:.0f}"),
                *(f"{one.seconds_per_step * 1000:.0f}", f"{one.seconds_spread * 1000:.0f}"),
                *(f"{one.peak_memory_gib:.2f}", table.verdict(one)),
                *([bar] if is_terminal else []),
            )
        if name in table.failed:
            size = table.failed[name]
            printed.add_row(name, str(size), str(size * table.num_replicas), "", "", "", "", "out of memory")
        printed.add_section()
    console.stdout.print(printed)


if __name__ == "__main__":
    app()
