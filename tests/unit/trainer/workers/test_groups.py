"""How many workers a job has, what each gets, and what their errors mean; with a cluster: tests/integration."""

import pytest
from ray.train import ControllerError

from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError, JobError, WorkerDiedError, WorkersFailedError
from trainer.workers import groups
from trainer.workers.groups import WorkerCount, needs_cluster, parse_num_workers


def machines(num_cpus: int = 4, num_gpus: int = 0, free_gpus: int | None = None) -> Resources:
    free = num_gpus if free_gpus is None else free_gpus
    return Resources(num_nodes=1, num_cpus=num_cpus, num_gpus=num_gpus, free_gpus=free, devices="", node_memory_gib=16)


@pytest.mark.parametrize(
    ("num_workers", "resources", "expected"),
    [
        ("auto", machines(), (1, 1, 1)),
        ("auto", machines(num_gpus=4), (4, 4, 4)),
        ("3", machines(), (3, 3, 3)),
        ("2:8", machines(), (2, 8, 8)),
        ("2:8", machines(num_gpus=4), (2, 4, 8)),
        ("2:8", machines(num_gpus=4, free_gpus=1), (2, 2, 8)),
    ],
)
def test_the_number_of_workers_follows_the_option_and_the_gpus(num_workers, resources, expected):
    assert parse_num_workers(num_workers, resources) == WorkerCount(*expected)


def test_more_workers_than_gpus_are_refused():
    with pytest.raises(InputError, match="--num-workers 5 needs 5 GPUs, the cluster has 4; give 4 or less, or auto"):
        parse_num_workers("5", machines(num_gpus=4))


@pytest.mark.parametrize("num_workers", ["0", "-1", "two", "3:2", "1:", "", "2:8:9"])
def test_a_number_of_another_form_is_refused(num_workers):
    for parse in (lambda text: parse_num_workers(text, machines()), needs_cluster):
        with pytest.raises(InputError, match=r"--num-workers .*: give a number from 1, MIN:MAX such as 2:8, or auto"):
            parse(num_workers)


@pytest.mark.parametrize(("num_workers", "needed"), [("auto", False), ("1", False), ("2", True), ("1:2", True)])
def test_several_workers_need_a_cluster(num_workers, needed):
    assert needs_cluster(num_workers) == needed


@pytest.mark.parametrize(
    ("num_workers", "resources", "expected"),
    [
        (2, machines(num_cpus=4), {"CPU": 1.0}),
        (4, machines(num_cpus=3), {"CPU": 0.5}),
        (2, machines(num_cpus=1), {"CPU": 0.25}),
        (2, machines(num_cpus=16, num_gpus=2), {"CPU": 1.0, "GPU": 1}),
    ],
)
def test_workers_leave_a_core_to_ray_data(num_workers, resources, expected):
    assert groups._worker_resources(num_workers, resources) == expected


@pytest.fixture
def fail(monkeypatch):
    """Return a function that runs one worker whose process fails with these errors, one after the other."""

    def run(*errors: Exception, max_failures: int) -> list:
        left, events = list(errors), []

        def run_process(*_, keep):
            if left:
                raise left.pop(0)
            return "trained"

        monkeypatch.setattr(groups, "run_process", run_process)
        groups._run_alone(print, machines(), max_failures, False, events.append)
        return events

    return run


def test_a_worker_that_died_is_started_again_as_often_as_allowed(fail):
    died = [WorkerDiedError(f"worker 0 died: {number}") for number in range(3)]
    events = fail(*died[:2], max_failures=2)
    assert [(one.reason, one.failures, one.max_failures) for one in events] == [
        ("worker 0 died: 0", 1, 2),
        ("worker 0 died: 1", 2, 2),
    ]
    with pytest.raises(WorkersFailedError, match="worker 0 died: 2"):
        fail(*died, max_failures=2)


@pytest.mark.parametrize(
    ("error", "kind"), [(InputError("x"), InputError), (JobError("x"), JobError), (ValueError("x"), WorkersFailedError)]
)
def test_an_error_that_would_come_again_is_not_tried_again(fail, error, kind):
    with pytest.raises(kind, match="x"):
        fail(error, max_failures=3)


@pytest.mark.parametrize("kind", [InputError, JobError])
def test_the_error_that_ended_the_controller_is_that_of_the_job(kind):
    error = ControllerError(kind("shards/00001.arrow is damaged"))
    explained = groups._explain_failure(error, WorkerCount(2, 2, 2), death=None)
    assert explained is error.controller_failure
