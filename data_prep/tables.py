"""Find images in a table that lists them: CSV, JSON lines or Parquet, made on any operating system."""

import codecs
import contextlib
import csv
import io
import itertools
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.columns import Rows
from data_prep.labels import find_first, name_classes, name_splits_given
from data_prep.listing import Listing, fill_columns
from data_prep.names import suffix_of, to_class_name
from trainer.runtime import storage
from trainer.runtime.errors import InputError

TEXT_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson"}
_PATH_COLUMNS = ("path", "file_name")
_DELIMITERS = ",;\t"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_ROW_SCHEMA = pa.schema([("path", pa.string()), ("label", pa.string()), ("split", pa.string())])


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
    with storage.open_file(uri) as file, _clear_errors(uri):
        columns, rows = _open_table(uri, file)
        path_column = next((column for column in _PATH_COLUMNS if column in columns), None)
        if path_column is None or (labelled and "label" not in columns):
            raise InputError(
                f"{name} has the columns {', '.join(columns) or '(none)'}; required are path (or file_name) and label; "
                "split is optional"
            )
        table = _read_rows(uri, path_column, rows)
    class_names = name_classes(uri, table["label"])
    if labelled and (row := find_first(class_names.is_null())) is not None:
        raise InputError(f"{name}, row {row + 1} has no label; add it")
    splits = name_splits_given(name, table["split"], first_row=1)
    listing.add(fill_columns(path=table["path"], class_name=class_names, split=splits))


@contextlib.contextmanager
def _clear_errors(uri: str) -> Iterator[None]:
    """Turn errors of a file that is no table into one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{uri} cannot be read as a table: {error}; save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{uri} cannot be read as a table: {error}") from error


def _open_table(uri: str, file: IO[bytes]) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Return the names of the columns of a table, and its rows, which are read as they are used.

    Text is UTF-8 or, with a byte order mark, UTF-16. The delimiter of a CSV file is the comma, semicolon or tab,
    whichever occurs most often in the header.
    """
    if suffix_of(uri) == ".parquet":
        parquet = pq.ParquetFile(file)
        columns = parquet.schema_arrow.names
        batches = parquet.iter_batches(columns=[name for name in (*_PATH_COLUMNS, "label", "split") if name in columns])
        return columns, itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    file.seek(0)
    text = io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig", newline="")
    if suffix_of(uri) in (".csv", ".tsv"):
        delimiter = max(_DELIMITERS, key=text.readline().count)
        text.seek(0)
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        return list(reader.fieldnames or []), _check_widths(uri, reader)
    rows = _parse_lines(uri, text)
    first = next(rows, {})
    return list(first), itertools.chain([first], rows)


def _check_widths(uri: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        # The key under which csv puts fields beyond the header.
        if None in row:
            raise InputError(
                f"{uri}, row {number} has more fields than the header; add the missing columns to the header"
            )
        yield row


def _parse_lines(uri: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for row in (json.loads(line) for line in lines if line.strip()):
        if not isinstance(row, dict):
            raise InputError(f"{uri} cannot be read as a table: each line must be a JSON object")
        yield row


def _read_rows(uri: str, path_column: str, rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Return path, relative to the table's folder and with slashes, label and split of each row.

    Backslashes separate folders, as on Windows, unless a file exists that has one in its name.
    """
    root, name = storage.parent(uri), storage.basename(uri)
    is_of_windows: bool | None = None
    read = Rows(_ROW_SCHEMA)
    for number, row in enumerate(rows, start=1):
        text = str(row[path_column]) if row.get(path_column) is not None else ""
        if not text:
            raise InputError(f"{name}, row {number} has no {path_column}; add it")
        if is_of_windows is None and "\\" in text:
            is_of_windows = not storage.exists(storage.join(root, text))
        path = posixpath.normpath(text.replace("\\", "/") if is_of_windows else text)
        if path.startswith(("/", "../")) or path == ".." or "://" in text or _DRIVE.match(text):
            raise InputError(
                f"{name}, row {number}: {text!r} is outside the table's folder {root}; give paths relative to it"
            )
        split = row.get("split")
        read.append(path, to_class_name(row.get("label")), None if split is None else str(split))
    return read.to_table()
