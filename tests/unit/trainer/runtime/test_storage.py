import contextlib
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from tests.proxy import Fault, Proxy
from trainer.runtime import s3, storage
from trainer.runtime.errors import InputError


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


@pytest.mark.parametrize(
    "location",
    [
        "gs://bucket/a",
        "file:///tmp",
        "http://host/a",
        "S3://bucket",
        "s3a://bucket",
        "://bucket",
        " s3://bucket",
        "s3:/bucket/a",
        "s3:bucket",
        "s3:",
        "https:/host",
        "C:\\runs",
        "c:/runs",
        r"\\server\runs",
        "'s3://bucket'",
    ],
)
def test_what_looks_like_a_uri_and_is_none_that_is_known_is_refused(location):
    with pytest.raises(
        InputError, match=r"not a known kind of URI; give s3://bucket/prefix or a local path, and \./PATH"
    ):
        storage.resolve_uri(location)


@pytest.mark.parametrize(
    "location", ["./s3:runs", "/data/a:b", "../a:b", "runs/12:30", "~/a:b", "12:30", ".a:b", "a b:c"]
)
def test_a_local_path_may_have_a_colon(location):
    assert storage.resolve_uri(location) == os.path.abspath(os.path.expanduser(location))


@pytest.mark.parametrize("location", ["s3://", "s3:///", "s3:////", "s3:///a", "s3://key:secret@bucket/a", "s3://b*/a"])
def test_a_uri_without_a_bucket_is_refused(location):
    with pytest.raises(InputError, match="names no bucket"):
        storage.resolve_uri(location)


@pytest.mark.parametrize("prefix", ["a//b", "/a", "../a", "a/./b", "a/..", "runs\r", "a\nb/c"])
def test_a_prefix_that_programs_would_read_differently_is_refused(prefix):
    with pytest.raises(InputError, match=r"empty, '\.' or '\.\.', or a control character"):
        storage.resolve_uri(f"s3://bucket/{prefix}")


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


def test_a_pipe_is_no_file(root, tmp_path):
    write_all(root, "file")
    os.mkfifo(tmp_path / "pipe")
    assert list(storage.find_files(root)) == ["file"]


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


@pytest.fixture(params=["disk", "bucket"])
def place(request, root) -> str:
    """An empty folder on a disk, then an empty prefix of a bucket."""
    return root if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"


def test_files_are_found_while_the_folder_is_read_and_none_are_kept(place, monkeypatch):
    monkeypatch.setattr(s3, "_OBJECTS_PER_PAGE", 2)
    write_all(place, "a1", "a2", "b/1")
    found = storage.walk_files(place)
    first = next(found)
    write_all(place, "b/2", "b/3")
    assert sorted([first, *found]) == [("a1", 2), ("a2", 2), ("b/1", 3), ("b/2", 3), ("b/3", 3)]


def test_beyond_the_end_of_a_file_there_is_nothing(place):
    storage.write_bytes(storage.join(place, "empty"), b"")
    assert storage.read_bytes(storage.join(place, "empty")) == b""
    assert storage.read_bytes(storage.join(place, "empty"), 0, 16) == b""
    storage.write_bytes(storage.join(place, "short"), b"abc")
    assert storage.read_bytes(storage.join(place, "short"), 1, 16) == b"bc"
    assert storage.read_bytes(storage.join(place, "short"), 3) == b""


def test_a_mapped_file_is_the_one_that_was_opened(place):
    uri = storage.join(place, "file")
    with pytest.raises(FileNotFoundError, match=f"{uri}: not found"):
        storage.map_file(uri)
    storage.write_bytes(uri, b"")
    assert storage.map_file(uri).to_pybytes() == b""
    storage.write_bytes(uri, b"abc")
    mapped = storage.map_file(uri)
    storage.write_bytes(uri, b"another")
    assert mapped.to_pybytes() == b"abc"


@pytest.mark.parametrize(
    ("name", "neighbor"),
    [
        # As a pattern it is its neighbor.
        ("exp[1]*?", "exp1ab"),
        # As s3fs reads it, too.
        ("run?versionId=2", "run"),
        # As a URL or in another Unicode form.
        ("e\u0301%20+", "\u00e9  "),
    ],
)
def test_a_name_is_never_a_pattern(place, name, neighbor):
    own, other = storage.join(place, name), storage.join(place, neighbor)
    partial = f".file.{'0' * 32}.partial"
    for path in (("a", "file"), ("file",), (partial,)):
        storage.write_bytes(storage.join(other, *path), b"neighbor")
    before = find_all(place)

    # Nothing of the name itself is there.
    assert (storage.exists(own), storage.find_files(own), storage.find_folders(own)) == (False, {}, [])
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(own, "file"))
    with pytest.raises(FileNotFoundError), storage.open_file(storage.join(own, "file")):
        pass
    storage.delete_file(storage.join(own, "file"))
    storage.delete_folder(own)
    storage.delete_partial_files(own)
    storage.check_access(own)
    assert find_all(place) == before

    assert storage.create_file(storage.join(own, "file"), b"own")
    assert storage.refuses_to_create(storage.join(own, "file"), b"own")
    storage.write_bytes(storage.join(own, "a", "file"), storage.parquet_bytes(pa.table({"own": [1]})))
    assert storage.read_bytes(storage.join(own, "file")) == b"own"
    assert storage.read_parquet_schema(storage.join(own, "a", "file")).names == ["own"]
    assert (list(storage.find_files(own)), storage.find_folders(own)) == (["a/file", "file"], ["a"])
    assert storage.find_folders(place) == sorted([name, neighbor])
    storage.delete_file(storage.join(own, "file"))
    assert list(storage.find_files(own)) == ["a/file"]
    storage.delete_folder(own)
    assert not storage.exists(own)
    assert find_all(place) == before


def find_all(place: str) -> list[str]:
    """All that is there, also what is no file to `storage.find_files`."""
    if storage.is_local(place):
        return sorted(str(path) for path in Path(place).rglob("*") if path.is_file())
    return sorted(fsspec.filesystem("s3", skip_instance_cache=True).find(place))


def test_a_folder_of_many_objects_is_deleted(bucket):
    for index in range(40):
        storage.write_bytes(f"{bucket}/many/{index}", b"")
    storage.delete_folder(f"{bucket}/many")
    assert storage.find_files(f"{bucket}/many") == {}


def test_checking_that_a_folder_can_be_written_leaves_nothing(root):
    storage.check_access(storage.join(root, "runs"))
    assert storage.find_files(root) == {}


def test_a_table_survives_as_parquet(root):
    table = pa.table({"epoch": [1, 2], "loss": [0.5, float("nan")]})
    content = storage.parquet_bytes(table)
    assert storage.parquet_table(content).to_pydict()["epoch"] == [1, 2]
    storage.write_bytes(storage.join(root, "t.parquet"), content)
    assert storage.read_parquet_schema(storage.join(root, "t.parquet")) == table.schema


class RefusingProxy(Proxy):
    """Refuses what begins so."""

    refused: Callable[[BaseHTTPRequestHandler], Fault]

    def find_fault(self, request: BaseHTTPRequestHandler) -> Fault:
        return self.refused(request)


@pytest.fixture
def refuse(bucket, monkeypatch):
    """Return a function that puts a proxy before the bucket, which answers requests as a function of them says."""
    with contextlib.ExitStack() as proxies:

        def start(fault: Callable[[BaseHTTPRequestHandler], Fault]) -> None:
            proxy = proxies.enter_context(RefusingProxy(os.environ["AWS_ENDPOINT_URL"]).serving())
            proxy.refused = fault
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            storage._s3.cache_clear()

        yield start
    storage._s3.cache_clear()


def test_a_store_that_wants_a_checksum_of_deletions_is_one(bucket, refuse):
    def fault(request: BaseHTTPRequestHandler) -> Fault:
        is_bulk = request.command == "POST" and "?delete" in request.path
        return (400, "MissingContentMD5") if is_bulk and not request.headers["Content-MD5"] else None

    refuse(fault)
    storage.check_access(f"{bucket}/md5")
    for index in range(3):
        storage.write_bytes(f"{bucket}/md5/{index}", b"")
    storage.delete_folder(f"{bucket}/md5")
    assert storage.find_files(f"{bucket}/md5") == {}


@pytest.mark.parametrize(
    ("method", "part", "what"),
    [
        ("DELETE", "", r"delete a file there \(s3:DeleteObject\)"),
        ("POST", "?uploads", r"write a file in parts there \(s3:PutObject\)"),
    ],
)
def test_a_store_without_what_a_job_needs_is_refused_before_work(bucket, refuse, method, part, what):
    refuse(
        lambda request: (501, "NotImplemented") if (request.command, part in request.path) == (method, True) else None
    )
    with pytest.raises(InputError, match=rf"answered 'NotImplemented'.*; a job must be able to {what}"):
        storage.check_access(f"{bucket}/runs")


def test_what_is_in_a_file_is_no_error_of_the_storage(place):
    storage.write_bytes(storage.join(place, "file"), b"no Parquet file")
    with pytest.raises(pa.ArrowInvalid):
        storage.read_parquet_schema(storage.join(place, "file"))


def test_a_bucket_that_is_not_there_is_an_input_error(bucket):
    uri = "s3://missing/runs/lease"
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.find_files,
        storage.find_folders,
        storage.delete_folder,
        lambda uri: storage.write_bytes(uri, b""),
        lambda uri: storage.create_file(uri, b""),
    ):
        with pytest.raises(
            InputError, match=r"s3://missing/runs/lease: bucket 'missing' at .* answered 'no such bucket'"
        ):
            call(uri)
