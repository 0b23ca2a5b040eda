"""Workers of a real cluster: without room for them, lost at their start, and with an error that would come again."""

import os
import re
import signal
import threading
import time

import pytest
import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import StartFailed, WorkersAwaited
from trainer.runtime.processes import is_worker
from trainer.runtime.signals import raise_on_signals, received_signal
from trainer.workers import backend, groups
from trainer.workers.groups import WorkerCount, run_workers


def test_workers_without_room_are_waited_for_and_not_for_ever(resources, monkeypatch):
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


def test_a_signal_is_not_lost_in_ray(resources, handlers):
    @raise_on_signals()
    def wait_for_ray() -> None:
        threading.Timer(2, signal.raise_signal, [signal.SIGTERM]).start()
        ray.get(waiting)

    waiting = ray.remote(lambda: time.sleep(60)).remote()

    with pytest.raises(KeyboardInterrupt):
        wait_for_ray()
    ray.cancel(waiting, force=True)
    assert received_signal() == signal.SIGTERM


def test_ray_s_processes_are_workers(resources):
    assert not is_worker()
    assert ray.get(ray.remote(is_worker).remote())


def test_a_worker_that_dies_at_its_start_is_reported_and_an_error_that_would_come_again_ends_all(
    resources, tmp_path, capfd, monkeypatch
):
    def die_once() -> None:
        if ray.train.get_context().get_world_rank() == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    class DyingBackend(Backend):
        def on_start(self, worker_group, backend_config) -> None:
            worker_group.execute(die_once)

    class DyingConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return DyingBackend

    monkeypatch.setattr(backend, "TensorFlowConfig", DyingConfig)

    def fail_on_one(_) -> None:
        (tmp_path / f"started-{os.getpid()}").touch()
        if ray.train.get_context().get_world_rank() == 1:
            raise InputError("shards/00001.arrow is damaged")
        time.sleep(60)

    events = []
    with pytest.raises(InputError, match=r"shards/00001\.arrow is damaged"):
        run_workers(fail_on_one, "damaged", WorkerCount(2, 2, 2), resources, max_failures=3, on_event=events.append)
    assert len(list(tmp_path.glob("started-*"))) == 2
    assert [type(event) for event in events] == [StartFailed]
    killed = r"a worker \(process \d+ on [\d.]+\) was killed by SIGKILL or exited without a message while it started"
    assert re.fullmatch(f"{killed}; the workers are started again", str(events[0]))
    assert "Traceback" not in capfd.readouterr().err
