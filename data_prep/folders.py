"""Find images in folders: one folder per class, or one per split with one per class in it."""

import dataclasses
import itertools
import os
import shlex

from data_prep.listing import FoundImage, Listing
from data_prep.manifest import SplitName
from data_prep.names import is_plainly_other, name_some, parts_of, split_alluded_to, split_called, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def find_in_folders(source: str, files: list[FoundImage], listing: Listing, labelled: bool) -> None:
    """Add the images in a folder, or in tars that were made of one, to a listing.

    Args:
        source: path or URI of the folder.
        files: all files, whose class and split are filled in.
        listing: what to add to.
        labelled: whether each image must be in the folder of a class.

    Raises:
        InputError: some folders look like splits, but not all of them do, or their names differ from those of splits.
    """
    others = {file.path for file in files if is_plainly_other(file.path)}
    parts_in_source = {file.path: parts_of(file.name_in_container) for file in files}
    images = [parts for path, parts in parts_in_source.items() if path not in others]
    outer = _folders_around(images) if files and files[0].container else 0
    is_split = _has_split_folders(source, [parts[outer:] for parts in images], labelled)
    for file in files:
        parts = parts_in_source[file.path][outer:]
        split = split_called(parts[0]) if parts and is_split else None
        folders = parts[1:-1] if is_split else parts[:-1]
        class_name = to_class_name(folders[0]) if folders else None
        if labelled and not folders:
            listing.ignore(file.path, "not_in_a_class_folder")
        elif file.path in others:
            # Beside the folders of the splits there may be one with documents.
            listing.ignore(file.path, "not_an_image_name", class_name if split or not is_split else None)
        else:
            listing.found.append(dataclasses.replace(file, class_name=class_name, split=split or file.split))


def _folders_around(images: list[list[str]]) -> int:
    """Return how many folders an archive has around everything else; they can be neither classes nor splits."""
    columns = zip(*(parts[:-1] for parts in images), strict=False)
    around = itertools.takewhile(lambda names: len(set(names)) == 1 and not split_called(names[0]), columns)
    outer = len(list(around))
    return outer if all(len(parts) > outer + 1 for parts in images) else 0


def _has_split_folders(source: str, images: list[list[str]], labelled: bool) -> bool:
    """Return whether the top folders are splits: only if all of them are, since a class may be called "test".

    Args:
        source: path or URI of the folder, for messages.
        images: for each image, the folders above it and its name.
        labelled: whether each image must have a class.

    Raises:
        InputError: each image must have a class, and some folders look like splits, but not all of them do, or their
            names differ from those of splits.
    """
    top_folders = sorted({parts[0] for parts in images if len(parts) > 1})
    called = {name: split for name in top_folders if (split := split_called(name))}
    if top_folders and len(called) == len(top_folders):
        return "train" in called.values()
    alike = {name: split for name in top_folders if (split := split_alluded_to(name))}
    if not labelled or "train" not in alike.values() or len(set(alike.values())) < 2:
        return False
    others = [name for name in top_folders if name not in alike]
    if others and all(len(parts) == 2 for parts in images if parts[0] in alike):
        return False
    message = f"{source}: the folders {', '.join(alike)} look like splits"
    if others:
        message += f", and next to them is {name_some(others)}"
    if len(called) == len(alike):
        raise InputError(f"{message}; move or rename either")
    raise InputError(f"{message}; {_propose_names(source, images, alike)}")


def _propose_names(source: str, images: list[list[str]], alike: dict[str, SplitName]) -> str:
    """Return advice on how to turn folders that look like splits into splits."""
    links = []
    for name, split in alike.items():
        # Archives often contain a folder with their own name.
        folders = [name, name] if any(parts[:2] == [name, name] for parts in images) else [name]
        links.append(f"ln -s {shlex.quote(storage.join(storage.resolve_uri(source), *folders))} NEW/{split}")
    if not os.path.isdir(storage.resolve_uri(source)) or len(set(alike.values())) < len(alike):
        return "rename them to train, val and test (SOURCE/train/CLASS/image.jpg), or give a table with a column split"
    return f"give a folder in which they are named train, val and test: mkdir NEW && {' && '.join(links)}"
