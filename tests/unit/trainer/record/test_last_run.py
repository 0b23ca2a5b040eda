"""Which run was started last, where runs of several architectures and datasets begin, and begin again."""

import pytest

from trainer.record.last_run import replace_last_run
from trainer.runtime import storage


@pytest.fixture
def begin(tmp_path, make_config):
    """Return a function that begins a run, and returns the name of the one before it."""
    return lambda name, **values: replace_last_run(str(tmp_path), make_config(**values), name)


def test_a_run_knows_the_one_before_of_its_architecture_and_dataset(begin):
    assert [begin("first"), begin("second")] == [None, "first"]
    assert [begin("other", arch="vgg19"), begin("elsewhere", dataset_fingerprint="beef")] == [None, None]
    assert [begin("third", seed=1), begin("another", arch="vgg19")] == ["second", "other"]


def test_a_run_that_begins_again_has_the_same_one_before_it(begin):
    assert [begin("first"), begin("first"), begin("second"), begin("second"), begin("third")] == [
        *(None, None, "first", "first", "second")
    ]


def test_a_damaged_file_is_written_anew(begin, tmp_path):
    begin("first")
    (path,) = (tmp_path / "last_runs").iterdir()
    storage.write_bytes(str(path), b"{")
    assert [begin("second"), begin("third")] == [None, "second"]
