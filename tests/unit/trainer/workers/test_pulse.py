"""Pulses of workers, silence, and the description of a death."""

import os
import time
from dataclasses import replace

import pytest

from trainer.runtime.events import WorkerHeardAgain, WorkerSilent
from trainer.workers import pulse as pulses
from trainer.workers.pulse import Pulse, Traces, Watch, describe_death, describe_signal, keep_pulse, read_traces

PULSE = Pulse(rank=1, host="node-a", node_id="", pid=77, log="/x/worker.err", used_gib=3.9, limit_gib=8.0, oom_kills=2)
VANISHED = "Worker unexpectedly exits with a connection error code 2. (1) the process was killed by the OOM killer"


def test_a_pulse_is_sent_at_once_and_again_and_says_what_this_process_uses(monkeypatch):
    monkeypatch.setattr(pulses, "_PULSE_SECONDS", 0.01)
    sent = []
    keep_pulse(sent.append, rank=3, node_id="abc")
    while len(sent) < 2:
        time.sleep(0.01)
    assert (sent[0].rank, sent[0].node_id, sent[0].pid) == (3, "abc", os.getpid())
    assert 0 < sent[0].used_gib < sent[0].limit_gib
    assert sent[0].log == os.readlink("/proc/self/fd/2")


def test_a_silent_worker_is_reported_once_and_its_return_too(monkeypatch):
    events = []
    watch = Watch(events.append)
    watch.hear(replace(PULSE, rank=0, pid=76))
    watch.hear(PULSE)
    watch.look()
    assert not events
    monkeypatch.setattr(pulses, "_SILENCE_SECONDS", 0.0)
    for _ in range(2):
        watch.look()
    assert [event.worker for event in events] == ["worker 0 (process 76 on node-a)", "worker 1 (process 77 on node-a)"]
    assert {type(event) for event in events} == {WorkerSilent}
    watch.hear(PULSE)
    assert (type(events[-1]), events[-1].worker) == (WorkerHeardAgain, str(PULSE))


def test_no_worker_is_silent_because_the_driver_was_busy(monkeypatch):
    monkeypatch.setattr(pulses, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(pulses, "_PULSE_SECONDS", 0.1)
    events = []
    watch = Watch(events.append)
    watch.hear(PULSE)
    time.sleep(0.3)
    watch.look()
    assert not events
    started = time.monotonic()
    while not events and time.monotonic() < started + 10:
        watch.look()
    assert [event.worker for event in events] == [str(PULSE)]


def test_nothing_is_expected_of_workers_that_another_group_replaces(monkeypatch):
    monkeypatch.setattr(pulses, "_SILENCE_SECONDS", 0.0)
    events = []
    watch = Watch(events.append)
    watch.hear(replace(PULSE, rank=2, pid=78))
    watch.hear(PULSE)
    watch.hear(replace(PULSE, pid=99))
    watch.look()
    assert [event.worker for event in events] == ["worker 1 (process 99 on node-a)"]
    watch.forget()
    # On its way when the workers ended.
    watch.hear(replace(PULSE, pid=99))
    watch.look()
    assert len(events) == 1


@pytest.mark.parametrize(
    ("used", "kills", "expected"),
    [
        (3.9, 2, "was killed by SIGKILL (3.9 of 8.0 GiB used shortly before)"),
        (7.1, 2, "was killed by SIGKILL (7.1 of 8.0 GiB used shortly before)"),
        (7.3, 2, "was killed by SIGKILL, probably out of memory: 7.3 of 8.0 GiB used"),
        (3.9, 3, "was killed by SIGKILL, probably out of memory: 3.9 of 8.0 GiB used"),
    ],
)
def test_memory_is_named_where_a_process_vanished(used, kills, expected):
    assert describe_signal("SIGKILL", replace(PULSE, used_gib=used), Traces(b"", kills)) == expected


def test_memory_is_not_named_where_it_cannot_be_the_cause():
    assert describe_signal("SIGTERM", replace(PULSE, used_gib=8.0), Traces(b"", 9)) == "was killed by SIGTERM"
    assert describe_signal("SIGKILL", None, Traces()) == "was killed by SIGKILL"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (VANISHED, "was killed by SIGKILL or exited without a message (3.9 of 8.0 GiB used shortly before)"),
        ("Worker exits unexpectedly. Worker exits with an exit code 4.", "ended with exit code 4"),
        ("Worker exits unexpectedly by a signal. The process receives a SIGTERM.", "was killed by SIGTERM"),
        ("The actor died because its node has died. Node Id: 12ab", "was lost with its node"),
        (
            "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: a) "
            "was 4.71GB used / 23.54GB limit (0.200066)\nOOM kill reason: Memory usage 5056876544B exceeded threshold",
            "was killed by Ray's memory monitor, out of memory: 4.71 of 23.54 GiB used",
        ),
    ],
)
def test_what_ray_says_of_a_death_is_reported_in_short(error, expected):
    assert describe_death(error, PULSE, Traces(b"", 2)) == expected


def test_a_death_for_lack_of_memory_is_by_sigkill():
    killed = "was killed by SIGKILL, probably out of memory: 3.9 of 8.0 GiB used"
    assert describe_death(VANISHED, PULSE, Traces(b"", 3)) == killed


def test_the_signal_of_a_crash_is_read_from_what_the_worker_printed(tmp_path):
    log = tmp_path / "worker.err"
    log.write_bytes(b"x" * 100_000 + b"\n*** SIGABRT received at time=1795844899 on cpu 0 ***\nPC: @ 0x7f (unknown)\n")
    traces = read_traces(str(log))
    assert len(traces.tail) == 65_536
    assert describe_death(VANISHED, PULSE, traces) == "was killed by SIGABRT"


def test_a_worker_whose_log_is_gone_has_left_nothing(tmp_path):
    assert read_traces(str(tmp_path / "none")).tail == b""
