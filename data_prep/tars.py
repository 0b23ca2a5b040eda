"""Find images in tars: WebDataset's, in which an image and its label have the same key, and tars of class folders."""

import json
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.folders import find_in_folders
from data_prep.listing import FoundImage, Listing
from data_prep.names import image_suffixes, is_plainly_other, left_behind_as, split_of_file, suffix_of, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError


@dataclass
class _Tar:
    """The members of a tar that are files."""

    path: str
    """Path of the tar in the source."""
    members: dict[str, FoundImage] = field(default_factory=dict)
    """All of them by name, without a class. Of two with the same name the later one counts, as when unpacking."""
    labels: dict[str, str] = field(default_factory=dict)
    """Class name in each member that has one, by the member's name."""


def find_in_tars(source: str, root: str, paths: Iterable[str], listing: Listing, labelled: bool) -> None:
    """Add the images among the members of tars to a listing.

    Without a label in any of the tars, they are what becomes of class folders in ``tar cf SOURCE.tar FOLDER``.

    Args:
        source: the source as it was given, for messages.
        root: path or URI that the paths are relative to.
        paths: paths of the files of the source; files of other kinds are ignored.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        FileNotFoundError: a file does not exist.
        InputError: labels cannot be read, or some folders look like splits, but not all of them do.
    """
    tars = []
    for path in paths:
        if suffix_of(path) == ".tar":
            tars.append(_read_members(root, path, listing))
        else:
            listing.ignore(path, "not_a_tar")
    if any(tar.labels for tar in tars):
        for tar in tars:
            for sample in _group_by_key(tar.members):
                _find_in_sample(tar, sample, listing, labelled)
    else:
        members = [member for tar in tars for member in tar.members.values()]
        find_in_folders(source, lambda: members, listing, labelled, in_archives=True)


def _read_members(root: str, path: str, listing: Listing) -> _Tar:
    found, split = _Tar(path), split_of_file(path)
    with storage.open_file(storage.join(root, path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # `tar cf SOURCE.tar .` writes ./NAME.
            name = posixpath.normpath(member.name)
            if not member.isfile():
                continue
            if kind := left_behind_as(name):
                listing.left_behind[kind] += 1
                continue
            found.members[name] = FoundImage(f"{path}#{name}", None, split, path, member.offset_data, member.size)
            if suffix_of(name) in (".cls", ".json"):
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if class_name := to_class_name(_parse_label(path, name, content)):
                    found.labels[name] = class_name
    return found


def _group_by_key(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the members of each sample: their extensions, without the first dot and in lower case, by name.

    A key ends at the first dot, and extensions with a dot, such as KEY.seg.png, are for other data than the image. If
    a key has these alone, its names have dots: in cat.0.jpg and cat.0.cls the key is cat.0.
    """
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        folder, _, last = name.rpartition("/")
        key, _, extension = last.partition(".")
        samples[f"{folder}/{key}"][name] = extension.lower()
    for extensions in samples.values():
        if not all("." in extension for extension in extensions.values()):
            yield extensions
            continue
        dotted: dict[str, dict[str, str]] = defaultdict(dict)
        for name in extensions:
            key, suffix = posixpath.splitext(name)
            dotted[key][name] = suffix[1:].lower()
        yield from dotted.values()


def _find_in_sample(tar: _Tar, extensions: dict[str, str], listing: Listing, labelled: bool) -> None:
    """Add the image among the members of one key: the first with an image suffix, else the first that may be one."""
    label_members = (name for name in extensions if name in tar.labels and "." not in extensions[name])
    class_name = next((tar.labels[name] for name in label_members), None)
    possible = [
        name
        for name, extension in extensions.items()
        if not is_plainly_other(name) and extension != "cls" and "." not in extension
    ]
    named = [name for name in possible if f".{extensions[name]}" in image_suffixes()]
    image = next(iter(named or possible), None)
    for name, extension in extensions.items():
        member = tar.members[name]
        if name == image and not (labelled and class_name is None):
            member.class_name = class_name
            listing.add(member)
        elif name == image:
            listing.ignore(member.path, "no_label")
        elif name in named:
            listing.ignore(member.path, "second_image_of_its_key")
        elif extension not in ("cls", "json"):
            listing.ignore(member.path, "not_an_image_name")
    if image is None and class_name is not None:
        listing.ignored_of_class[class_name] += extensions


def _parse_label(path: str, name: str, content: bytes) -> Any:
    is_json = suffix_of(name) == ".json"
    try:
        text = content.decode()
        fields = json.loads(text) if is_json else {"label": text.strip()}
        if not isinstance(fields, dict):
            raise ValueError("it must be a JSON object")
    except ValueError as error:
        if posixpath.basename(name).count(".") > 1:
            return None  # other data, such as the polygons in KEY.seg.json
        raise InputError(f"{path}#{name} cannot be read as a label: {error}; fix it or remove it") from error
    return fields.get("label")
