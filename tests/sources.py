"""Write sources of images, and describe what is found in them."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources import find_images


def rows_of(source: str, *columns: str) -> list[tuple]:
    images = find_images(source).images
    return [tuple(row[column] for column in columns) for row in images.to_pylist()]


def ignored_in(source: str) -> dict[str, str]:
    ignored = find_images(source).ignored.to_pydict()
    return dict(zip(ignored["path"], ignored["reason"], strict=True))


def write_parquet(path: Path, labels: list, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": str(label).encode(), "path": None} for label in labels]
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), path)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)
