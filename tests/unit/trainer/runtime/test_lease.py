import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from trainer.runtime import lease, signals, storage
from trainer.runtime.errors import InputError, LeaseLostError
from trainer.runtime.lease import hold_lease


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "dataset" / "lease")


def write_holder(uri: str, **values) -> None:
    holder = json.loads(lease._describe_holder("other"))
    storage.write_bytes(uri, json.dumps({**holder, **values}).encode())


def pid_of_a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_is_there_while_it_is_held_and_gone_afterwards(uri):
    with hold_lease(uri, "DATASET d"):
        assert json.loads(storage.read_bytes(uri))["pid"] == os.getpid()
    assert not storage.exists(uri)


def test_a_lease_is_given_back_after_an_error(uri):
    with pytest.raises(ZeroDivisionError), hold_lease(uri, "DATASET d"):
        raise ZeroDivisionError
    assert not storage.exists(uri)


def test_a_held_lease_is_refused_with_its_holder(uri):
    with hold_lease(uri, "DATASET d"):
        with (
            pytest.raises(InputError, match=rf"DATASET d is in use by process {os.getpid()} on {platform.node()}"),
            hold_lease(uri, "DATASET d"),
        ):
            pass
        assert storage.exists(uri)


def test_a_process_of_this_machine_that_died_is_followed_at_once(uri):
    write_holder(uri, pid=pid_of_a_dead_process())
    with hold_lease(uri, "DATASET d"):
        assert json.loads(storage.read_bytes(uri))["pid"] == os.getpid()


def test_a_process_of_another_container_of_this_host_is_not_taken_for_dead(uri):
    write_holder(uri, pid=pid_of_a_dead_process(), namespace="another")
    with pytest.raises(InputError, match="in use by process"), hold_lease(uri, "DATASET d"):
        pass


def test_a_process_number_that_another_process_has_by_now_is_followed_after_a_while(uri):
    write_holder(uri, renewed=time.time() - 3600)
    with hold_lease(uri, "DATASET d"):
        assert json.loads(storage.read_bytes(uri))["renewed"] > time.time() - 60


def test_another_machine_is_followed_when_it_was_silent_for_long(uri):
    write_holder(uri, host="elsewhere", namespace="elsewhere", pid=1, renewed=time.time() - 3600)
    with hold_lease(uri, "DATASET d"):
        assert json.loads(storage.read_bytes(uri))["host"] == platform.node()


def test_another_machine_that_was_heard_of_lately_is_left_alone(uri):
    write_holder(uri, host="elsewhere", namespace="elsewhere", pid=7, renewed=time.time() - 30)
    with (
        pytest.raises(InputError, match=r"in use by process 7 on elsewhere, last heard of 3\d s ago"),
        hold_lease(uri, "DATASET d"),
    ):
        pass
    assert json.loads(storage.read_bytes(uri))["host"] == "elsewhere"


def test_a_lease_that_another_job_took_over_is_left_to_it(uri):
    with hold_lease(uri, "DATASET d"):
        write_holder(uri, host="elsewhere")
    assert json.loads(storage.read_bytes(uri))["host"] == "elsewhere"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}", b"[]", b'{"token": "other"}'])
def test_a_lease_that_cannot_be_read_is_taken_over(uri, monkeypatch, content):
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.01)
    storage.write_bytes(uri, content)
    with hold_lease(uri, "DATASET d"):
        assert json.loads(storage.read_bytes(uri))["pid"] == os.getpid()


def test_a_holder_may_write_until_another_job_or_nobody_has_its_lease(uri):
    with hold_lease(uri, "DATASET d") as held:
        held.check()
        write_holder(uri, host="elsewhere", pid=7)
        with pytest.raises(LeaseLostError, match=r"DATASET d was taken over .*, by process 7 on elsewhere"):
            held.check()
        storage.delete_file(uri)
        with pytest.raises(LeaseLostError, match="by nobody: its lease is gone"):
            held.check()


def test_a_job_that_lost_its_lease_is_interrupted_and_knows_why(uri, monkeypatch, handlers):
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(signals, "_reason", "")

    @signals.raise_on_signals()
    def work() -> None:
        with hold_lease(uri, "DATASET d"):
            write_holder(uri, host="elsewhere", pid=7)
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signals.failure_reason().endswith(
        "was taken over while nothing was heard of this job, by process 7 on elsewhere"
    )
    assert json.loads(storage.read_bytes(uri))["pid"] == 7


def test_a_holder_of_which_nothing_is_heard_is_waited_for(uri, monkeypatch):
    monkeypatch.setattr(lease, "_EXPIRE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.2)
    write_holder(uri, host="elsewhere", namespace="elsewhere", pid=7)
    with hold_lease(uri, "DATASET d", wait=True):
        assert json.loads(storage.read_bytes(uri))["pid"] == os.getpid()


def test_a_job_whose_first_write_was_tried_again_is_not_refused_by_itself(uri, monkeypatch):
    def lose_the_answer(uri: str, content: bytes) -> bool:
        storage.write_bytes(uri, content)
        return False

    monkeypatch.setattr(storage, "create_file", lose_the_answer)
    with hold_lease(uri, "DATASET d"):
        pass
    assert not storage.exists(uri)


def test_what_a_killed_holder_had_begun_to_write_is_deleted(uri):
    partial = Path(uri).parent / "train" / f".part-00000.parquet.{'0' * 32}.partial"
    partial.parent.mkdir(parents=True)
    partial.touch()
    with hold_lease(uri, "DATASET d"):
        assert not partial.exists()


def test_a_lease_is_renewed_again_when_the_storage_is_back(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    folder = Path(uri).parent
    (tmp_path / "works").mkdir()
    (tmp_path / "is no folder").touch()

    def point_at(name: str) -> None:
        (tmp_path / "next").symlink_to(tmp_path / name)
        (tmp_path / "next").replace(folder)

    point_at("works")
    with hold_lease(uri, "DATASET d"):
        point_at("is no folder")
        time.sleep(0.3)
        point_at("works")
        back, deadline = time.time(), time.monotonic() + 10
        while json.loads(storage.read_bytes(uri))["renewed"] < back:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_of_several_jobs_that_take_over_at_once_one_goes_on(uri):
    write_holder(uri, renewed=time.time() - 3600)
    together = Barrier(4)

    def take_over(_: int) -> bool:
        together.wait()
        try:
            with hold_lease(uri, "DATASET d"):
                return True
        except InputError:
            return False

    with ThreadPoolExecutor(4) as jobs:
        assert sum(jobs.map(take_over, range(4))) == 1
