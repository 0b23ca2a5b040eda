"""Runs that belong to somebody else: what may not be written is known before anything is computed."""

import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from trainer.explain import page as explain
from trainer.inference import (
    _record_test_read,
    check_output,
    describe_test_reads,
    request_evaluation,
    save_evaluation,
)
from trainer.notes.report import write_notes_and_report
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder, describe_run
from trainer.runtime.errors import InputError


@pytest.fixture
def public():
    """A folder with runs/first, which is finished, its dataset, and a folder out: all can be read, out written."""
    # Not in tmp_path, which is closed to all but its owner, and nothing is closed to root.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, "out").mkdir()
        Path(folder, "out").chmod(0o777)
        yield Path(folder)


@pytest.fixture
def run(public, write_dataset, make_config, make_result):
    """A finished run."""
    written = write_dataset(rows=(7, 4, 3))
    dataset = shutil.copytree(written.uri, public / "dataset")
    run = RunFolder(str(public / "runs" / "first"))
    run.write_manifest(written.manifest)
    run.write_record(describe_run(make_config(dataset=str(dataset)), "1 node"))
    row = {"epoch": 7, "val_accuracy": 1.0, "val_loss": 0.1}
    position = checkpoints.Position(epoch=7, epoch_rows=0, step=70, global_batch_size=4, history=[row])
    checkpoints.save_checkpoint(run.checkpoints, position, {})
    run.write_ending(make_result())
    return run


@pytest.fixture
def others_run(public, run):
    """That run for one who may only read it."""
    folders = (public / "runs", public / "runs" / "first")
    for folder in folders:
        folder.chmod(0o555)
    user = os.geteuid()
    os.seteuid(user or 65534)
    yield run
    os.seteuid(user)
    for folder in folders:
        folder.chmod(0o755)


def test_what_would_be_written_into_a_run_that_may_only_be_read_is_refused_at_once(others_run):
    refused = r"Permission denied; .*a job must be able to write a file there; or give another place with --output"
    with pytest.raises(InputError, match=rf"first/evaluations: {refused}"):
        request_evaluation(others_run.uri, "val")
    with pytest.raises(InputError, match=rf"first/explanations: {refused}"):
        explain.check_output(others_run.uri, "")
    with pytest.raises(InputError, match=rf"runs: {refused}"):
        write_notes_and_report(str(Path(others_run.uri).parent))
    with pytest.raises(InputError, match=r"first/predicted: Permission denied; .*able to write a file there$"):
        check_output(f"{others_run.uri}/predicted")


def test_a_run_that_may_only_be_read_is_evaluated_to_another_place(others_run, public, evaluation):
    request = request_evaluation(others_run.uri, "test", output=str(public / "out"))
    _record_test_read(request)
    save_evaluation(request, evaluation, pa.table({"label": [1]}))
    name = f"test-{request.manifest.fingerprint[:12]}"
    written = {path.relative_to(public / "out").as_posix() for path in (public / "out").rglob("*") if path.is_file()}
    assert written == {f"{name}.json", f"{name}.parquet", "test_reads/0001.json"}
    assert describe_test_reads(request) == (
        f"the test split has been read 0 times for this run, and 1 time more as recorded in {public / 'out'}, "
        "because the run is read-only"
    )
    assert explain.check_output(others_run.uri, str(public / "out")) == str(public / "out")
    written, _ = write_notes_and_report(str(public / "runs"), str(public / "out"))
    assert [Path(uri).name for uri in written] == ["NOTES.md", "report.html"]


def test_reading_the_test_split_of_an_own_run_is_counted_in_the_run(run, public):
    request = request_evaluation(run.uri, "test", output=str(public / "out"))
    _record_test_read(request)
    assert describe_test_reads(request) == "the test split has been read 1 time for this run"


def test_predictions_go_to_an_empty_place_or_replace_others_when_told(public):
    output = public / "out"
    assert check_output(str(output)) == str(output)
    (output / "predictions-00000.parquet").write_text("of an interrupted job")
    assert check_output(str(output)) == str(output)
    (output / "_summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"OUTPUT .* is not empty; .*--overwrite"):
        check_output(str(output))
    assert check_output(str(output), overwrite=True) == str(output)
    assert sorted(os.listdir(output)) == ["_summary.json", "predictions-00000.parquet"]
