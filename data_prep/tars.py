"""Find images in WebDataset tars, where an image and its label have the same key."""

import json
import tarfile
from collections import defaultdict
from typing import Any

from data_prep.listing import FoundImage, Listing
from data_prep.names import image_suffixes, is_plainly_other, left_behind_as, split_of_file, suffix_of, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def find_in_tar(root: str, path: str, listing: Listing, labelled: bool) -> None:
    """Add the images among the members of a tar to a listing.

    Args:
        root: path or URI of the source.
        path: path of the file in the source; a file of another kind is ignored.
        listing: what to add to.
        labelled: whether every image must have a label.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: labels are missing or cannot be read.
    """
    if suffix_of(path) != ".tar":
        listing.ignore(path, "not_a_tar")
        return
    members: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
    labels: dict[str, str] = {}
    with storage.open_file(storage.join(root, path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if kind := left_behind_as(member.name):
                listing.left_behind[kind] += 1
                continue
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            key, extension = f"{folder}/{key}", extension.lower()
            if extension in ("cls", "json"):
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                label = _parse_label(f"{path}#{member.name}", content, is_json=extension == "json")
                if class_name := to_class_name(label):
                    labels[key] = class_name
            members[key].append(member)
    for key, of_key in members.items():
        _find_in_sample(path, of_key, labels.get(key), listing, labelled)


def _find_in_sample(
    path: str, members: list[tarfile.TarInfo], class_name: str | None, listing: Listing, labelled: bool
) -> None:
    """Add the image among the members of one key: the first with an image suffix, else the first that may be one."""
    possible = [one for one in members if not is_plainly_other(one.name) and _extension(one) != "cls"]
    # Extensions with two parts, such as KEY.seg.png, are for other data, not for the image itself.
    possible = [one for one in possible if "." not in _extension(one)]
    named = [one for one in possible if f".{_extension(one)}" in image_suffixes()]
    image = next(iter(named or possible), None)
    for member in members:
        name = f"{path}#{member.name}"
        if member is image and not (labelled and class_name is None):
            listing.found.append(
                FoundImage(name, class_name, split_of_file(path), path, member.offset_data, member.size)
            )
        elif member is image:
            listing.ignore(name, "no_label")
        elif member in named:
            listing.ignore(name, "second_image_of_its_key")
        elif _extension(member) not in ("cls", "json"):
            listing.ignore(name, "not_an_image_name")
    if image is None and class_name is not None:
        listing.ignored_of_class[class_name] += [member.name for member in members]


def _extension(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _parse_label(name: str, content: bytes, is_json: bool) -> Any:
    try:
        text = content.decode()
        fields = json.loads(text) if is_json else {"label": text.strip()}
    except ValueError as error:
        raise InputError(f"{name} cannot be read as a label: {error}; fix it or remove it") from error
    if not isinstance(fields, dict):
        raise InputError(f"{name} cannot be read as a label: it must be a JSON object; fix it or remove it")
    return fields.get("label")
