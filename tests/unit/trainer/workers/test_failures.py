"""The description of a failure of a group of workers, from what Ray Train reports."""

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from trainer.workers.failures import Failures, FailureSender, GroupFailed, describe_failed_start
from trainer.workers.pulse import Watch


@pytest.fixture
def failures() -> Failures:
    return Failures(Watch(print), max_failures=2)


def test_the_controller_sends_what_died_apart_from_what_failed():
    sent = []
    FailureSender(sent.append).after_exception(
        None,
        {
            0: WorkerHealthCheckFailedError(
                "A worker health check failed.", RayActorError(error_msg="its node has died")
            ),
            1: ValueError("no\n  such row"),
        },
    )
    (failed,) = sent
    assert "its node has died" in failed.died[0]
    assert failed.raised == {1: "ValueError: no such row"}
    assert not failed.is_preempted


def test_a_death_is_reported_before_the_errors_that_come_of_it(failures):
    lost = failures.describe(GroupFailed({1: "its node has died"}, {0: "UnavailableError: reset by peer"}, False))
    assert (lost.reason, lost.failures, lost.max_failures) == ("worker 1 was lost with its node", 1, 2)
    lost = failures.describe(GroupFailed({}, {1: "ValueError: b", 0: "ValueError: a"}, False))
    assert (lost.reason, lost.failures) == ("worker 0 failed: ValueError: a; worker 1 failed: ValueError: b", 2)
    assert failures.death is None


def test_the_last_failure_is_reported_by_the_error_of_the_run(failures):
    for number in range(2):
        assert failures.describe(GroupFailed({1: f"process {number}"}, {}, False)) is not None
    assert failures.describe(GroupFailed({1: "process 2"}, {}, False)) is None
    assert str(failures.death) == "worker 1 was killed by SIGKILL or exited without a message"


def test_a_failure_that_ray_reports_twice_is_one_and_a_node_that_is_taken_away_is_none(failures):
    failed = GroupFailed({1: "process 7"}, {}, False)
    assert failures.describe(failed).failures == 1
    assert failures.describe(failed) is None
    assert failures.describe(GroupFailed({0: "its node has died"}, {}, True)).failures == 1


def test_a_worker_that_dies_at_its_start_is_named_as_ray_names_it():
    error = "The actor died.\n\tclass_name: A\n\tpid: 71\n\tip: 192.0.2.2\nWorker exits with an exit code 4."
    assert describe_failed_start(error) == "a worker (process 71 on 192.0.2.2) ended with exit code 4 while it started"
    assert describe_failed_start("its node has died") == "a worker was lost with its node while it started"
