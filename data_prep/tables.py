"""Find images in a table that lists them: CSV, JSON lines or Parquet, made on any operating system."""

import codecs
import csv
import io
import json
import posixpath
import re
from typing import Any

from data_prep.listing import FoundImage, Listing
from data_prep.names import parse_split, suffix_of, to_class_names
from trainer.runtime import storage
from trainer.runtime.errors import InputError

TEXT_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson"}
_DELIMITERS = ",;\t"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def find_in_table(root: str, name: str, listing: Listing, labelled: bool) -> None:
    """Add the images that a table lists to a listing.

    Args:
        root: path or URI of the folder that paths are relative to.
        name: name of the table in the folder.
        listing: what to add to.
        labelled: whether every row must have a label.

    Raises:
        FileNotFoundError: the table does not exist.
        InputError: the table cannot be read, a column is missing, or a row has no value.
    """
    uri = storage.join(root, name)
    rows = _read_table(uri)
    columns = list(rows[0]) if rows else []
    path_column = next((column for column in ("path", "file_name") if column in columns), None)
    if path_column is None or (labelled and "label" not in columns):
        raise InputError(
            f"{name} has the columns {', '.join(columns) or '(none)'}; required are path (or file_name) and label; "
            "split is optional"
        )
    paths = _read_paths(uri, path_column, rows)
    class_names = to_class_names([row.get("label") for row in rows])
    for number, (row, path, class_name) in enumerate(zip(rows, paths, class_names, strict=True), start=1):
        if labelled and class_name is None:
            raise InputError(f"{name}, row {number} has no label; add it")
        listing.add(FoundImage(path, class_name, parse_split(name, number, row.get("split"))))


def _read_table(uri: str) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries.

    Text is UTF-8 or, with a byte order mark, UTF-16. The delimiter of a CSV file is the comma, semicolon or tab,
    whichever occurs most often in the header.
    """
    content = storage.read_bytes(uri)
    try:
        if suffix_of(uri) == ".parquet":
            return storage.parquet_table(content).to_pylist()  # type: ignore[no-any-return]
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        if suffix_of(uri) in (".csv", ".tsv"):
            delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
            return _check_widths(uri, list(csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{uri} cannot be read as a table: {error}; save it as UTF-8") from error
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{uri} cannot be read as a table: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{uri} cannot be read as a table: each line must be a JSON object")
    return rows


def _check_widths(uri: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        # The key under which csv puts fields beyond the header.
        if None in row:
            raise InputError(
                f"{uri}, row {number} has more fields than the header; add the missing columns to the header"
            )
    return rows


def _read_paths(uri: str, column: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the path of each row, relative to the table's folder, with slashes.

    Backslashes separate folders, as on Windows, unless a file exists that has one in its name.
    """
    root, name = storage.parent(uri), storage.basename(uri)
    given = [str(row[column]) if row.get(column) is not None else "" for row in rows]
    first = next((path for path in given if "\\" in path), None)
    is_of_windows = first is not None and not storage.exists(storage.join(root, first))
    paths = []
    for number, text in enumerate(given, start=1):
        if not text:
            raise InputError(f"{name}, row {number} has no {column}; add it")
        path = posixpath.normpath(text.replace("\\", "/") if is_of_windows else text)
        if path.startswith(("/", "../")) or path == ".." or "://" in text or _DRIVE.match(text):
            raise InputError(
                f"{name}, row {number}: {text!r} is outside the table's folder {root}; give paths relative to it"
            )
        paths.append(path)
    return paths
