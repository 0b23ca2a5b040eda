import pickle

import pytest

from trainer.runtime import errors
from trainer.runtime.errors import InputError, JobError, WorkerDiedError, WorkersFailedError


@pytest.mark.parametrize("kind", ["RecordError", "NewerFormatError", "DamagedError", "BatchError", "UnreachableError"])
def test_what_is_wrong_with_the_input_ends_a_job_with_exit_code_2(kind):
    assert issubclass(getattr(errors, kind), InputError)
    assert not issubclass(getattr(errors, kind), JobError)


@pytest.mark.parametrize("kind", [InputError, JobError, errors.LeaseLostError, errors.BatchError])
def test_an_error_passes_from_a_worker_to_the_driver(kind):
    passed = pickle.loads(pickle.dumps(kind("no layer fits")))
    assert (type(passed), str(passed)) == (kind, "no layer fits")


def test_the_death_of_a_worker_keeps_its_log():
    died = WorkerDiedError("worker 0 was killed by SIGKILL", "node:/tmp/worker.log", b"Killed")
    assert (str(died), died.log, died.tail) == ("worker 0 was killed by SIGKILL", "node:/tmp/worker.log", b"Killed")


def test_failures_of_workers_are_the_last_lines_of_their_errors_each_once():
    causes = [ValueError("Traceback\nno such row\n"), ValueError("no such row"), ValueError(""), KeyError("b")]
    failed = WorkersFailedError(causes)
    assert str(failed) == "'b'; no such row"
    assert failed.causes == causes
