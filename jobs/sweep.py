"""Run the trials of a study and write its report; running it again continues the study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from typer import Argument, Option

from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.commands import JobCommand

if TYPE_CHECKING:
    from trainer.study.file import Study
    from trainer.study.folder import Trial

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    study_file: Annotated[
        Path, Argument(metavar="STUDY.toml", help="File that describes the study: its question and the values to try.")
    ],
    storage: Annotated[str, Option(help="Folder or s3:// prefix in which the study is stored.")] = "runs",
    name: Annotated[str, Option(help="Name of the study. Default: the name of STUDY.toml.")] = "",
    new_round: Annotated[bool, Option("--new-round", help="Start a new round, in a folder with today's date.")] = False,
    characterize: Annotated[
        int, Option(min=0, help="Number of other seeds to repeat the best trial and the base with.")
    ] = 0,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Run failed trials again.")] = False,
    max_failures: Annotated[
        int, Option(min=0, help="How often the workers of a trial are restarted after they were lost.")
    ] = 3,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would run, and exit.")] = False,
    status: Annotated[bool, Option("--status", help="Print the trials so far, and exit.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the trials as JSON.")] = False,
    wait: Wait = 0,
) -> None:
    """Run the remaining trials of a study on the cluster at RAY_ADDRESS, or on this machine."""
    with console.exit_codes():
        # Not at the top, so that --help and errors in the file do not load Ray.
        from trainer.study.file import find_warnings, load_study
        from trainer.study.folder import find_round

        study = load_study(study_file)
        folder = find_round(storage, name or study_file.stem, new=new_round)
        trials = folder.read_trials()
        lacking = study.trials > sum(trial.ended and trial.kind == "search" for trial in trials)
        if not status and (lacking or characterize or retry_failed or dry_run):
            from trainer.runtime.cluster import connect
            from trainer.study.sweep import plan_study, run_study

            folder.check_access()
            for warning in find_warnings(study):
                console.stderr.print(f"warning: {warning}", markup=False)
            with console.show_events() as on_event, connect(wait_seconds=wait) as resources:
                console.stderr.print(str(plan_study(study, folder, resources)), markup=False)
                if dry_run:
                    return
                trials = run_study(
                    study,
                    folder,
                    resources,
                    characterize=characterize,
                    retry_failed=retry_failed,
                    max_failures=max_failures,
                    on_event=on_event,
                )
        elif not status:
            from trainer.study.sweep import conclude_study

            trials = conclude_study(study, folder)
        if as_json:
            console.stdout.print_json(data=[trial.model_dump(mode="json") for trial in trials])
            return
        print_trials(study, trials)
        if report := folder.report:
            console.stdout.print(f"report  {report}", markup=False)


def print_trials(study: "Study", trials: "list[Trial]") -> None:
    """Print a table of the trials."""
    table = Table("trial", "status", study.objective, "correct", Column("values", overflow="fold"), box=None)
    for trial in trials:
        values = ", ".join(f"{name}={_shorten(value)}" for name, value in trial.values.items())
        objective = "" if trial.objective is None else f"{trial.objective:.4f}"
        table.add_row(trial.run_name, trial.status, objective, f"{trial.correct} of {trial.total}", values)
    console.stdout.print(table)


def _shorten(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app()
