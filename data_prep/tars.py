"""Find images in tars: WebDataset's, in which an image and its label have the same key, and tars of class folders."""

import itertools
import json
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import Rows, iterate_rows
from data_prep.folders import find_in_folders
from data_prep.listing import FILES_SCHEMA, FOUND_SCHEMA, IGNORED_SCHEMA, Listing, in_text
from data_prep.names import image_suffixes, is_plainly_other, left_behind_as, split_of_file, suffix_of, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError

_MEMBER_SCHEMA = pa.schema(
    [
        *FILES_SCHEMA,
        ("name", pa.string()),  # in the tar
        *(FOUND_SCHEMA.field(name) for name in ("split", "container", "offset")),
        ("label", pa.string()),  # the class that a file with a label says, else null
    ]
)
Member = dict[str, Any]


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
    tars = [_MEMBER_SCHEMA.empty_table()]
    for path in paths:
        if suffix_of(path) == ".tar":
            tars.append(_read_members(root, path, listing))
        else:
            listing.ignore_one(path, "not_a_tar")
    members = pa.concat_tables(tars)
    if members["label"].null_count == len(members):
        find_in_folders(source, members.drop_columns("label"), listing, labelled, in_archives=True)
    else:
        _find_in_samples(members, listing, labelled)


def _read_members(root: str, path: str, listing: Listing) -> pa.Table:
    """Return the files in a tar. Of two with the same name the later one counts, as when unpacking."""
    members, split = Rows(_MEMBER_SCHEMA), split_of_file(path)
    with storage.open_file(storage.join(root, path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # It keeps all of them, at more than a kilobyte each.
            tar.members.clear()  # type: ignore[attr-defined]
            # `tar cf SOURCE.tar .` writes ./NAME.
            name = posixpath.normpath(member.name)
            if not member.isfile():
                continue
            if kind := left_behind_as(name):
                listing.left_behind[kind] += 1
                continue
            label = None
            if suffix_of(name) in (".cls", ".json"):
                label = to_class_name(_parse_label(path, name, tar.extractfile(member).read()))  # type: ignore[union-attr]
            text = in_text(name)
            place = (split, path, member.offset_data)
            members.append(f"{path}#{text}", text == name, member.size, text, *place, label)
    table = members.to_table()
    numbered = table.select(["name"]).append_column("number", pa.array(np.arange(len(table))))
    last = numbered.group_by("name").aggregate([("number", "max")])["number_max"].combine_chunks()
    return table.take(last.sort()) if len(last) < len(table) else table


def _find_in_samples(members: pa.Table, listing: Listing, labelled: bool) -> None:
    """Add the images of tars in which each image has its label beside it."""
    images, ignored = Rows(FOUND_SCHEMA), Rows(IGNORED_SCHEMA)
    for sample in _group_by_key(members):
        _find_in_sample(sample, images, ignored, labelled)
    listing.add(images.to_table())
    listing.add_ignored(ignored.to_table())


def _group_by_key(members: pa.Table) -> Iterator[list[tuple[Member, str]]]:
    """Yield the members of each sample, with their extensions without the first dot and in lower case.

    A key ends at the first dot, and extensions with a dot, such as KEY.seg.png, are for other data than the image. If
    a key has these alone, its names have dots: in cat.0.jpg and cat.0.cls the key is cat.0.
    """
    keys = pc.replace_substring_regex(members["name"], r"((?:^|/)[^/.]*)[^/]*$", r"\1")
    numbered = members.append_column("key", keys).append_column("number", pa.array(np.arange(len(members))))
    by_key = numbered.sort_by([(name, "ascending") for name in ("container", "key", "number")])
    for _, group in itertools.groupby(iterate_rows(by_key), key=lambda member: (member["container"], member["key"])):
        sample = [(member, posixpath.basename(member["name"]).partition(".")[2].lower()) for member in group]
        if not all("." in extension for _, extension in sample):
            yield sample
            continue
        dotted: dict[str, list[tuple[Member, str]]] = defaultdict(list)
        for member, _ in sample:
            key, suffix = posixpath.splitext(member["name"])
            dotted[key].append((member, suffix[1:].lower()))
        yield from dotted.values()


def _find_in_sample(sample: list[tuple[Member, str]], images: Rows, ignored: Rows, labelled: bool) -> None:
    """Add the image among the members of one key: the first with an image suffix, else the first that may be one."""
    labels = (member["label"] for member, extension in sample if "." not in extension)
    class_name = next((label for label in labels if label is not None), None)
    possible = [
        (member, extension)
        for member, extension in sample
        if not is_plainly_other(member["name"]) and extension != "cls" and "." not in extension
    ]
    named = [(member, extension) for member, extension in possible if f".{extension}" in image_suffixes()]
    image = next((member for member, _ in named or possible), None)
    lost_class = class_name if image is None else None
    for member, extension in sample:
        path = member["path"]
        if member is image and labelled and class_name is None:
            ignored.append(path, "no_label", None)
        elif member is image and not member["is_text"]:
            ignored.append(path, "name_is_not_utf8", class_name)
        elif member is image:
            images.append(path, class_name, *(member[name] for name in ("split", "container", "offset", "bytes")))
        elif (member, extension) in named:
            ignored.append(path, "second_image_of_its_key", None)
        elif extension not in ("cls", "json"):
            ignored.append(path, "not_an_image_name", lost_class)
        elif lost_class is not None:
            ignored.append(path, None, lost_class)


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
