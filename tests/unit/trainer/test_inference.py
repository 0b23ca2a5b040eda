"""Evaluations and predictions of a finished run, also of another user's."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.explain import page as explain
from trainer.inference import (
    PartCount,
    _count,
    _evaluate,
    _find_known_files,
    _name_splits,
    _Predictor,
    _record_test_read,
    check_output,
    describe_test_reads,
    read_finished_run,
    request_evaluation,
    save_evaluation,
)
from trainer.notes.report import write_notes_and_report
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder, describe_run
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training.dataset import KnownFiles, open_split
from trainer.training.export import load_export


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
    """The run as seen by a user who may only read it."""
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


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_an_evaluation_replaces_its_own_files_and_no_others(run, tmp_path, evaluation, suffix):
    request = request_evaluation(run.uri, "val", output=str(tmp_path / "out"))
    save_evaluation(request, evaluation, pa.table({"label": [1]}))
    request_evaluation(run.uri, "val", output=str(tmp_path / "out"))
    storage.write_bytes(str(tmp_path / "other" / f"{request.name}.{suffix}"), b"mine")
    with pytest.raises(InputError, match=rf"{suffix} was not written by this job .* another folder with --output"):
        request_evaluation(run.uri, "val", output=str(tmp_path / "other"))


def test_reading_the_test_split_of_an_own_run_is_counted_in_the_run(run, public):
    request = request_evaluation(run.uri, "test", output=str(public / "out"))
    _record_test_read(request)
    assert describe_test_reads(request) == "the test split has been read 1 time for this run"


def test_predictions_go_to_an_empty_place_or_replace_others_when_asked(public):
    output = public / "out"
    assert check_output(str(output)) == str(output)
    (output / "predictions-00000.parquet").write_text("of an interrupted job")
    assert check_output(str(output)) == str(output)
    (output / "_summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"OUTPUT .* is not empty; .*--overwrite"):
        check_output(str(output))
    assert check_output(str(output), overwrite=True) == str(output)
    assert sorted(os.listdir(output)) == ["_summary.json", "predictions-00000.parquet"]


def test_what_is_no_finished_run_is_refused(tmp_path, make_config):
    with pytest.raises(InputError, match=r"RUN .*none is not a run: it has no config.json; give a folder that"):
        read_finished_run(str(tmp_path / "none"))
    begun = RunFolder(str(tmp_path / "begun"))
    begun.write_record(describe_run(make_config(), "1 node"))
    with pytest.raises(InputError, match=r"RUN .*begun is not finished: it has no result.json; run its command"):
        read_finished_run(begun.uri)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 24}, "has image_size 24, the run was trained with 22; they must agree"),
        ({"channels": 3}, "has channels 3, the run was trained with 1; they must agree"),
        ({"class_names": ["cat", "dog", "owl"]}, "class 2 is 'owl', not 'eel'; they must agree"),
    ],
)
def test_a_dataset_that_does_not_match_the_run_is_refused(trained_run, tmp_path, change, message):
    other = trained_run.read_manifest().model_copy(update=change)
    storage.write_bytes(str(tmp_path / "other" / "manifest.json"), other.model_dump_json().encode())
    with pytest.raises(InputError, match=message):
        request_evaluation(trained_run.uri, "val", str(tmp_path / "other"))


def test_a_dataset_that_was_prepared_again_is_refused(trained_run):
    uri = trained_run.read_record().config.dataset
    again = trained_run.read_manifest().model_copy(update={"fingerprint": "beef"})
    storage.write_bytes(storage.join(uri, "manifest.json"), again.model_dump_json().encode())
    with pytest.raises(InputError, match=r"was prepared again after .* give it as --dataset"):
        request_evaluation(trained_run.uri, "val")
    assert request_evaluation(trained_run.uri, "val", uri).manifest.fingerprint == "beef"


def test_an_evaluation_has_a_row_for_each_image_as_the_export_predicts_it(trained_run):
    request = request_evaluation(trained_run.uri, "val")
    rows = open_split(request.dataset, request.manifest, "val")
    predictions, sources = _evaluate(request)
    scores = load_export(trained_run).predict_on_batch(rows.take(np.arange(len(rows))))
    assert predictions["label"].to_pylist() == list(rows.labels)
    assert predictions["predicted"].to_pylist() == list(scores.argmax(axis=1))
    np.testing.assert_allclose(predictions["confidence"], scores.max(axis=1), atol=1e-5)
    assert sources["path"].to_pylist() == [f"val/{row}.png" for row in range(len(rows))]


def test_an_image_that_cannot_be_decoded_has_no_prediction(trained_run):
    images = np.random.default_rng(0).integers(0, 256, (2, 22, 22, 1), np.uint8)
    batch = {"image": images, "path": np.array(["a.png", "b.png"]), "label": np.array(["cat", ""])}
    batch["sha256"] = np.array([b"aa", b"bb"], np.object_)
    table = _Predictor(trained_run.uri, ["cat", "dog", "eel"])({**batch, "error": np.array(["", "damaged"])})
    scores = load_export(trained_run).predict_on_batch(images)[0]
    first, second = table.to_pylist()
    assert first["predicted"] == ["cat", "dog", "eel"][scores.argmax()]
    np.testing.assert_allclose(first.pop("probabilities"), scores, atol=1e-6)
    assert (first["path"], first["label"], first["sha256"], first["error"]) == ("a.png", "cat", b"aa", None)
    assert second == {
        "path": "b.png",
        "label": None,
        "sha256": b"bb",
        "predicted": None,
        "confidence": None,
        "probabilities": None,
        "error": "damaged",
    }


def test_images_are_known_by_the_hash_of_their_file_and_counted_by_split():
    columns = {"label": ["cat", "dog", "cat", None, "owl", "dog"], "sha256": [b"a", b"a", b"b", b"c", b"d", b"e"]}
    table = pa.table({**columns, "predicted": ["cat", "cat", "cat", "cat", "cat", None]})
    named = _name_splits(table, KnownFiles(np.array([b"a", b"b", b"c"], "S32"), np.array([0, 2, 1], np.int8)))
    assert named["split"].to_pylist() == ["train", "train", "test", "val", None, None]
    assert "sha256" not in named.column_names
    whole, parts = PartCount(), {name: PartCount() for name in ("new", "test", "val", "train")}
    _count(named, {"cat", "dog"}, whole, parts)
    assert whole == PartCount(images=6, labelled=3, correct=2)
    assert parts == {
        "new": PartCount(images=2),  # of another class, and not decoded
        "test": PartCount(images=1, labelled=1, correct=1),
        "val": PartCount(images=1),  # without a label
        "train": PartCount(images=2, labelled=2, correct=1),
    }
    again = PartCount()
    _count(named, {"cat", "dog"}, again, {})
    assert again == whole


def test_whether_images_are_known_is_not_said_without_the_dataset_of_the_run(trained_run):
    config = trained_run.read_record().config
    known, reason = _find_known_files(config)
    assert (np.bincount(known.splits).tolist(), reason) == ([6, 5, 3], "")
    other = config.model_copy(update={"dataset_fingerprint": "beef"})
    assert _find_known_files(other)[1].endswith("was prepared again after the run was trained on it")
    shutil.rmtree(config.dataset)
    known, reason = _find_known_files(config)
    assert (known.digests.tolist(), "holds no prepared dataset" in reason) == ([], True)
