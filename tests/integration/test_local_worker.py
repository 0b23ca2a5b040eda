"""A run on this machine alone: one process trains it, and neither its death nor the driver's changes the result."""

import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import REPOSITORY, last_state, run_job
from trainer.notes.note import describe_unfinished
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.cluster import read_machine
from trainer.runtime.errors import InputError, WorkerDiedError
from trainer.runtime.events import StageProgressed, WorkerHeardAgain, WorkerSilent
from trainer.workers import pulse
from trainer.workers.groups import WorkerCount, run_workers
from trainer.workers.local_worker import discard_kept, run_process

TRAINING = "--arch cnn_softmax --arch-argument first_filters=8 --arch-argument dense_units=32 --epochs 20"
OPTIONS = [*TRAINING.split(), "--global-batch-size", "20", "--precision", "float32", "--checkpoint-every", "3"]

# As a researcher writes it: without a look at __name__.
SCRIPT = """
import sys
import trainer

dataset, storage, init_from = sys.argv[1:]
network = {"arch": "cnn_softmax", "arch_arguments": {"first_filters": 8, "dense_units": 32}}
batch = {"global_batch_size": 20, "precision": "float32"}
places = {"dataset": dataset, "storage": storage, "run_name": "refused", "init_from": init_from}
run = trainer.fine_tune(**network, **batch, **places, head_epochs=1, epochs=2)
print(len(run.history), run.status)
"""


@pytest.fixture(scope="module")
def options(stripes, tmp_path_factory) -> list[str]:
    return [*OPTIONS, "--dataset", str(stripes), "--storage", str(tmp_path_factory.mktemp("runs"))]


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> RunFolder:
    home = tmp_path_factory.mktemp("home")
    job = run_job("train.py", *options, "--run-name", "undisturbed", HOME=str(home))
    assert job.returncode == 0, job.stderr
    assert list(home.iterdir()) == []
    return RunFolder(f"{options[-1]}/undisturbed")


def test_the_network_learns(undisturbed):
    assert undisturbed.read_result().val.loss < 0.7 * np.log(3)


def start(*options: str) -> subprocess.Popen[str]:
    """Return a job that has trained an epoch and goes on."""
    command = [sys.executable, "jobs/train.py", *options]
    job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    read_until(r" epoch \d+/", job)
    return job


def read_until(pattern: str, job: subprocess.Popen[str]) -> str:
    """Read what a job says until a line has the pattern, and return it."""
    lines = []
    for line in job.stderr:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


def worker_pid(run: RunFolder, attempt: int = 1) -> int:
    return json.loads(Path(run.path("attempts", f"{attempt:04d}.json")).read_text())["pid"]


def assert_no_cluster_was_started(job: subprocess.Popen[str], run: RunFolder) -> None:
    commands = [" ".join(one.cmdline()) for one in psutil.Process(job.pid).children(recursive=True)]
    assert len(commands) == 2  # the worker, and what Python starts beside such a process
    assert not [one for one in commands if "raylet" in one or "gcs_server" in one]
    assert Path(f"/proc/{worker_pid(run)}/oom_score_adj").read_text() == "1000\n"


def test_a_killed_worker_is_started_again_and_after_its_driver_the_same_command_goes_on(options, undisturbed):
    run = RunFolder(f"{options[-1]}/killed")
    job = start(*options, "--run-name", run.name)
    assert_no_cluster_was_started(job, run)
    os.kill(worker_pid(run), signal.SIGKILL)
    errors = read_until("attempt 2 continues", job)
    worker = f"worker 0 (process {worker_pid(run)} on {platform.node()}) was killed by SIGKILL"
    assert re.search(rf"{re.escape(worker)}.*; its log: {platform.node()}:/.*/worker\.log\n", errors)
    assert "failure 1 of 3 allowed by --max-failures" in errors
    went_on = re.search(r"attempt 2 continues after step (\d+), in epoch \d+, with 1 worker\n", errors)
    read_until(r" epoch \d+/", job)
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (worker_pid(run, attempt=2), job.pid)]
    assert ["libtensorflow" in one for one in maps] == [True, False]

    of_second_attempt = psutil.Process(worker_pid(run, attempt=2))
    job.kill()
    job.communicate()
    assert not psutil.wait_procs([of_second_attempt], timeout=10)[1]
    # The loss of power that killed it may have damaged what it wrote last.
    last = cut_off_weights(run, checkpoints.find_last(run.checkpoints))
    again = run_job("train.py", *options, "--run-name", run.name)
    assert again.returncode == 0, again.stderr
    assert f"{last.name}/model.safetensors is damaged" in again.stderr

    result = run.read_result()
    assert result.attempts == 3
    of_worker, of_driver, damage = result.incidents
    assert (of_worker.attempt, of_worker.next_step) == (1, int(went_on[1]))
    assert of_worker.what.startswith(worker)
    assert (of_driver.attempt, of_driver.kind, damage.kind) == (2, "workers lost", "files damaged")
    assert f"{last.name}/model.safetensors is damaged" in damage.what
    note = Path(run.path("note.md")).read_text()
    assert all(str(incident) in note for incident in result.incidents)
    assert last_state(run) == last_state(undisturbed)


@pytest.mark.slow
def test_a_killed_run_that_xla_compiles_ends_with_the_same_weights_and_compiles_once(options):
    options = [*options, "--xla", "on"]
    whole, killed = (RunFolder(f"{options[options.index('--storage') + 1]}/xla-{name}") for name in ("whole", "killed"))
    job = run_job("train.py", *options, "--run-name", whole.name)
    assert job.returncode == 0, job.stderr
    programs = set(Path(os.environ["XDG_CACHE_HOME"], "training-notes", "xla").rglob("*.pb"))
    assert programs
    job = start(*options, "--run-name", killed.name)
    os.kill(worker_pid(killed), signal.SIGKILL)
    errors = job.communicate(timeout=200)[1]
    assert job.returncode == 0, errors
    assert "compiling the training step by XLA" in errors
    assert set(Path(os.environ["XDG_CACHE_HOME"], "training-notes", "xla").rglob("*.pb")) == programs
    assert killed.read_result().attempts == 2
    assert last_state(killed) == last_state(whole)


@pytest.mark.slow
def test_the_same_command_repairs_a_finished_run_whose_best_is_damaged(options, undisturbed):
    """As the refusal of evaluate.py says; that the next best takes its place is in test_loop.py."""
    run = RunFolder(shutil.copytree(undisturbed.uri, f"{options[-1]}/repaired"))
    best = cut_off_weights(run, checkpoints.find_named(run.checkpoints, run.read_result().best_checkpoint))
    Path(run.path("result.json")).unlink()
    repaired = run_job("train.py", *options, "--run-name", run.name)
    assert repaired.returncode == 0, repaired.stderr
    assert f"{best.name}/model.safetensors is damaged" in repaired.stderr
    assert run.read_result().best_checkpoint != best.name


def read_best(run: RunFolder) -> checkpoints.Arrays:
    """Return the weights of the best epoch."""
    best = checkpoints.find_best(run.checkpoints)
    return checkpoints.from_safetensors(checkpoints.read_file(run.checkpoints, best, checkpoints.MODEL_NAME))


def cut_off_weights(run: RunFolder, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
    weights = Path(run.checkpoints, checkpoint.name, checkpoints.MODEL_NAME)
    weights.write_bytes(weights.read_bytes()[:100])
    return checkpoint


def test_a_run_that_its_worker_refuses_says_so_and_its_name_is_free_for_python(options, undisturbed, tmp_path):
    run = RunFolder(f"{options[-1]}/refused")
    options = [*options, "--run-name", run.name, "--epochs", "1"]
    # Its last layer alone would fit.
    other = ["--arch-argument", "first_filters=4", "--arch-argument", "dense_units=32"]
    refused = run_job("train.py", *options, *other, "--init-from", undisturbed.uri)
    assert refused.returncode == 2
    reason = refused.stderr.splitlines()[-1].removeprefix("error: ")
    assert describe_unfinished(run.read_ending()) == f"refused: {reason}"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    places = [options[options.index("--dataset") + 1], storage.parent(run.uri), undisturbed.uri]
    command = [sys.executable, str(script), *places]
    without = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (without.returncode, without.stdout) == (0, "2 completed\n"), without.stderr
    assert "epoch 2/2 - loss: " in without.stderr
    trunk_and_head, other_head = read_best(undisturbed), read_best(RunFolder(f"{run.uri}-head"))
    changed = {name for name, array in trunk_and_head.items() if not np.array_equal(array, other_head[name])}
    assert changed == {"logits/kernel:0", "logits/bias:0"}
    head, tuned = RunFolder(f"{run.uri}-head").read_record(), run.read_record()
    # The refused one has started, too.
    assert (head.previous, tuned.previous) == (run.name, f"{run.name}-head")
    assert (head.config.freeze_trunk, tuned.config.freeze_trunk) == (True, False)
    assert (head.config.init_from, tuned.config.init_from) == (undisturbed.uri, f"{run.uri}-head")
    assert tuned.config.base_learning_rate == pytest.approx(head.config.base_learning_rate / 10)
    assert tuned.command.startswith("python jobs/train.py --arch cnn_softmax --arch-argument first_filters=8 ")


def test_a_worker_that_dies_too_often_fails_the_run(options, tmp_path):
    run = RunFolder(f"{options[-1]}/fails")
    job = start(*options, "--run-name", run.name, "--max-failures", "0")
    os.kill(worker_pid(run), signal.SIGKILL)
    errors = job.communicate(timeout=60)[1]
    assert job.returncode == 1
    assert f"worker 0 (process {worker_pid(run)} on {platform.node()}) was killed by SIGKILL" in errors
    assert "the same command continues it" in errors
    assert [lost.attempt for lost in run.read_incidents()] == [1]


def test_events_arrive_in_order_before_the_result(tmp_path):
    events = []
    sent = [StageProgressed("counting", count, 100) for count in range(100)]

    def count(send_event):
        print("for the log")
        for event in sent:
            send_event(event)
        return os.getpid()

    assert run_process(count, str(tmp_path), events.append) != os.getpid()
    assert events == sent
    assert "for the log" in (tmp_path / "worker.log").read_text()


def test_a_kept_process_calls_the_next_function_and_ends_with_it(tmp_path):
    def tell_process(send_event):
        return os.getpid()

    def fail(send_event):
        raise ValueError("no such row")

    first = run_process(tell_process, str(tmp_path), print, keep=True)
    assert psutil.pid_exists(first)
    assert run_process(tell_process, str(tmp_path), print) == first
    assert not psutil.pid_exists(first)
    # A function that fails leaves no process behind, and a process that died none to the next one.
    second = run_process(tell_process, str(tmp_path), print, keep=True)
    with pytest.raises(RuntimeError, match="no such row"):
        run_process(fail, str(tmp_path), print, keep=True)
    assert not psutil.pid_exists(second)
    third = run_process(tell_process, str(tmp_path), print, keep=True)
    os.kill(third, signal.SIGKILL)
    for child in multiprocessing.active_children():
        child.join(timeout=10)
    fourth = run_process(tell_process, str(tmp_path), print, keep=True)
    assert fourth not in (first, second, third)
    discard_kept(str(tmp_path))
    assert not psutil.pid_exists(fourth)


def test_the_error_of_the_function_is_raised_here(tmp_path):
    def refuse(send_event):
        raise InputError("--epochs 0; give 1 or more")

    with pytest.raises(InputError, match="give 1 or more"):
        run_workers(refuse, "refusal", WorkerCount(1, 1, 1), read_machine(str(tmp_path)), on_event=print)


def test_another_error_is_named_here_and_complete_in_the_log(tmp_path):
    class OwnError(Exception):
        pass

    def fail(send_event):
        raise OwnError("no such row")

    with pytest.raises(RuntimeError, match="OwnError: no such row"):
        run_process(fail, str(tmp_path), print)
    assert "Traceback" in (tmp_path / "worker.log").read_text()


def test_a_process_that_exits_is_an_error(tmp_path):
    def leave(send_event):
        print("last words", flush=True)
        os._exit(3)

    with pytest.raises(WorkerDiedError, match=r"worker 0 \(process \d+ .*ended with exit code 3") as raised:
        run_process(leave, str(tmp_path), print)
    assert raised.value.log == f"{platform.node()}:{tmp_path / 'worker.log'}"
    assert raised.value.tail.endswith(b"last words\n")


def test_a_worker_that_stands_still_is_reported_and_goes_on(tmp_path, monkeypatch):
    # Twice as long as the worker takes from one sign of life to the next.
    monkeypatch.setattr(pulse, "_SILENCE_SECONDS", 6.0)
    events = []

    def stand_still(send_event):
        send_event(StageProgressed("counting", os.getpid(), 0))
        time.sleep(1)
        # Stopped above; the next sign of life comes before the end.
        time.sleep(4)
        return "went on"

    def watch(event):
        events.append(event)
        if isinstance(event, StageProgressed):
            os.kill(event.done, signal.SIGSTOP)
        elif isinstance(event, WorkerSilent):
            os.kill(events[0].done, signal.SIGCONT)

    assert run_process(stand_still, str(tmp_path), watch) == "went on"
    assert [type(event) for event in events] == [StageProgressed, WorkerSilent, WorkerHeardAgain]
    assert events[1].worker == f"worker 0 (process {events[0].done} on {platform.node()})"
