"""Find what is wrong with this machine, the cluster and the storage, and how to fix it."""

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.commands import JobCommand

if TYPE_CHECKING:
    from trainer.doctor import Finding

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    storage: Annotated[str, Option(help="Folder or s3:// prefix of the runs, to check access to it.")] = "runs",
    wait: Wait = 0,
) -> None:
    """Check versions, Keras, GPUs, Ray, disks and storage on every node, one line each; exit with 2 if one is wrong."""
    with console.exit_codes():
        from trainer.doctor import check_cluster, check_packages

        findings = check_packages()
        print_findings(findings)
        if not any(one.fix for one in findings):
            from trainer.runtime.cluster import connect

            with connect(wait_seconds=wait or None) as resources:
                of_cluster = check_cluster(storage, resources)
            print_findings(of_cluster)
            findings += of_cluster
    if any(one.fix for one in findings):
        raise typer.Exit(2)


def print_findings(findings: "list[Finding]") -> None:
    """Print one line for each finding."""
    for one in findings:
        console.stdout.print(str(one), markup=False)


if __name__ == "__main__":
    app()
