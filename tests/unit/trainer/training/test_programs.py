import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime.folders import cache_folder
from trainer.training import programs
from trainer.training.programs import keep_programs

COMPILE = """
from trainer.training.programs import keep_programs
keep_programs("a device: 1")
import tensorflow as tf
print(tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1)).numpy())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of programs, in a cache folder whose name has a space."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of a user"))
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    return cache_folder() / "xla"


def test_a_compiled_program_is_kept(cache):
    assert subprocess.run([sys.executable, "-c", COMPILE], check=True, capture_output=True).stdout == b"2\n"
    (program,) = cache.rglob("*.pb")
    assert program.parent.name == "a-device--1"


def test_another_folder_and_other_flags_of_the_user_stay(cache, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_persistent_cache_directory=/programs")
    keep_programs("cpu")
    assert os.environ["TF_XLA_FLAGS"] == "--tf_xla_persistent_cache_directory=/programs"
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_clustering_debug")
    keep_programs("cpu")
    assert os.environ["TF_XLA_FLAGS"].startswith("--tf_xla_clustering_debug --tf_xla_persistent_cache_directory=")


def test_without_a_cache_folder_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    keep_programs("cpu")
    assert "TF_XLA_FLAGS" not in os.environ


def test_the_oldest_programs_make_room(cache, monkeypatch):
    monkeypatch.setattr(programs, "_MOST_BYTES", 25)
    cache.mkdir(parents=True)
    for number, name in enumerate(("new", "old", "older")):
        (cache / f"{name}.pb").write_bytes(b"0123456789")
        os.utime(cache / f"{name}.pb", (1000 - number, 1000 - number))
    keep_programs("cpu")
    assert {path.name for path in cache.glob("*.pb")} == {"new.pb", "old.pb"}
