"""Workers that a real cluster has no room for."""

import pytest
import ray

from trainer.runtime.errors import JobError
from trainer.runtime.events import WorkersAwaited
from trainer.workers import groups
from trainer.workers.groups import WorkerCount, run_workers


def test_workers_without_room_are_waited_for_aloud_and_not_for_ever(resources, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")
    monkeypatch.setattr(groups, "_ROOM_TRIES", 1)
    monkeypatch.setattr(groups, "_SILENCE_SECONDS", 1.0)

    @ray.remote(num_cpus=2)
    class Holder:
        def is_ready(self) -> bool:
            return True

    holder, events = Holder.remote(), []
    assert ray.get(holder.is_ready.remote())
    with pytest.raises(JobError, match=r"2 workers found no room: 1 node, 2 CPUs.*; start nodes or .* MIN:MAX"):
        run_workers(lambda _: None, "no-room", WorkerCount(2, 2, 2), resources, on_event=events.append)
    ray.kill(holder)
    assert {(type(event), event.least) for event in events} == {(WorkersAwaited, 2)}
