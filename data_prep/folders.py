"""Finds images in folders, one a class, or one a split with one a class below."""

import shlex
from pathlib import Path, PurePosixPath

from data_prep.listing import FoundImage, Listing
from data_prep.manifest import SplitName
from data_prep.names import is_plainly_other, name_some, split_alluded_to, split_called, to_class_name
from trainer import storage
from trainer.errors import InputError


def find_in_folders(source: str, sizes: dict[str, int], listing: Listing, labelled: bool) -> None:
    """Add the images of a folder to what was found.

    Args:
        source: path or URI of the folder.
        sizes: the size in bytes of each file by its path relative to it.
        listing: to add to.
        labelled: whether an image must lie in the folder of a class.

    Raises:
        InputError: folders look like splits, but not all or not quite.
    """
    paths = [PurePosixPath(path) for path in sizes]
    in_folders = [path for path in paths if len(path.parts) > 1 and not is_plainly_other(str(path))]
    is_split = _has_split_folders(source, in_folders, labelled)
    for path in paths:
        split = split_called(path.parts[0]) if is_split else None
        folders = path.parts[1:-1] if is_split else path.parts[:-1]
        class_name = to_class_name(folders[0]) if folders else None
        if labelled and not folders:
            listing.ignore(str(path), "not_in_a_class_folder")
        elif is_plainly_other(str(path)):
            # Beside the folders of the splits there may be one of documents.
            listing.ignore(str(path), "not_an_image_name", class_name if split or not is_split else None)
        else:
            listing.found.append(FoundImage(str(path), class_name, split, bytes=sizes[str(path)]))


def _has_split_folders(source: str, images: list[PurePosixPath], labelled: bool) -> bool:
    """Return whether the folders at the top are splits: only if all of them are, since a class may be called "test".

    Raises:
        InputError: classes are asked for, and the folders look like splits, but not all or not quite.
    """
    top_folders = sorted({path.parts[0] for path in images})
    called = {name: split for name in top_folders if (split := split_called(name))}
    if top_folders and len(called) == len(top_folders):
        return "train" in called.values()
    alike = {name: split for name in top_folders if (split := split_alluded_to(name))}
    if not labelled or "train" not in alike.values() or len(set(alike.values())) < 2:
        return False
    others = [name for name in top_folders if name not in alike]
    if others and all(len(path.parts) == 2 for path in images if path.parts[0] in alike):
        return False
    message = f"{source}: the folders {', '.join(alike)} look like splits"
    if others:
        message += f", and beside them is {name_some(others)}"
    if len(called) == len(alike):
        raise InputError(f"{message}; move or rename the ones or the others")
    raise InputError(f"{message}; {_propose_names(source, images, alike)}")


def _propose_names(source: str, images: list[PurePosixPath], alike: dict[str, SplitName]) -> str:
    """Return how to make splits that are read of folders that only look like them."""
    links = []
    for name, split in alike.items():
        # Archives often hold a folder of their own name.
        folder = PurePosixPath(name, name) if any(path.parts[:2] == (name, name) for path in images) else name
        links.append(f"ln -s {shlex.quote(str(Path(storage.resolve_uri(source), folder)))} NEW/{split}")
    if not storage.is_local(storage.resolve_uri(source)) or len(set(alike.values())) < len(alike):
        return "call them train, val and test, as in SOURCE/train/CLASS/image.jpg, or give a table with a column split"
    return f"give a folder that calls them train, val and test: mkdir NEW && {' && '.join(links)}"
