"""Find images in folders: one folder per class, or one per split with one per class in it."""

import dataclasses
import itertools
import os
import shlex
from collections.abc import Callable, Iterable

from data_prep.listing import FoundImage, Listing
from data_prep.manifest import SplitName
from data_prep.names import is_plainly_other, name_some, parts_of, split_alluded_to, split_called, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def find_in_folders(
    source: str,
    files: Callable[[], Iterable[FoundImage]],
    listing: Listing,
    labelled: bool,
    *,
    in_archives: bool = False,
) -> None:
    """Add the images in a folder, or in tars that were made of one, to a listing.

    Args:
        source: path or URI of the folder.
        files: returns all files, whose class and split are filled in; called twice, so that they need not be kept.
        listing: what to add to.
        labelled: whether each image must be in the folder of a class.
        in_archives: whether the files are members of tars, which may have folders around everything else.

    Raises:
        InputError: some folders look like splits, but not all of them do, or their names differ from those of splits.
    """
    above_images = {_folders_of(file) for file in files() if not is_plainly_other(file.path)}
    outer = _count_around(above_images) if in_archives else 0
    is_split = _has_split_folders(source, {folders[outer:] for folders in above_images}, labelled)
    for file in files():
        folders = _folders_of(file)[outer:]
        split = split_called(folders[0]) if folders and is_split else None
        of_class = folders[1:] if is_split else folders
        class_name = to_class_name(of_class[0]) if of_class else None
        if labelled and not of_class:
            listing.ignore(file.path, "not_in_a_class_folder")
        elif is_plainly_other(file.path):
            # Beside the folders of the splits there may be one with documents.
            listing.ignore(file.path, "not_an_image_name", class_name if split or not is_split else None)
        else:
            listing.add(dataclasses.replace(file, class_name=class_name, split=split or file.split))


def _folders_of(file: FoundImage) -> tuple[str, ...]:
    """Return the names of the folders above a file."""
    return tuple(parts_of(file.name_in_container)[:-1])


def _count_around(above_images: set[tuple[str, ...]]) -> int:
    """Return how many folders an archive has around everything else; they can be neither classes nor splits."""
    columns = zip(*above_images, strict=False)
    around = itertools.takewhile(lambda names: len(set(names)) == 1 and not split_called(names[0]), columns)
    outer = len(list(around))
    return outer if all(len(folders) > outer for folders in above_images) else 0


def _has_split_folders(source: str, above_images: set[tuple[str, ...]], labelled: bool) -> bool:
    """Return whether the top folders are splits: only if all of them are, since a class may be called "test".

    Args:
        source: path or URI of the folder, for messages.
        above_images: the folders above each image.
        labelled: whether each image must have a class.

    Raises:
        InputError: each image must have a class, and some folders look like splits, but not all of them do, or their
            names differ from those of splits.
    """
    top_folders = sorted({folders[0] for folders in above_images if folders})
    called = {name: split for name in top_folders if (split := split_called(name))}
    if top_folders and len(called) == len(top_folders):
        return "train" in called.values()
    alike = {name: split for name in top_folders if (split := split_alluded_to(name))}
    if not labelled or "train" not in alike.values() or len(set(alike.values())) < 2:
        return False
    others = [name for name in top_folders if name not in alike]
    if others and all(len(folders) == 1 for folders in above_images if folders and folders[0] in alike):
        return False
    message = f"{source}: the folders {', '.join(alike)} look like splits"
    if others:
        message += f", and next to them is {name_some(others)}"
    if len(called) == len(alike):
        raise InputError(f"{message}; move or rename either")
    raise InputError(f"{message}; {_propose_names(source, above_images, alike)}")


def _propose_names(source: str, above_images: set[tuple[str, ...]], alike: dict[str, SplitName]) -> str:
    """Return advice on how to turn folders that look like splits into splits."""
    links = []
    for name, split in alike.items():
        # Archives often contain a folder with their own name.
        folders = [name, name] if any(one[:2] == (name, name) for one in above_images) else [name]
        links.append(f"ln -s {shlex.quote(storage.join(storage.resolve_uri(source), *folders))} NEW/{split}")
    if not os.path.isdir(storage.resolve_uri(source)) or len(set(alike.values())) < len(alike):
        return "rename them to train, val and test (SOURCE/train/CLASS/image.jpg), or give a table with a column split"
    return f"give a folder in which they are named train, val and test: mkdir NEW && {' && '.join(links)}"
