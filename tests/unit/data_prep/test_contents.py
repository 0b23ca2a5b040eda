import io
import os
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.contents import read_blocks
from data_prep.sources import IMAGES_SCHEMA, find_images
from trainer.runtime.errors import InputError


def as_images(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)


def read_contents(source: str, images: pa.Table) -> list[bytes | None]:
    blocks = list(read_blocks(source, images, 4))
    assert [len(block) for block in blocks[:-1]] == [4] * (len(blocks) - 1)
    return [content for block in blocks for content in block]


def test_files_come_in_the_order_of_the_rows(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(str(number).encode())
    order = [*range(29, -1, -1), 3, 3]
    contents = read_contents(str(tmp_path), as_images([{"path": f"{number}.png"} for number in order]))
    assert contents == [str(number).encode() for number in order]


def test_a_file_that_is_not_there_has_no_content(tmp_path):
    (tmp_path / "here.png").write_bytes(b"1")
    images = as_images([{"path": "gone.png"}, {"path": "here.png"}, {"path": "no/folder.png"}])
    assert read_contents(str(tmp_path), images) == [None, b"1", None]


@pytest.mark.parametrize(("on_disk", "named"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_a_file_may_be_named_in_another_form_of_unicode(tmp_path, on_disk, named):
    (tmp_path / on_disk).mkdir()
    (tmp_path / on_disk / "1.png").write_bytes(b"1")
    images = as_images([{"path": f"{named}/1.png"}, {"path": f"{named}/2.png"}])
    assert read_contents(str(tmp_path), images) == [b"1", None]


def test_a_file_without_read_permission_costs_that_file():
    # Not in tmp_path, which is closed to all but its owner, and nothing is closed to root.
    with tempfile.TemporaryDirectory() as source:
        Path(source).chmod(0o755)
        Path(source, "open.png").write_bytes(b"1")
        Path(source, "closed.png").touch(mode=0)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            contents = read_contents(source, as_images([{"path": "closed.png"}, {"path": "open.png"}]))
        finally:
            os.seteuid(user)
    assert contents == [None, b"1"]


def test_a_name_that_cannot_be_read_costs_that_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    images = as_images([{"path": "folder.png"}, {"path": "loop.png"}, {"path": "x" * 300 + ".png"}])
    assert read_contents(str(tmp_path), images) == [None, None, None]


def test_a_storage_that_fails_is_not_taken_for_a_bad_file(tmp_path):
    # Opens as a file but fails when it is read.
    (tmp_path / "x.png").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"x\.png: Input/output error"):
        read_contents(str(tmp_path), as_images([{"path": "x.png"}]))


def test_no_rows_give_nothing(tmp_path):
    assert read_contents(str(tmp_path), as_images([])) == []


def test_members_of_a_tar_are_read_from_their_place(tmp_path):
    contents = {f"{number}.png": bytes([number]) * (700 * number) for number in range(1, 5)}
    for name in ("train-0.tar", "train-1.TAR"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for path, content in {**contents, "1.cls": b"a", "2.cls": b"b", "3.cls": b"a", "4.cls": b"b"}.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    found = find_images(str(tmp_path))
    assert read_contents(found.uri, found.images) == [*contents.values(), *contents.values()]


@pytest.mark.parametrize("as_struct", [True, False])
def test_rows_of_parquet_files_come_in_order_across_row_groups(tmp_path, as_struct):
    expected = []
    for file in range(2):
        contents = [f"{file}-{row}".encode() for row in range(7)]
        images = [{"bytes": content, "path": ""} for content in contents] if as_struct else contents
        pq.write_table(
            pa.table({"image": images, "label": list("abababa")}), tmp_path / f"{file}.parquet", row_group_size=3
        )
        expected += contents
    found = find_images(str(tmp_path))
    assert read_contents(found.uri, found.images) == expected
    # A slice begins and ends within row groups.
    assert read_contents(found.uri, found.images.slice(4, 6)) == expected[4:10]
