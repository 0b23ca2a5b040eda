"""Finds images in folders, one a class, or one a split with one a class below."""

import shlex

from data_prep.listing import FoundImage, Listing
from data_prep.manifest import SplitName
from data_prep.names import is_plainly_other, name_some, parts_of, split_alluded_to, split_called, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError


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
    others = {path for path in sizes if is_plainly_other(path)}
    is_split = _has_split_folders(source, [parts_of(path) for path in sizes if path not in others], labelled)
    for path, size in sizes.items():
        parts = parts_of(path)
        split = split_called(parts[0]) if is_split else None
        folders = parts[1:-1] if is_split else parts[:-1]
        class_name = to_class_name(folders[0]) if folders else None
        if labelled and not folders:
            listing.ignore(path, "not_in_a_class_folder")
        elif path in others:
            # Beside the folders of the splits there may be one of documents.
            listing.ignore(path, "not_an_image_name", class_name if split or not is_split else None)
        else:
            listing.found.append(FoundImage(path, class_name, split, bytes=size))


def _has_split_folders(source: str, images: list[list[str]], labelled: bool) -> bool:
    """Return whether the folders at the top are splits: only if all of them are, since a class may be called "test".

    Args:
        source: path or URI of the folder, for messages.
        images: the folders and the name of each.
        labelled: whether classes are asked for.

    Raises:
        InputError: classes are asked for, and the folders look like splits, but not all or not quite.
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
        message += f", and beside them is {name_some(others)}"
    if len(called) == len(alike):
        raise InputError(f"{message}; move or rename the ones or the others")
    raise InputError(f"{message}; {_propose_names(source, images, alike)}")


def _propose_names(source: str, images: list[list[str]], alike: dict[str, SplitName]) -> str:
    """Return how to make splits that are read of folders that only look like them."""
    links = []
    for name, split in alike.items():
        # Archives often hold a folder of their own name.
        folders = [name, name] if any(parts[:2] == [name, name] for parts in images) else [name]
        links.append(f"ln -s {shlex.quote(storage.join(storage.resolve_uri(source), *folders))} NEW/{split}")
    if not storage.is_local(storage.resolve_uri(source)) or len(set(alike.values())) < len(alike):
        return "call them train, val and test, as in SOURCE/train/CLASS/image.jpg, or give a table with a column split"
    return f"give a folder that calls them train, val and test: mkdir NEW && {' && '.join(links)}"
