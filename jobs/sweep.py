"""Runs the trials of a study and writes its report; running it again continues it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from typer import Argument, Option

from trainer.config.options import Wait
from trainer.runtime import console

if TYPE_CHECKING:
    from trainer.study.file import Study
    from trainer.study.folder import Trial

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    study_file: Annotated[Path, Argument(metavar="STUDY.toml", help="What is asked and what is varied.")],
    storage: Annotated[str, Option(help="Where the study goes, local or s3://.")] = "runs",
    name: Annotated[str, Option(help="Of the study; default: that of the file.")] = "",
    new_round: Annotated[bool, Option("--new-round", help="Begin the next dated round.")] = False,
    characterize: Annotated[int, Option(min=0, help="Repeat the best trial and the base with N other seeds.")] = 0,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Run failed trials again.")] = False,
    max_failures: Annotated[int, Option(min=0, help="How often lost workers of a trial are started again.")] = 3,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would run, and end.")] = False,
    status: Annotated[bool, Option("--status", help="Show what has run, and end.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the trials as JSON.")] = False,
    wait: Wait = 0,
) -> None:
    """Run the trials that a study still lacks, on the cluster that RAY_ADDRESS names or on this machine."""
    with console.exit_codes():
        # Not at the top: --help and a wrong file answer without loading Ray.
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
    """Print what became of each trial."""
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
