"""Prepares a folder or prefix of images for training."""

from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from data_prep.manifest import DUPLICATES_NAME, SPLITS, Manifest
from data_prep.sources import SourceFormat
from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.markdown import format_count

# Plain lines for wrong options and for tracebacks: a job log has no use for boxes.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix with one folder of images per class.")],
    dataset: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write the prepared dataset to.")],
    image_size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 250,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 for gray, 3 for RGB.")] = 1,
    resize: Annotated[Literal["fit", "crop", "pad"], typer.Option(help="Into the square.")] = "fit",
    background: Annotated[int, typer.Option(min=0, max=255, help="Behind transparency, and bars of pad.")] = 255,
    value_range: Annotated[
        str | None,
        typer.Option(help="LOW:HIGH, what becomes 0 and 255 of images with more than 8 bits. Default: found."),
    ] = None,
    source_format: Annotated[SourceFormat | None, typer.Option("--format", help="Default: detected.")] = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of each class, if SOURCE has no val.")] = 0.15,
    test_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of each class, if SOURCE has no splits.")] = 0.15,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="More rejected files than this fail.")] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DATASET holds.")] = False,
    wait: Wait = 0,
) -> None:
    """Decode, resize, split and shard the images of SOURCE into DATASET."""
    with console.exit_codes():
        from data_prep.prepare import check_places, parse_config, prepare
        from trainer.runtime.cluster import connect

        config = parse_config(
            image_size=image_size,
            channels=channels,
            resize=resize,
            background=background,
            value_range=value_range,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
        )
        manifest = check_places(source, dataset, config, overwrite=overwrite)
        if manifest is None:
            with connect(wait_seconds=wait), console.show_events() as on_event:
                manifest = prepare(
                    source, dataset, config, source_format=source_format, overwrite=overwrite, on_event=on_event
                )
        print_manifest(dataset, manifest)


def print_manifest(dataset: str, manifest: Manifest) -> None:
    """Print how many images of each class each split of a prepared dataset has."""
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
    if told := describe_value_range(manifest):
        console.stdout.print(told)
    if warning := describe_few_levels(manifest):
        console.stderr.print(warning)
    if manifest.duplicate_images:
        console.stdout.print(f"images with a duplicate: {manifest.duplicate_images}, see {DUPLICATES_NAME}")
    if manifest.leaked_images:
        leaked = manifest.leaked_images
        console.stderr.print(f"warning: images with a duplicate in another split of SOURCE: {leaked}")


if __name__ == "__main__":
    app()
