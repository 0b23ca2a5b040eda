import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime.errors import InputError
from trainer.runtime.folders import cache_folder, hold_folder, keep_folder

HOLD = """
import sys, time
from trainer.runtime.folders import hold_folder

with hold_folder("notes-", sys.argv[1]) as folder:
    (open(folder + "/log", "w")).close()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that holds a folder; return it and the folder."""
    started = []

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def abandoned(start) -> Path:
    """A folder whose process was killed."""
    process, folder = start()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "log").exists()
    return folder


def test_a_folder_goes_with_its_context(tmp_path):
    with hold_folder("notes-", str(tmp_path)) as folder:
        Path(folder, "log").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_can_be_kept_and_stays(tmp_path):
    with hold_folder("notes-", str(tmp_path)) as folder:
        Path(folder, "log").touch()
        keep_folder(folder)
    with hold_folder("notes-", str(tmp_path)):
        assert Path(folder, "log").exists()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, abandoned):
    (abandoned / "session").mkdir()
    (abandoned / "session" / "log").touch()
    (abandoned / "link").symlink_to(tmp_path)
    (tmp_path / "other").touch()
    with hold_folder("notes-", str(tmp_path)) as folder:
        assert {one.name for one in tmp_path.iterdir()} == {"other", Path(folder).name}


def test_nothing_of_a_live_process_is_removed(tmp_path, start):
    _, other = start()
    with hold_folder("notes-", str(tmp_path)), hold_folder("notes-", str(tmp_path)) as mine:
        assert (other / "log").exists()
        assert len(list(tmp_path.iterdir())) == 3
    assert not Path(mine).exists()


def test_what_another_machine_that_shares_the_disk_has_is_left_alone(tmp_path, abandoned):
    lock = abandoned / "training-notes.lock"
    lock.write_text("00000000-0000-0000-0000-000000000000\n")
    with hold_folder("notes-", str(tmp_path)):
        assert (abandoned / "log").exists()


def test_what_another_user_has_is_left_alone(tmp_path, abandoned, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with hold_folder("notes-", str(tmp_path)):
        assert (abandoned / "log").exists()


def test_a_folder_of_the_same_name_without_a_lock_and_a_link_to_one_are_left_alone(tmp_path, abandoned):
    elsewhere = tmp_path / "elsewhere"
    abandoned.rename(elsewhere)
    (tmp_path / "notes-mine").mkdir()
    (tmp_path / "notes-link").symlink_to(elsewhere)
    with hold_folder("notes-", str(tmp_path)):
        assert (tmp_path / "notes-mine").exists()
        assert (elsewhere / "log").exists()


def test_the_cache_is_in_the_folder_that_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "training-notes"
    assert cache_folder().is_dir()


def test_a_cache_that_cannot_be_made_is_named_with_its_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be made: Not a directory; set XDG_CACHE_HOME"):
        cache_folder()


@pytest.mark.parametrize("home", ["file", "file/below"])
def test_without_a_home_that_can_be_written_the_cache_is_temporary(monkeypatch, tmp_path, home):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = tmp_path / "tmp" / f"training-notes-{os.geteuid()}"
    assert cache_folder() == folder / "training-notes"
    # In a folder that anybody can write somebody else may have been first.
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    folder.rename(tmp_path / "tmp" / f"training-notes-{os.geteuid()}")
    with pytest.raises(InputError, match="belongs to another user; set XDG_CACHE_HOME"):
        cache_folder()


def test_a_user_without_a_name_and_a_home_has_a_temporary_cache(monkeypatch, tmp_path):
    def getpwuid(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"training-notes-{os.geteuid()}" / "training-notes"


def test_libraries_keep_to_the_cache(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KERAS_HOME": "/keras"}
    script = "import trainer, os, matplotlib; print(matplotlib.get_cachedir(), os.environ['KERAS_HOME'])"
    finished = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert finished.stdout == f"{tmp_path}/.cache/training-notes/matplotlib /keras\n", finished.stderr
    assert [one.name for one in tmp_path.iterdir()] == [".cache"]
