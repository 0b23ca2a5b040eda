"""The ``training-notes`` command of the installed package: every job is a subcommand, with shell completion."""

import typer

from jobs import batch_size, doctor, evaluate, explain, notes, plan, predict, prepare, sweep, train
from trainer.runtime.commands import JobGroup

app = typer.Typer(
    name="training-notes", cls=JobGroup, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

for job in (prepare, train, batch_size, evaluate, predict, explain, notes, sweep, plan, doctor):
    (command,) = job.app.registered_commands
    app.command(job.__name__.rpartition(".")[2].replace("_", "-"), cls=command.cls)(job.main)


@app.callback()
def describe() -> None:
    """Train image classifiers as batch jobs on Ray, and write training notes about the results."""


if __name__ == "__main__":
    app()
