"""Train one architecture on a prepared dataset, or on the built-in one."""

from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Option

from trainer.architectures import ARCHITECTURES
from trainer.config.options import GroupedCommand, add_run_options, parse_command
from trainer.runtime import console

# Plain text for wrong options and tracebacks: boxes are hard to read in a job log.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=GroupedCommand)
@add_run_options
def main(
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the config and what would be measured, and exit.")
    ] = False,
    list_archs: Annotated[bool, Option("--list-archs", help="Print the architectures, and exit.")] = False,
    storage: Annotated[str, Option(help="Folder or s3:// prefix in which the run is stored.")] = "runs",
    run_name: Annotated[
        str,
        Option(help="Name of the run folder; that of an interrupted run resumes it. Default: architecture and time."),
    ] = "",
    wait: Annotated[int, Option(min=0, help="Seconds to wait for free workers or starting nodes.")] = 0,
    max_failures: Annotated[int, Option(min=0, help="How often the workers are restarted after they were lost.")] = 3,
    probe_again: Annotated[
        bool,
        Option(
            "--probe-again",
            help="Measure batch sizes again and try the augmentation again, also where earlier runs did.",
        ),
    ] = False,
    profile: Annotated[
        bool, Option("--profile", help="Profile some steps of the first worker; written to RUN/profile.")
    ] = False,
    profile_steps: Annotated[
        int, Option(min=1, help="Number of steps to profile; the first steps of a run are skipped.")
    ] = 10,
    track: Annotated[
        list[str], Option(help="Also log the run with tensorboard, mlflow or wandb; repeat for several.")
    ] = [],  # noqa: B006
    **options: Any,
) -> None:
    """Train on all GPUs of the cluster at RAY_ADDRESS, or on this machine, and write a run folder."""
    with console.exit_codes():
        if list_archs:
            print_architectures()
            return
        request = parse_command(options)
        # Not at the top, so that --help and errors in options do not load Ray.
        if dry_run:
            from trainer.dry_run import preview_run
            from trainer.launch import check_request
            from trainer.runtime.cluster import connect
            from trainer.runtime.storage import resolve_uri
            from trainer.training.tracking import check_trackers

            check_request(request, storage, run_name)
            check_trackers(track, resolve_uri(storage))
            with connect(wait_seconds=None, one_process=True) as resources:
                console.stdout.print(preview_run(request, storage, resources), markup=False)
            return
        from trainer.interface import check_outcome, train_request

        with console.show_events() as on_event:
            run, result = train_request(
                request,
                storage,
                run_name,
                wait=wait,
                max_failures=max_failures,
                trackers=track,
                probe_again=probe_again,
                profile_steps=profile_steps * profile,
                on_event=on_event,
            )
        for line in result.summary:
            console.print_words(line)
        console.stdout.print(f"run         {run.uri}", markup=False)
        check_outcome(result)


def print_architectures() -> None:
    """Print a table of the architectures, with the parameters that their sources say."""
    table = Table("arch", "parameters", "of input, classes", "smallest size", "source")
    for name, spec in ARCHITECTURES.items():
        image_size, channels, num_classes, parameters = spec.parameters
        of_input = f"{image_size}x{image_size}x{channels}, {num_classes}"
        table.add_row(name, f"{parameters:,}", of_input, str(spec.min_image_size), spec.source)
    console.stdout.print(table)


if __name__ == "__main__":
    app()
