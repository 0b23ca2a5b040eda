"""A real run, then the jobs that use it: evaluate, predict, notes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import read_split, run_job, write_stripes
from trainer.inference import check_output, predict_images, request_evaluation
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder
from trainer.runtime.errors import InputError
from trainer.training.export import load_export

SMALL = ["--arch", "cnn_softmax", "--arch-argument", "first_filters=8", "--arch-argument", "dense_units=32"]
OPTIONS = ["--epochs", "2", "--global-batch-size", "16", "--precision", "float32", "--export", "saved_model"]
OPTIONS += ["--track", "tensorboard", "--evaluate-test", "--save-probabilities"]


@pytest.fixture(scope="module")
def work(run_on_cluster, tmp_path_factory) -> Path:
    """A folder with a source, a prepared dataset and a finished run."""
    folder = tmp_path_factory.mktemp("work")
    write_stripes(folder / "source", images_per_class=30)
    prepared = run_on_cluster("prepare.py", "source", "dataset", "--image-size", "24", cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    trained = run_job("train.py", *SMALL, "--dataset", "dataset", "--run-name", "first", *OPTIONS, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    return folder


def test_evaluation_repeats_the_runs_own_numbers_exactly(run_on_cluster, work):
    finished = run_on_cluster("evaluate.py", "runs/first", cwd=work)
    assert finished.returncode == 0, finished.stderr
    assert "exactly as recorded" in finished.stdout
    result = json.loads((work / "runs/first/result.json").read_text())
    (written,) = (work / "runs/first/evaluations").glob("val-*.json")
    assert json.loads(written.read_text()) == result["val"]


def test_each_prediction_is_traced_to_its_file(work):
    folder = work / "runs/first"
    predictions = pq.read_table(folder / "predictions.parquet").to_pylist()
    val = read_split(work / "dataset", "val").to_dict("records")
    names, result = ["across", "down", "slanted"], json.loads((folder / "result.json").read_text())
    assert len(predictions) == len(val)
    for row, image in zip(predictions, val, strict=True):
        assert (row["path"], row["label"]) == (image["path"], names[image["label"]])
        assert row["sha256"] == hashlib.sha256((work / "source" / row["path"]).read_bytes()).hexdigest()
        assert row["confidence"] == pytest.approx(max(row["probabilities"]), rel=1e-4)
        assert row["predicted"] == names[int(np.argmax(row["probabilities"]))]
    assert np.mean([row["loss"] for row in predictions]) == pytest.approx(result["val"]["loss"], rel=1e-5)
    losses = pq.read_table(folder / "metrics.parquet")["val_loss"].to_pylist()
    assert np.mean([row["mean_loss"] for row in predictions]) == pytest.approx(np.mean(losses), rel=1e-5)
    wrong = [number for number, row in enumerate(predictions) if row["label"] != row["predicted"]]
    assert pq.read_table(folder / "thumbnails.parquet")["row"].to_pylist() == wrong
    (evaluated,) = (folder / "evaluations").glob("val-*.parquet")
    columns = ["path", "sha256", "label", "predicted", "confidence", "loss"]
    assert (
        pq.read_table(evaluated).to_pylist()
        == pq.read_table(folder / "predictions.parquet", columns=columns).to_pylist()
    )


def test_reading_the_test_split_again_is_counted(work):
    finished = run_job("evaluate.py", "runs/first", "--split", "test", "--json", cwd=work)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((work / "runs/first/result.json").read_text())
    assert json.loads(finished.stdout) == result["test"]
    assert len(list((work / "runs/first/test_reads").iterdir())) == 2


def test_predictions_have_a_row_an_image_and_bad_ones_their_reason(run_on_cluster, resources, work):
    shutil.copytree(work / "source", work / "new")
    (work / "new" / "down" / "broken.png").write_bytes((work / "new" / "down" / "000.png").read_bytes()[:200])
    shutil.copy(work / "new" / "across" / "000.png", work / "new" / "loose.png")
    output = work / "predicted"
    output.mkdir()
    for name in ("predictions-00007.parquet", "_summary.json", "_notes.txt"):
        (output / name).write_text("old")
    with pytest.raises(InputError, match=r"predicted is not empty.*--overwrite"):
        check_output(str(output))
    missing = run_on_cluster("predict.py", "runs/first", "new/missing.png", "predicted", "--overwrite", cwd=work)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "new/missing.png: no files found" in missing.stderr
    assert (output / "_summary.json").exists()
    (work / "new" / "down" / "Thumbs.db").touch()
    finished = run_on_cluster("predict.py", "runs/first", "new", "predicted", "--overwrite", cwd=work)
    assert finished.returncode == 0, finished.stderr
    assert "91 of 92 images predicted, 1 not decoded (damaged: 1)" in finished.stdout
    assert "92 files to read, 3 classes; ignored: 1 Thumbs.db" in finished.stderr
    rows = {row["path"]: row for row in pq.read_table(output).to_pylist()}
    broken = rows.pop("down/broken.png")
    assert (broken["error"], broken["predicted"], broken["probabilities"]) == ("damaged", None, None)
    loose = rows.pop("loose.png")
    assert loose["label"] is None
    assert loose["probabilities"] == pytest.approx(rows["across/000.png"]["probabilities"], abs=1e-6)
    assert len(rows) == 90
    for path, row in rows.items():
        assert row["label"] == path.partition("/")[0]
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["confidence"] == max(row["probabilities"])
    summary = json.loads((output / "_summary.json").read_text())
    assert (summary["images"], summary["labelled"], summary["rejected"]) == (92, 90, {"damaged": 1})
    assert summary["correct"] == sum(row["label"] == row["predicted"] for row in rows.values())
    assert summary["parts"].pop("new") == {"images": 1, "labelled": 0, "correct": 0}  # the broken one
    found = [*(row["split"] for row in rows.values()), loose["split"]]
    assert {name: part["images"] for name, part in summary["parts"].items()} == Counter(found)
    assert summary["parts"].keys() == {"train", "val", "test"}
    assert "the network was trained on them" in finished.stdout
    assert {path.name for path in output.iterdir()} == {"predictions-00000.parquet", "_summary.json", "_notes.txt"}


_LOAD = """
import sys, numpy, tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
answer = serve(images=tf.constant(numpy.load(sys.argv[2])))
assert "tf_keras" not in sys.modules
numpy.savez(sys.argv[3], scores=answer["scores"], label=answer["label"].numpy().astype(str))
"""


def test_plain_tensorflow_loads_the_saved_model(work, tmp_path):
    np.save(tmp_path / "images.npy", np.stack(read_split(work / "dataset", "val")["image"]))
    places = [str(work / "runs/first/saved_model"), str(tmp_path / "images.npy"), str(tmp_path / "answer.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    subprocess.run([sys.executable, "-c", _LOAD, *places], check=True, env=environment, capture_output=True)
    answer, recorded = np.load(tmp_path / "answer.npz"), RunFolder(str(work / "runs/first")).read_predictions()
    np.testing.assert_allclose(answer["scores"].max(axis=1), recorded["confidence"], rtol=1e-4)
    np.testing.assert_array_equal(answer["label"], recorded["predicted"])


def test_a_run_is_explained_and_each_method_is_tested(work):
    finished = run_job("explain.py", "runs/first", "--count", "2", "--tested-images", "8", cwd=work)
    assert finished.returncode == 0, finished.stderr
    assert "grad_cam: blanking the quarter of the image that it marks lowers" in finished.stdout
    assert len(finished.stdout.splitlines()) == 5
    folder = work / "runs/first/explanations"
    assert {"report.html", "image-001.png", "filters of the first convolution.png"} <= set(os.listdir(folder))
    page = (folder / "report.html").read_text()
    worst = max(RunFolder(str(folder.parent)).read_predictions().to_pylist(), key=lambda row: row["loss"])["path"]
    assert f"{worst}: " in page
    assert "http" not in page
    picture = ["--images", str(work / "source" / "down" / "000.png")]
    wrong = run_job("explain.py", "runs/first", *picture, "--method", "shap", "--output", "explained", cwd=work)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --method 'shap' is unknown; choose from grad_cam, integrated_gradients, smooth_grad, occlusion\n",
    )


def test_a_run_that_is_not_there_is_refused(work):
    for job in (["evaluate.py", "runs/none"], ["predict.py", "runs/none", "source", "out"]):
        finished = run_job(*job, cwd=work)
        assert finished.returncode == 2
        assert "RUN runs/none is not a run" in finished.stderr


@pytest.fixture
def copied_run(work, tmp_path) -> Path:
    return shutil.copytree(work / "runs" / "first", tmp_path / "copied")


def test_a_run_without_its_weights_is_refused(resources, work, copied_run):
    shutil.rmtree(copied_run / "checkpoints")
    with pytest.raises(InputError, match="checkpoints has no complete checkpoint step-"):
        request_evaluation(str(copied_run), "val", str(work / "dataset"))
    with pytest.raises(InputError, match="checkpoints has no complete checkpoint step-"):
        predict_images(None, 0, str(copied_run), str(copied_run / "out"), resources)


def test_a_model_file_of_somebody_else_is_not_opened(copied_run):
    # HDF5 instead of a zip: Keras would run the code of a Lambda layer in it.
    (copied_run / "model.keras").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert load_export(RunFolder(str(copied_run))).name == "cnn_softmax"


def test_a_dataset_that_is_not_the_runs_own_any_more_is_refused(resources, copied_run):
    manifest = RunFolder(str(copied_run)).read_manifest()
    RunFolder(str(copied_run)).write_manifest(manifest.model_copy(update={"fingerprint": "f00d"}))
    with pytest.raises(InputError, match=r"was prepared again after .* --dataset"):
        request_evaluation(str(copied_run), "val")


@pytest.mark.parametrize("field", ["class_names", "image_size", "channels"])
def test_a_dataset_that_does_not_fit_the_run_is_refused(resources, work, copied_run, field):
    manifest = RunFolder(str(copied_run)).read_manifest()
    other = {"class_names": ["up", "down", "slanted"], "image_size": 32, "channels": 3}[field]
    RunFolder(str(copied_run)).write_manifest(manifest.model_copy(update={field: other}))
    with pytest.raises(InputError, match=f"dataset has {field} .*they must agree"):
        request_evaluation(str(copied_run), "val", str(work / "dataset"))


def test_weights_that_are_damaged_are_refused_by_the_worker(copied_run):
    best = checkpoints.find_best(RunFolder(str(copied_run)).checkpoints)
    weights = copied_run / "checkpoints" / best.name / checkpoints.MODEL_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    finished = run_job("evaluate.py", str(copied_run))
    assert finished.returncode == 2
    assert re.fullmatch(r"error: .*model\.safetensors is damaged: .*; to continue from .*\n", finished.stderr)


def test_notes_and_report_are_made_of_the_run(work):
    finished = run_job("notes.py", "runs", cwd=work)
    assert finished.returncode == 0, finished.stderr
    assert "#### cnn_softmax: first" in (work / "runs" / "NOTES.md").read_text()
    assert "first" in (work / "runs" / "report.html").read_text()
    assert {path.name for path in (work / "runs/first/plots").iterdir()} == {
        "curves.png",
        "confusion.png",
        "gradients.png",
        "mistakes.png",
    }
    assert list((work / "runs/first/tensorboard").iterdir())
