"""Predict the classes of images with the best weights of a run."""

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from data_prep.sources import SourceFormat, find_images
from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.commands import JobCommand
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_count

if TYPE_CHECKING:
    from trainer.inference import PredictionSummary

# What the accuracy of each part is worth.
_PARTS = {
    "new": "",
    "test": "of the test split: counted as a reading of it",
    "val": "the best epoch was chosen on them",
    "train": "the network was trained on them",
}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    run: Annotated[str, Argument(help="Folder or s3:// prefix of a finished run.")],
    source: Annotated[
        str,
        Argument(
            help="Images in a file, folder or s3:// prefix, with or without classes, or any other source of prepare."
        ),
    ],
    output: Annotated[str, Argument(help="Folder or s3:// prefix to write Parquet files to.")],
    source_format: Annotated[
        SourceFormat | None, Option("--format", help="Format of SOURCE. Default: detected.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Number of images per forward pass.")] = 64,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the predictions in OUTPUT.")] = False,
    wait: Wait = 0,
) -> None:
    """Write path, label, split, predicted class, confidence and probabilities for every image of SOURCE."""
    with console.exit_codes():
        from data_prep.decode import ImageOptions
        from data_prep.images import read_images
        from trainer.inference import check_output, predict_images, read_finished_run
        from trainer.runtime.cluster import connect

        manifest = read_finished_run(run)[0].read_manifest()
        options = ImageOptions.of(manifest)
        # Before a cluster is started: a missing file is reported at once.
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
    """Print the number of images, how many could not be decoded, and how many were predicted correctly.

    Images of the run's own dataset are counted apart: what the network was trained on says nothing about new images.
    """
    from trainer.record.evaluation_result import describe_accuracy

    reasons = ", ".join(f"{reason}: {count}" for reason, count in summary.rejected.items())
    num_bad = sum(summary.rejected.values())
    bad = f", {num_bad} not decoded ({reasons})" if reasons else ""
    predicted = f"{summary.images - num_bad} of {format_count(summary.images, 'image')} predicted"
    console.stdout.print(f"{output}: {predicted}{bad}", markup=False)
    for name, part in summary.parts.items():
        accuracy = f", {describe_accuracy(part.correct, part.labelled)}" if part.labelled else ""
        console.stdout.print(f"{name:5}  {format_count(part.images, 'image')}{accuracy}", markup=False)
        if remark := _PARTS[name]:
            console.stdout.print(f"       {remark}", markup=False)
    if summary.parts_unknown:
        if summary.labelled:
            console.stdout.print(describe_accuracy(summary.correct, summary.labelled))
        reason = f"whether the network was trained on some of these images is not known: {summary.parts_unknown}"
        console.stdout.print(reason, markup=False)


def check_summary(source: str, output: str, summary: "PredictionSummary") -> None:
    """Raise InputError if no image was predicted: then the source is probably not the intended one."""
    if sum(summary.rejected.values()) == summary.images:
        raise InputError(f"none of the files of {source} is an image that can be read; {output} has the reasons")


if __name__ == "__main__":
    app()
