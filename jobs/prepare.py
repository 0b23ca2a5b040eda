"""Prepare a dataset for training from a folder or prefix of images."""

import shlex
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from data_prep.manifest import DUPLICATES_NAME, SPLITS, Manifest
from data_prep.sources import SourceFormat
from trainer.architectures import ARCHITECTURES
from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.commands import JobCommand
from trainer.runtime.markdown import format_count

# To train first: quick ones, the last of which takes images of any size.
_PROPOSED = ("cnn_tapered", "cnn_softmax", "inception_notes")

# Plain text for wrong options and tracebacks: boxes are hard to read in a job log.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or s3:// prefix with a folder of images per class, a table (CSV, JSON lines or Parquet), "
            "Parquet, Arrow or TFRecord files with images, or tars (WebDataset)."
        ),
    ],
    dataset: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write the prepared dataset to.")],
    image_size: Annotated[int, typer.Option(min=1, help="Height and width of the prepared images in pixels.")] = 250,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 for gray, 3 for RGB.")] = 1,
    resize: Annotated[
        Literal["fit", "crop", "pad"], typer.Option(help="How an image becomes a square: stretched, cropped or padded.")
    ] = "fit",
    background: Annotated[
        int,
        typer.Option(
            min=0, max=255, help="Gray value behind transparent pixels and around padded images, 255 is white."
        ),
    ] = 255,
    value_range: Annotated[
        str | None,
        typer.Option(
            help="LOW:HIGH, the values that become 0 and 255 in images with more than 8 bits. Default: from the images."
        ),
    ] = None,
    source_format: Annotated[
        SourceFormat | None, typer.Option("--format", help="Format of SOURCE. Default: detected.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of each class for val, if SOURCE has no val split.")
    ] = 0.15,
    test_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of each class for test, if SOURCE has no splits.")
    ] = 0.15,
    seed: Annotated[int, typer.Option(help="Random seed of the splits.")] = 0,
    duplicates: Annotated[
        Literal["near", "exact"],
        typer.Option(
            help="Images that are kept in one split: those that are nearly identical, or identical ones only."
        ),
    ] = "near",
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if a larger fraction of the files is rejected.")
    ] = 0.01,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what SOURCE holds and what would be left out, and exit.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset in DATASET.")] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Add new images of SOURCE to DATASET; the others keep their splits.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log Ray Data's statistics: times, memory and rows of the tasks.")
    ] = False,
    wait: Wait = 0,
) -> None:
    """Decode, resize and split the images of SOURCE, and write them to DATASET.

    With another --seed, fraction or --duplicates, the splits of DATASET are drawn anew and nothing is decoded.
    """
    with console.exit_codes():
        options: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "resize": resize,
            "background": background,
            "value_range": value_range,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "seed": seed,
            "duplicates": duplicates,
            "max_bad_fraction": max_bad_fraction,
        }
        if dry_run:
            from data_prep.prepare import check_modes, parse_config
            from data_prep.preview import preview_source
            from data_prep.sources import find_images

            config = parse_config(**options)
            check_modes(overwrite=overwrite, append=append)
            for line in preview_source(find_images(source, source_format), config):
                console.print_words(line)
            return
        from trainer.interface import prepare

        manifest = prepare(
            source,
            dataset,
            source_format=source_format,
            overwrite=overwrite,
            append=append,
            wait=wait,
            verbose=verbose,
            **options,
        )
        print_manifest(dataset, manifest)
        print_next(dataset, manifest)


def print_manifest(dataset: str, manifest: Manifest) -> None:
    """Print the number of images by class and split, the files that were not used, and warnings."""
    from data_prep.card import describe_few_levels, describe_value_range, list_classes

    *of_classes, of_all = list_classes(manifest)
    table = Table("class", *SPLITS, "total")
    for name, *counts in of_classes:
        table.add_row(Text(name), *counts)
    table.add_section()
    table.add_row(*of_all)
    console.stdout.print(table)
    size, rejected = manifest.image_size, manifest.rejected
    reasons = f" ({', '.join(f'{reason}: {count}' for reason, count in rejected.items())})" if rejected else ""
    images, files = format_count(int(of_all[-1]), "image"), format_count(sum(rejected.values()), "file")
    summary = f"{images} {size}x{size}x{manifest.channels}, {files} not used{reasons}"
    console.stdout.print(f"{dataset}: {summary}", markup=False)
    if line := describe_value_range(manifest):
        console.stdout.print(line)
    if warning := describe_few_levels(manifest):
        console.stderr.print(warning)
    if manifest.duplicate_images:
        console.stdout.print(f"images with a duplicate: {manifest.duplicate_images}, see {DUPLICATES_NAME}")
    if manifest.leaked_images:
        leaked = manifest.leaked_images
        console.stderr.print(f"warning: images with a duplicate in another split of SOURCE: {leaked}")


def print_next(dataset: str, manifest: Manifest) -> None:
    """Print a command that trains on the dataset."""
    fitting = (name for name in _PROPOSED if ARCHITECTURES[name].min_image_size <= manifest.image_size)
    command = shlex.join(["python", "jobs/train.py", "--arch", next(fitting), "--dataset", dataset])
    console.stdout.print(f"next: {command}", markup=False)


if __name__ == "__main__":
    app()
