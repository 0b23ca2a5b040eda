"""Find images in folders: one folder per class, or one per split with one per class in it."""

import itertools
import os
import shlex

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import filter_rows, map_endings, number_values
from data_prep.listing import Listing
from data_prep.manifest import SplitName
from data_prep.names import is_plainly_other, name_some, parts_of, split_alluded_to, split_called, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError

Folders = tuple[str, ...]
"""The names of the folders above a file."""


def find_in_folders(
    source: str, files: pa.Table, listing: Listing, labelled: bool, *, in_archives: bool = False
) -> None:
    """Add the images in a folder, or in tars that were made of one, to a listing.

    Args:
        source: path or URI of the folder.
        files: all files: FILES_SCHEMA; those of archives have name, which is their path in the archive, and split, too.
        listing: what to add to.
        labelled: whether each image must be in the folder of a class.
        in_archives: whether the files are members of tars, which may have folders around everything else.

    Raises:
        InputError: some folders look like splits, but not all of them do, or their names differ from those of splits.
    """
    names = files["name"] if in_archives else files["path"]
    above, folder_of = number_folders(names)
    is_other = map_endings(is_plainly_other, names, pa.bool_())
    above_images = {above[number] for number in folder_of.filter(pc.invert(is_other)).unique().to_pylist()}
    outer = _count_around(above_images) if in_archives else 0
    is_split = _has_split_folders(source, {folders[outer:] for folders in above_images}, labelled)
    meanings = [_interpret(folders[outer:], is_split) for folders in above]
    splits = pa.array([split for split, _ in meanings], pa.string()).take(folder_of)
    class_names = pa.array([name for _, name in meanings], pa.string()).take(folder_of)
    columns = {name: files[name] for name in files.column_names}
    columns |= {"class_name": class_names, "split": pc.coalesce(splits, files["split"]) if in_archives else splits}
    files = pa.table({**columns, "is_other": is_other})
    if labelled:
        listing.ignore(files["path"].filter(class_names.is_null()), "not_in_a_class_folder")
        files = filter_rows(files, class_names.is_valid())
    others = files.filter(files["is_other"])
    listing.ignore(others["path"], "not_an_image_name", others["class_name"])
    listing.add(filter_rows(files, pc.invert(files["is_other"])))


def number_folders(names: pa.ChunkedArray) -> tuple[list[Folders], pa.ChunkedArray]:
    """Return the distinct folders above files, and the number of that of each file."""
    folders, folder_of = number_values(pc.replace_substring_regex(names, r"[^/]*$", ""))
    return [tuple(parts_of(folder)) for folder in folders], folder_of


def _interpret(folders: Folders, is_split: bool) -> tuple[SplitName | None, str | None]:
    """Return the split and the class of the files in a folder."""
    split = split_called(folders[0]) if folders and is_split else None
    # Beside the folders of the splits there may be one with documents.
    of_class = folders[1:] if split else folders[:0] if is_split else folders
    return split, to_class_name(of_class[0]) if of_class else None


def _count_around(above_images: set[Folders]) -> int:
    """Return how many folders an archive has around everything else; they can be neither classes nor splits."""
    columns = zip(*above_images, strict=False)
    around = itertools.takewhile(lambda names: len(set(names)) == 1 and not split_called(names[0]), columns)
    outer = len(list(around))
    return outer if all(len(folders) > outer for folders in above_images) else 0


def _has_split_folders(source: str, above_images: set[Folders], labelled: bool) -> bool:
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


def _propose_names(source: str, above_images: set[Folders], alike: dict[str, SplitName]) -> str:
    """Return advice on how to turn folders that look like splits into splits."""
    links = []
    for name, split in alike.items():
        # Archives often contain a folder with their own name.
        folders = [name, name] if any(one[:2] == (name, name) for one in above_images) else [name]
        links.append(f"ln -s {shlex.quote(storage.join(storage.resolve_uri(source), *folders))} NEW/{split}")
    if not os.path.isdir(storage.resolve_uri(source)) or len(set(alike.values())) < len(alike):
        return "rename them to train, val and test (SOURCE/train/CLASS/image.jpg), or give a table with a column split"
    return f"give a folder in which they are named train, val and test: mkdir NEW && {' && '.join(links)}"
