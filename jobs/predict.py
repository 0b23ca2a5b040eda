"""Predicts the classes of images with the best weights of a run."""

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from data_prep.sources import SourceFormat, find_images
from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_count

if TYPE_CHECKING:
    from trainer.inference import PredictionSummary

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[str, Argument(help="Run folder, local or s3://.")],
    source: Annotated[str, Argument(help="Images, in folders or not, or any other source that prepare takes.")],
    output: Annotated[str, Argument(help="Folder or s3:// prefix for the Parquet files.")],
    source_format: Annotated[SourceFormat | None, Option("--format", help="Default: detected.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images that go through the network together.")] = 64,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the predictions that OUTPUT holds.")] = False,
    wait: Wait = 0,
) -> None:
    """Write path, label, predicted class, confidence and probabilities of every image of SOURCE."""
    with console.exit_codes():
        from data_prep.decode import ImageOptions
        from data_prep.images import read_images
        from trainer.inference import check_output, predict_images, read_finished_run
        from trainer.runtime.cluster import connect

        manifest = read_finished_run(run)[0].read_manifest()
        options = ImageOptions.of(manifest)
        # Before a cluster is started, which takes longer than to find out that there is no such file.
        found = find_images(source, source_format, labelled=False)
        place = check_output(output, overwrite=overwrite)
        with connect(wait_seconds=wait) as resources, console.show_events() as on_event:
            if found.listed.is_notable:
                on_event(found.listed)
            images, num_images = read_images(found, options)
            summary = predict_images(
                images, num_images, run, place, resources, batch_size=batch_size, on_event=on_event
            )
        print_summary(output, summary)
        check_summary(source, output, summary)


def print_summary(output: str, summary: "PredictionSummary") -> None:
    """Print how many images there were, how many could not be used, and how many were predicted correctly."""
    from trainer.record.evaluation_result import describe_accuracy

    reasons = ", ".join(f"{reason}: {count}" for reason, count in summary.rejected.items())
    bad = f", {sum(summary.rejected.values())} not decoded ({reasons})" if reasons else ""
    console.stdout.print(f"{output}: {format_count(summary.images, 'image')}{bad}", markup=False)
    if summary.labelled:
        console.stdout.print(describe_accuracy(summary.correct, summary.labelled))


def check_summary(source: str, output: str, summary: "PredictionSummary") -> None:
    """Raise InputError where not one image was predicted: such a source was given by mistake."""
    if sum(summary.rejected.values()) == summary.images:
        raise InputError(f"none of the files of {source} is an image that can be read; {output} has the reasons")


if __name__ == "__main__":
    app()
