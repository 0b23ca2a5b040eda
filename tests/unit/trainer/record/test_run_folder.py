import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from trainer.record import checkpoint as checkpoints
from trainer.record import run_folder
from trainer.record.run_folder import Attempt, RunFolder, RunRecord, SplitRead, describe_run, find_runs
from trainer.runtime import storage
from trainer.runtime.errors import InputError, LeaseLostError, RecordError
from trainer.runtime.lease import hold_lease

PAST = Path(__file__).parents[2] / "past_records"


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs" / "first"))


def test_a_run_folder_knows_its_name_and_places(run, tmp_path):
    assert run.name == "first"
    assert run.path("plots", "curves.png") == str(tmp_path / "runs" / "first" / "plots" / "curves.png")
    assert run.checkpoints == run.path("checkpoints")
    assert RunFolder("s3://bucket/runs/second").name == "second"


def test_a_new_run_has_neither_record_nor_result(run):
    assert run.read_record() is None
    assert run.read_result() is None


def test_the_record_survives(run, make_config):
    record = describe_run(make_config(arch_arguments={"dropout": 0.3}), "1 node, 4 CPUs")
    run.write_record(record)
    assert run.read_record() == record


def test_the_record_says_how_the_run_was_started(make_config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--arch", "alexnet", "--run-name", "with space"])
    record = describe_run(make_config(), "1 node, 4 CPUs")
    assert record.command == "python jobs/train.py --arch alexnet --run-name 'with space'"
    assert record.hardware == "1 node, 4 CPUs"
    assert record.python == platform.python_version()
    assert record.packages["tensorflow"] == version("tensorflow")
    assert record.started.utcoffset().total_seconds() == 0


def test_the_code_version_is_the_commit_and_says_where_the_checkout_differs(make_config, monkeypatch, tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "run_folder.py"
    module.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "First")
    monkeypatch.setattr(run_folder, "__file__", str(module))
    commit = git("rev-parse", "HEAD")
    assert describe_run(make_config(), "").code_version == commit
    module.write_text("changed")
    assert describe_run(make_config(), "").code_version == f"{commit}+changes"


def test_without_a_repository_the_code_version_is_the_installed_one(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_run(make_config(), "").code_version == version("training-notes")


@pytest.mark.parametrize("content", [b"{", b'{"config": {"arch": "alexnet"}}'])
def test_a_config_of_another_program_is_refused(run, content):
    storage.write_bytes(run.path("config.json"), content)
    with pytest.raises(RecordError, match=r"config.json cannot be read: "):
        run.read_record()


def test_a_run_without_the_manifest_of_its_dataset_says_so(run):
    with pytest.raises(RecordError, match=r"dataset.json is missing"):
        run.read_manifest()


def test_the_result_survives(run, make_result, evaluation):
    result = make_result(test=evaluation, reason="the loss became nan")
    run.write_ending(result)
    assert run.read_result() == result


def test_a_result_with_a_loss_that_is_not_finite_survives(run, make_result, evaluation):
    run.write_ending(make_result(status="diverged", val=evaluation.model_copy(update={"loss": math.nan})))
    assert math.isnan(run.read_result().val.loss)


def test_an_interrupted_run_is_not_finished(run):
    run.write_interruption("interrupted", "SIGTERM")
    assert run.read_result() is None
    assert json.loads(storage.read_bytes(run.path("result.json")))["status"] == "interrupted"
    run.delete_interruption()
    assert not storage.exists(run.path("result.json"))


def test_a_run_that_was_refused_before_its_first_checkpoint_leaves_its_name_free(run, make_config):
    record = describe_run(make_config(), "1 node")
    run.write_record(record)
    assert run.read_begun_record() == record
    run.write_interruption("refused", "layer conv has other weights")
    assert run.read_begun_record() is None
    run.write_interruption("failed", "2 workers found no room")
    assert run.read_begun_record() == record


def test_a_run_that_was_refused_after_a_checkpoint_keeps_its_name(run, make_config):
    record = describe_run(make_config(), "1 node")
    run.write_record(record)
    position = checkpoints.Position(epoch=0, epoch_rows=8, step=2, global_batch_size=4, history=[])
    checkpoints.save_checkpoint(run.checkpoints, position, {})
    run.write_interruption("refused", "a file of the dataset is missing")
    assert run.read_begun_record() == record


@pytest.mark.parametrize("content", [b"{", b"{}"])
def test_a_result_of_another_program_is_refused(run, content):
    storage.write_bytes(run.path("result.json"), content)
    with pytest.raises(RecordError, match=r"result\.json"):
        run.read_result()


@pytest.mark.parametrize("name", ["a9db2b2/result.json", "e7b8c87/result.json", "e9cf8f1/interruption.json"])
def test_the_endings_of_earlier_versions_are_distinguished(run, name):
    storage.write_bytes(run.path("result.json"), (PAST / name).read_bytes())
    assert (run.read_result() is None) == ("interruption" in name)
    assert run.read_ending() is not None


@pytest.mark.parametrize(("form", "peak"), [("16922c8", 0.1 * 64 / 256), ("f4e7dc3", 0.001)])
def test_a_run_of_an_earlier_version_has_the_learning_rate_that_it_began_with(form, peak):
    record = RunRecord.parse((PAST / form / "config.json").read_bytes(), form)
    assert record.config.peak_learning_rate == pytest.approx(peak, rel=1e-12)


def test_attempts_are_counted_from_one_and_described(run):
    assert [run.start_attempt() for _ in range(3)] == [1, 2, 3]
    assert list(storage.find_files(run.path("attempts"))) == ["0001.json", "0002.json", "0003.json"]
    assert json.loads(storage.read_bytes(run.path("attempts", "0002.json")))["node"] == platform.node()


@pytest.mark.parametrize("name", [".nfs0001", "0009.json.partial", "notes.txt", "x.json"])
def test_files_of_others_are_not_counted(run, name):
    for folder in ("attempts", "test_reads", "incidents"):
        storage.write_bytes(run.path(folder, name), b"")
    assert (run.start_attempt(), run.count_test_reads(), run.read_incidents()) == (1, 0, [])
    run.record_test_read("train.py")
    run.record_recovery("a file is missing")
    assert (run.start_attempt(), run.count_test_reads(), len(run.read_incidents())) == (2, 1, 1)


def test_small_records_have_a_format(run):
    run.start_attempt()
    run.record_test_read("train.py")
    attempt = Attempt.parse(storage.read_bytes(run.path("attempts", "0001.json")), "")
    read = SplitRead.parse(storage.read_bytes(run.path("test_reads", "0001.json")), "")
    assert (attempt.pid, attempt.node, read.reader) == (os.getpid(), platform.node(), "train.py")
    for record in (attempt, read):
        assert json.loads(record.to_json())["format"] == 1


def test_incidents_are_reported_in_the_order_of_time(run):
    assert run.read_incidents() == []
    run.record_recovery("model.safetensors is missing; training goes on from step 8")
    run.record_loss("worker 0 was killed by SIGKILL")
    damage, lost = run.read_incidents()
    assert re.fullmatch(
        r"recovered at \d{4}-\d\d-\d\dT[\d:]{8}\+00:00: model.safetensors is missing; training goes on from step 8",
        str(damage),
    )
    assert str(lost) == "attempt 0 was lost: worker 0 was killed by SIGKILL"


def test_incidents_of_earlier_versions_are_read_and_completed_where_they_lie(run):
    for form, path in (("09e67bc", "losses/0001.json"), ("0202448", "recoveries/0001.json")):
        storage.write_bytes(run.path(path), (PAST / form / "incident.json").read_bytes())
    run.record_loss("worker 1 was lost")
    run.record_next_step(24)
    assert [(one.kind, one.attempt, one.next_step) for one in run.read_incidents()] == [
        ("files damaged", 0, None),
        ("workers lost", 2, 24),
        ("workers lost", 0, 24),
    ]
    assert sorted(storage.find_files(run.path("incidents"))) == ["0001.json"]


def test_an_attempt_has_a_number_that_no_checkpoint_has(run):
    position = checkpoints.Position(epoch=0, epoch_rows=8, step=2, global_batch_size=4, history=[], attempt=7)
    checkpoints.save_checkpoint(run.checkpoints, position, {})
    assert run.start_attempt() == 8


WRITES = {
    "config.json": lambda run, make_config, make_result: run.write_record(describe_run(make_config(), "")),
    "result.json": lambda run, make_config, make_result: run.write_ending(make_result()),
    "no result.json": lambda run, *_: run.delete_interruption(),
    "metrics.parquet": lambda run, *_: run.write_metrics([{"epoch": 1}]),
    "steps.parquet": lambda run, *_: run.write_steps(pa.table({"step": [1]})),
    "test_reads": lambda run, *_: run.record_test_read("train.py"),
    "any file": lambda run, *_: run.write(b"", "model.keras"),
    "an attempt": lambda run, *_: run.start_attempt(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_job_that_lost_the_run_writes_no_more(tmp_path, make_config, make_result, write):
    lease_uri = str(tmp_path / "runs" / "first" / "lease.json")
    with hold_lease(lease_uri, "run first") as lease:
        run = RunFolder(str(tmp_path / "runs" / "first"), lease)
        write(run, make_config, make_result)
        storage.delete_file(lease_uri)
        with hold_lease(lease_uri, "run first"):
            before = storage.find_files(run.uri)
            with pytest.raises(LeaseLostError, match="run first was taken over"):
                write(run, make_config, make_result)
            assert storage.find_files(run.uri) == before


def test_an_attempt_writes_no_more_when_the_next_one_has_started(run):
    stale, next_one = RunFolder(run.uri), RunFolder(run.uri)
    stale.start_attempt()
    stale.write_metrics([{"epoch": 1}])
    next_one.start_attempt()
    with pytest.raises(LeaseLostError, match="attempt 1 at run first must not write any more: attempt 2 has started"):
        stale.write_metrics([{"epoch": 2}])
    next_one.write_metrics([{"epoch": 3}])
    assert run.read_metrics() == [{"epoch": 3}]


def test_metrics_have_a_row_an_epoch_and_are_written_again(run):
    history = [{"epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)]
    run.write_metrics(history[:2])
    run.write_metrics(history)
    assert pq.read_table(run.path("metrics.parquet")).to_pylist() == history
    table = pyarrow.csv.read_csv(run.path("metrics.csv"))
    assert table.to_pylist() == history


def test_each_loss_is_kept_with_what_was_printed_and_where_the_run_went_on(run):
    run.record_loss("worker 0 was lost before its first attempt")
    run.start_attempt()
    run.record_loss("worker 1 was killed by SIGABRT", b"double free or corruption (out)")
    assert [loss.next_step for loss in run.read_incidents()] == [None, None]
    run.record_next_step(12)
    run.start_attempt()
    run.record_loss("worker 0 was killed by SIGKILL", b"Killed")
    run.record_next_step(20)
    assert [(loss.attempt, loss.what, loss.log, loss.next_step) for loss in run.read_incidents()] == [
        (0, "worker 0 was lost before its first attempt", "", 12),
        (1, "worker 1 was killed by SIGABRT", "incidents/0002.log", 12),
        (2, "worker 0 was killed by SIGKILL", "incidents/0003.log", 20),
    ]
    assert Path(run.path("incidents", "0002.log")).read_bytes() == b"double free or corruption (out)"


def test_a_loss_that_cannot_be_read_is_left_out_and_left_alone(run):
    run.record_loss("worker 0 was killed by SIGKILL")
    Path(run.path("incidents", "0001.json")).write_text('{"format": 99}')
    run.record_loss("worker 1 was killed by SIGKILL")
    run.record_next_step(4)
    assert [loss.what for loss in run.read_incidents()] == ["worker 1 was killed by SIGKILL"]
    assert Path(run.path("incidents", "0001.json")).read_text() == '{"format": 99}'


@pytest.mark.parametrize("name", ["note.md", "plots/curves.png", "checkpoints/mine.bin"])
def test_what_no_run_wrote_is_not_replaced(run, make_config, name):
    storage.write_bytes(run.path("lease.json"), b"{}")
    storage.write_bytes(run.path("dataset.json"), b"{}")
    run.check_names_are_free()
    storage.write_bytes(run.path(name), b"my own")
    with pytest.raises(InputError, match=rf"first holds {name}, which no run wrote .* another --run-name"):
        run.check_names_are_free()
    run.write_record(describe_run(make_config(), "1 node"))
    run.check_names_are_free()


def test_the_records_of_many_runs_are_read_at_once(tmp_path, make_config, monkeypatch):
    for name in ("first", "second", "third"):
        RunFolder(str(tmp_path / name)).write_record(describe_run(make_config(), "1 node"))
    read, all_of_them = storage.read_bytes, threading.Barrier(3, timeout=20)
    monkeypatch.setattr(storage, "read_bytes", lambda *place: (all_of_them.wait(), read(*place))[1])
    runs, left_out = find_runs(str(tmp_path))
    assert ([run.folder.name for run in runs], left_out) == (["first", "second", "third"], [])
