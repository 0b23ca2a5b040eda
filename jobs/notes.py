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
    output: Annotated[str, Option(help="Folder or s3:// prefix for the two files. Default: STORAGE.")] = "",
) -> None:
    """Write NOTES.md and report.html, a page without external resources, about all runs in STORAGE."""
    with console.exit_codes():
        from trainer.notes.report import write_notes_and_report

        written, left_out = write_notes_and_report(storage, output)
        for line in left_out:
            console.stderr.print(f"left out: {line}", markup=False)
        for uri in written:
            console.stdout.print(uri, markup=False)


if __name__ == "__main__":
    app()
