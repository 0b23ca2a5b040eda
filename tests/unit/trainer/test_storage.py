import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from botocore.exceptions import ClientError

from tests.conftest import REPOSITORY
from trainer import storage
from trainer.errors import InputError


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path)


def write_all(root: str, *paths: str) -> None:
    for path in paths:
        storage.write_bytes(storage.join(root, path), path.encode())


def test_a_local_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert storage.resolve_uri("runs") == f"{tmp_path}/runs"
    assert storage.resolve_uri("./a/../runs/") == f"{tmp_path}/runs"
    assert storage.resolve_uri("~/runs") == "/home/ada/runs"
    assert storage.resolve_uri("/data") == "/data"


def test_a_bucket_keeps_its_prefix_without_a_trailing_slash():
    assert storage.resolve_uri("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert storage.resolve_uri("s3://bucket") == "s3://bucket"


@pytest.mark.parametrize("location", ["gs://bucket/a", "file:///tmp", "http://host/a", "S3://bucket", "://bucket"])
def test_another_scheme_is_refused_with_what_to_give(location):
    with pytest.raises(InputError, match=r"unknown scheme .*; give a local path or s3://bucket/prefix"):
        storage.resolve_uri(location)


@pytest.mark.parametrize("location", ["s3://", "s3:///", "s3:////"])
def test_a_uri_without_a_bucket_is_refused(location):
    with pytest.raises(InputError, match="names no bucket"):
        storage.resolve_uri(location)


@pytest.mark.parametrize("uri", ["/data/runs", "s3://bucket/runs"])
def test_uris_are_taken_apart_and_joined(uri):
    assert storage.join(uri, "first", "note.md") == f"{uri}/first/note.md"
    assert storage.join(f"{uri}/", "first") == f"{uri}/first"
    assert storage.basename(f"{uri}/first/") == "first"
    assert storage.parent(f"{uri}/first/") == uri


def test_only_paths_are_local():
    assert storage.is_local("/data/runs")
    assert not storage.is_local("s3://bucket/runs")


def test_what_is_written_is_read(root):
    uri = storage.join(root, "new", "folders", "file")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3) == b"3456789"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 3, 0) == b""
    with storage.open_file(uri) as file:
        file.seek(8)
        assert file.read() == b"89"


def test_a_write_replaces_the_file(root):
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"a longer one")
    storage.write_bytes(uri, b"short")
    assert storage.read_bytes(uri) == b"short"


def test_a_write_leaves_only_its_file(root):
    storage.write_bytes(storage.join(root, "a", "file"), b"1")
    assert storage.find_files(root) == {"a/file": 1}


def test_a_file_that_is_not_written_to_its_end_is_none(root):
    write_all(root, "a/file", f"a/.file.{'0' * 32}.partial", "a/.notes.partial")
    assert list(storage.find_files(root)) == ["a/.notes.partial", "a/file"]
    storage.delete_partial_files(root)
    assert sorted(os.listdir(Path(root, "a"))) == [".notes.partial", "file"]


def test_a_file_that_exists_is_not_created(root):
    uri = storage.join(root, "file")
    assert storage.create_file(uri, b"first")
    assert not storage.create_file(uri, b"second")
    assert storage.refuses_to_create(uri, b"first")
    assert storage.read_bytes(uri) == b"first"


def test_a_write_that_fails_leaves_what_was_there(root):
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "not bytes")
    assert storage.read_bytes(uri) == b"old"
    assert storage.find_files(root) == {"file": 3}


def test_a_reader_never_sees_half_a_file(root):
    uri, contents = storage.join(root, "file"), {bytes([value]) * 200_000 for value in range(20)}
    storage.write_bytes(uri, min(contents))
    seen, written = set(), threading.Event()

    def read_until_written():
        while not written.is_set():
            seen.add(storage.read_bytes(uri))

    reader = threading.Thread(target=read_until_written)
    reader.start()
    for content in contents:
        storage.write_bytes(uri, content)
    written.set()
    reader.join()
    assert seen
    assert seen <= contents


def test_a_missing_file_is_not_found_and_named(root):
    with pytest.raises(FileNotFoundError, match="missing: not found"):
        storage.read_bytes(storage.join(root, "missing"))
    with pytest.raises(FileNotFoundError, match="missing: not found"), storage.open_file(storage.join(root, "missing")):
        pass


def test_what_the_file_system_refuses_is_an_input_error_with_the_place(root):
    write_all(root, "file")
    below_a_file = storage.join(root, "file", "below")
    for refused in (
        lambda: storage.write_bytes(below_a_file, b""),
        lambda: storage.create_file(below_a_file, b""),
        lambda: storage.check_access(storage.join(root, "file")),
        lambda: storage.read_bytes(root),
        lambda: storage.write_bytes(root, b""),
    ):
        with pytest.raises(InputError, match=f"{root}.*; give a path that can be read and written"):
            refused()


def test_a_file_is_created_once(root):
    uri = storage.join(root, "new", "folder", "lease")
    assert storage.create_file(uri, b"first")
    assert not storage.create_file(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_of_many_at_once_one_creates_the_file(root):
    uri, start, created = storage.join(root, "lease"), threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        if storage.create_file(uri, str(number).encode()):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert storage.read_bytes(uri) == str(created[0]).encode()


def test_existence_is_of_files_and_folders(root):
    write_all(root, "a/file")
    assert storage.exists(storage.join(root, "a"))
    assert storage.exists(storage.join(root, "a", "file"))
    assert not storage.exists(storage.join(root, "b"))


def test_files_are_found_at_any_depth_relative_and_sorted(root):
    write_all(root, "b", "a/c", "a-b/d", "a/b/e.txt", ".hidden")
    assert list(storage.find_files(root).items()) == [
        (".hidden", 7),
        ("a-b/d", 5),
        ("a/b/e.txt", 9),
        ("a/c", 3),
        ("b", 1),
    ]


def test_a_missing_folder_has_no_files_and_no_folders(root):
    missing = storage.join(root, "missing")
    assert storage.find_files(missing) == {}
    assert storage.find_folders(missing) == []


def test_a_symlink_loop_does_not_trap_the_walk(root, tmp_path):
    write_all(root, "a/file")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a" / "itself")
    assert storage.find_files(root) == {"a/file": 6, "a/itself": 0}


def test_symlinks_to_each_other_do_not_trap_the_walk(root, tmp_path):
    write_all(root, "a/file", "b/file")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    assert list(storage.find_files(root)) == ["a/file", "a/other/file", "b/file", "b/other/file"]


def test_a_symlink_to_a_folder_is_followed(root, tmp_path):
    write_all(root, "elsewhere/cats/1.png")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    assert list(storage.find_files(storage.join(root, "source"))) == ["cats/1.png"]


def test_a_symlink_to_a_file_is_a_file_and_a_broken_one_is_listed_as_empty(root, tmp_path):
    write_all(root, "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "missing")
    assert storage.find_files(root) == {"broken": 0, "file": 4, "link": 4}


def test_a_folder_that_may_not_be_read_is_refused_and_named():
    # Not in tmp_path, which is closed to all but its owner, and nothing is closed to root.
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        write_all(root, "open/file", "closed/file")
        Path(root, "closed").chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            with pytest.raises(InputError, match=f"{root}/closed: Permission denied; give a path"):
                storage.find_files(root)
        finally:
            os.seteuid(user)
            Path(root, "closed").chmod(0o755)


def test_folders_are_found_sorted_and_one_level_deep(root):
    write_all(root, "b/c/file", "a/file", "file")
    assert storage.find_folders(root) == ["a", "b"]
    assert storage.find_folders(storage.join(root, "file")) == []


def test_a_deleted_folder_is_gone_with_all_below_it_and_nothing_else(root):
    write_all(root, "a/b/file", "a/file", "ab/file")
    storage.delete_folder(storage.join(root, "a"))
    assert storage.find_files(root) == {"ab/file": 7}
    storage.delete_folder(storage.join(root, "a"))


def test_a_deleted_file_is_gone(root):
    write_all(root, "a", "b")
    storage.delete_file(storage.join(root, "a"))
    storage.delete_file(storage.join(root, "a"))
    assert storage.find_files(root) == {"b": 1}


def test_checking_that_a_folder_can_be_written_leaves_nothing(root):
    storage.check_access(storage.join(root, "runs"))
    assert storage.find_files(root) == {}


def test_a_table_survives_as_parquet(root):
    table = pa.table({"epoch": [1, 2], "loss": [0.5, float("nan")]})
    content = storage.parquet_bytes(table)
    assert storage.parquet_table(content).to_pydict()["epoch"] == [1, 2]
    storage.write_bytes(storage.join(root, "t.parquet"), content)
    assert storage.read_parquet_schema(storage.join(root, "t.parquet")) == table.schema


def test_a_bucket_that_is_not_there_is_an_input_error(bucket):
    for call in ("write_bytes({!r}, b'')", "create_file({!r}, b'')", "find_files({!r})"):
        # In a process of its own: the endpoint of a process is read once.
        script = "from trainer import storage; storage." + call.format("s3://missing/lease")
        process = subprocess.run(
            [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
        assert "InputError: s3://missing/lease: bucket 'missing' at" in process.stderr
        assert "answered 'no such bucket'" in process.stderr


def test_an_answer_without_a_message_is_told_by_its_code():
    # As s3fs makes them of Ceph's.
    error = OSError(22, "None")
    error.__cause__ = ClientError({"Error": {"Code": "SignatureDoesNotMatch"}}, "PutObject")
    assert storage._first_line(error) == "SignatureDoesNotMatch"
    assert storage._first_line(OSError(5, "Input/output error")) == "[Errno 5] Input/output error"


def test_an_unreachable_bucket_is_an_input_error_without_the_secret(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-any-log")
    message = storage._s3_message("s3://photos/cats", "Could not connect")
    assert message.startswith("s3://photos/cats: bucket 'photos' at http://127.0.0.1:9 answered 'Could not connect'")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        assert name in message
    assert "not-for-any-log" not in message
