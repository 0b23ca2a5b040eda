"""Writes the notebook and the report of all runs of a storage."""

from typing import Annotated

import typer
from typer import Argument, Option

from trainer.runtime import console

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    storage: Annotated[str, Argument(help="Where the run folders are, local or s3://.")],
    output: Annotated[str, Option(help="Where the two files go, local or s3://; default: STORAGE.")] = "",
) -> None:
    """Write NOTES.md and report.html, one page without outside resources, from all runs below STORAGE."""
    with console.exit_codes():
        from trainer.notes.report import write_notes_and_report

        written, left_out = write_notes_and_report(storage, output)
        for line in left_out:
            console.stderr.print(f"left out: {line}", markup=False)
        for uri in written:
            console.stdout.print(uri, markup=False)


if __name__ == "__main__":
    app()
