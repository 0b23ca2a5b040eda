"""Write the notebook and the report of all runs in a storage."""

from typing import Annotated

import typer
from typer import Argument, Option

from trainer.runtime import console
from trainer.runtime.commands import JobCommand

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    storage: Annotated[str, Argument(help="Folder or s3:// prefix that contains the run folders.")],
    output: Annotated[str, Option(help="Folder or s3:// prefix for the pages. Default: STORAGE.")] = "",
) -> None:
    """Write NOTES.md and report.html about all runs in STORAGE, and a page for each with its curves and mistakes."""
    with console.exit_codes():
        from trainer.notes.report import write_notes_and_report

        with console.show_events() as on_event:
            written, left_out = write_notes_and_report(storage, output, on_event)
        for line in left_out:
            console.stderr.print(f"left out: {line}", markup=False)
        for uri in written:
            console.stdout.print(uri, markup=False)


if __name__ == "__main__":
    app()
