"""Prepares a folder or prefix of images for training."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from data_prep.manifest import SPLITS, Manifest
from trainer import console


def main(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix with one folder of images per class.")],
    dataset: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write the prepared dataset to.")],
    image_size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 250,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 for gray, 3 for RGB.")] = 1,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of each class, if SOURCE has no val.")] = 0.15,
    test_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of each class, if SOURCE has no splits.")] = 0.15,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="More rejected files than this fail.")] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DATASET holds.")] = False,
) -> None:
    """Decode, resize, split and shard the images of SOURCE into DATASET."""
    with console.exit_codes():
        from data_prep.prepare import parse_config, prepare
        from trainer.cluster import connect

        config = parse_config(
            image_size=image_size,
            channels=channels,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
        )
        with connect(), console.show_events() as on_event:
            manifest = prepare(source, dataset, config, overwrite=overwrite, on_event=on_event)
        print_manifest(dataset, manifest)


def print_manifest(dataset: str, manifest: Manifest) -> None:
    """Print how many images of each class each split of a prepared dataset has."""
    table = Table("class", *SPLITS, "total")
    counts = [manifest.splits[split].rows_per_class for split in SPLITS]
    for name, *row in zip(manifest.class_names, *counts, strict=True):
        table.add_row(Text(name), *map(str, row), str(sum(row)))
    totals = [sum(column) for column in counts]
    table.add_section()
    table.add_row("all", *map(str, totals), str(sum(totals)))
    console.stdout.print(table)
    size, rejected = manifest.image_size, manifest.rejected_rows
    summary = f"{dataset}: {sum(totals)} images {size}x{size}x{manifest.channels}, {rejected} rejected"
    console.stdout.print(summary, markup=False)


if __name__ == "__main__":
    typer.run(main)
