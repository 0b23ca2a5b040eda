"""Trains one architecture on a prepared dataset, or on the embedded one."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from trainer import console
from trainer.errors import JobError
from trainer.options import add_config_options, parse_assignment

if TYPE_CHECKING:
    from trainer.launch import ArchitectureDescription


# Plain lines for wrong options and for tracebacks: a job log has no use for boxes.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
@add_config_options
def main(
    arch: Annotated[str, Option(help="Architecture; --list-archs shows them.")] = "",
    list_archs: Annotated[bool, Option("--list-archs", help="Show the architectures and end.")] = False,
    dataset: Annotated[str, Option(help="Prepared dataset, local or s3://; default: 5,000 MNIST images.")] = "",
    storage: Annotated[str, Option(help="Where the run folder goes, local or s3://.")] = "runs",
    run_name: Annotated[str, Option(help="Default: arch and time. A used name continues its run.")] = "",
    num_workers: Annotated[str, Option(help="A number, MIN:MAX, or auto: one a GPU, or one.")] = "auto",
    wait: Annotated[int, Option(min=0, help="Seconds to wait for free workers, or for nodes that start.")] = 0,
    arch_argument: Annotated[list[str], Option(help="NAME=VALUE of the family, such as dropout=0.3.")] = [],  # noqa: B006
    recipe: Annotated[str, Option(help="Where values that are not given come from: modern or notes.")] = "modern",
    max_failures: Annotated[int, Option(min=0, help="How often lost workers are started again.")] = 3,
    probe_again: Annotated[bool, Option("--probe-again", help="Measure batch sizes even where it was done.")] = False,
    profile: Annotated[bool, Option("--profile", help="Trace some steps of the first worker: RUN/profile.")] = False,
    profile_steps: Annotated[int, Option(min=1, help="How many; the first of a run are left out.")] = 10,
    track: Annotated[list[str], Option(help="Where metrics go too: tensorboard, mlflow.")] = [],  # noqa: B006
    **options: Any,
) -> None:
    """Train on every GPU of the cluster that RAY_ADDRESS names, or on this machine, and write a run folder."""
    options |= {"arch": arch, "recipe": recipe, "num_workers": num_workers, "dataset": dataset}
    options["arch_arguments"] = dict(map(parse_assignment, arch_argument))
    with console.exit_codes():
        # Not at the top: --help and wrong options answer without loading Ray.
        from trainer import launch
        from trainer.cluster import connect
        from trainer.tracking import check_trackers
        from trainer.workers import wait_for_workers

        if list_archs:
            print_architectures(launch.describe_architectures(dataset))
            return
        launch.check_options(options, storage, run_name)
        check_trackers(track)
        one_process = launch.needs_one_process(num_workers, arch, dataset, storage)
        with console.show_events() as on_event, connect(wait_seconds=None, one_process=one_process) as cluster:
            resources = wait_for_workers(num_workers, cluster, wait, on_event)
            with launch.open_run(storage, run_name, arch, resources) as run:
                if not dataset:
                    from data_prep.embedded import prepare_embedded

                    options["dataset"] = prepare_embedded(*launch.embedded_dataset(arch, storage), on_event)
                plan = launch.plan_run(options, run, resources, probe_again=probe_again, on_event=on_event)
                result = launch.launch(
                    plan,
                    run,
                    resources,
                    max_failures=max_failures,
                    trackers=tuple(track),
                    profile_steps=profile_steps * profile,
                    on_event=on_event,
                )
        for line in (*result.summary, f"run         {run.uri}"):
            console.stdout.print(line, markup=False)
        if result.status == "diverged":
            raise JobError(f"{result.reason}; lower --base-learning-rate or set --clip-norm")


def print_architectures(described: "list[ArchitectureDescription]") -> None:
    """Print what there is to choose from."""
    table = Table("arch", "parameters", "at size", "smallest size", "source")
    for one in described:
        table.add_row(one.name, one.size, str(one.image_size), str(one.min_image_size), one.source)
    console.stdout.print(table)


if __name__ == "__main__":
    app()
