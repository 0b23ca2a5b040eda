import multiprocessing
import subprocess
import sys
import time

import ray

from tests.conftest import REPOSITORY
from trainer.runtime.processes import ProcessId, is_gone, is_worker, this_process

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def id_of(process: subprocess.Popen) -> ProcessId:
    return ProcessId(process.pid, this_process().namespace)


def test_a_process_that_lives_is_not_gone():
    assert not is_gone(this_process())
    with subprocess.Popen(SLEEPER) as process:
        assert not is_gone(id_of(process))
        process.kill()


def test_a_process_that_ended_is_gone_before_and_after_its_exit_code_is_asked_for():
    process = subprocess.Popen(SLEEPER)
    process.kill()
    deadline = time.monotonic() + 10
    while not is_gone(id_of(process)):
        assert time.monotonic() < deadline
    process.wait()
    assert is_gone(id_of(process))


def test_a_process_of_another_machine_or_container_is_not_known_to_be_gone():
    process = subprocess.Popen(SLEEPER)
    process.kill()
    process.wait()
    assert not is_gone(ProcessId(process.pid, "another"))


FOLLOWER = """
import sys, time
from trainer.runtime.processes import ProcessId, end_with
end_with(ProcessId(int(sys.argv[1]), sys.argv[2]))
print("follows", flush=True)
time.sleep(60)
"""


def follow(process: ProcessId) -> subprocess.Popen:
    command = [sys.executable, "-c", FOLLOWER, str(process.pid), process.namespace]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_a_process_ends_with_another_one_that_is_killed_though_nobody_reaps_that_one():
    leader = subprocess.Popen(SLEEPER)
    with follow(id_of(leader)) as follower:
        assert follower.stdout.readline() == "follows\n"
        assert follower.poll() is None
        leader.kill()
        assert follower.wait(timeout=20) == 1
    leader.wait()


def test_a_process_that_a_job_spawns_is_a_worker():
    assert not is_worker()
    assert not ray.is_initialized()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(is_worker)


def test_a_process_whose_leader_is_gone_already_ends_at_once():
    leader = subprocess.Popen(SLEEPER)
    leader.kill()
    leader.wait()
    with follow(id_of(leader)) as follower:
        assert follower.wait(timeout=20) == 1


def test_a_process_lives_on_beside_one_that_it_cannot_look_for():
    with follow(ProcessId(1, "another")) as follower:
        assert follower.stdout.readline() == "follows\n"
        assert follower.poll() is None
        follower.kill()
