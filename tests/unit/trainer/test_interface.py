"""What `import trainer` offers, and the notebook of the documents that uses it."""

import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

import trainer
from tests.conftest import REPOSITORY
from trainer.config.request import parse_request
from trainer.record.run_folder import RunFolder, describe_run
from trainer.runtime import storage
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import EmbeddedDatasetChosen, Event, TasksFinished


@pytest.fixture
def run(trained_run) -> trainer.Run:
    """A finished run with two epochs of metrics."""
    rows = [{"epoch": epoch, "step": 10 * epoch, "loss": 1 / epoch, "val_loss": 1.5 / epoch} for epoch in (1, 2)]
    trained_run.write_metrics([{**row, "accuracy": 0.5, "val_accuracy": 0.4} for row in rows])
    trained_run.write(b"### a note\n", "note.md")
    return trainer.load_run(trained_run.uri)


def test_importing_it_loads_neither_ray_nor_tensorflow():
    check = (
        "import sys, trainer; sys.exit(str(sorted({'ray', 'tensorflow', 'tf_keras', 'pandas'} & sys.modules.keys())))"
    )
    read = "import sys, trainer; trainer.load_run; sys.exit(str(sorted({'ray', 'tensorflow'} & sys.modules.keys())))"
    for code in (check, read):
        assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True).stderr == "[]\n"


def test_it_offers_what_it_lists():
    for name in trainer.__all__:
        assert callable(getattr(trainer, name))
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'fit'"):
        trainer.fit  # noqa: B018
    assert (trainer.InputError, trainer.JobError) == (InputError, JobError)


def test_the_history_of_a_run_has_a_row_for_each_epoch(run):
    assert run.history[["epoch", "val_loss"]].to_numpy().tolist() == [[1, 1.5], [2, 0.75]]


def test_predictions_have_the_names_of_classes(run):
    frame = run.predictions
    assert set(frame["label"]) <= set(run.class_names)
    assert set(frame["predicted"]) == {run.class_names[0]}
    assert frame["correct"].tolist() == [label == run.class_names[0] for label in frame["label"]]
    assert frame["loss"].tolist() == [0.2, 0.9, 0.1, 0.7, 0.3]


def test_a_run_tells_its_config_result_and_note(run):
    assert (run.config.arch, run.status, run.note) == ("cnn_softmax", "completed", "### a note\n")
    assert repr(run) == f"<Run {run.uri}: cnn_softmax, {run.result.val}>"


def test_the_model_of_a_run_takes_pixels_and_returns_scores(run):
    images = np.random.default_rng(0).integers(0, 256, (4, 22, 22, 1), np.uint8)
    scores = run.model().predict_on_batch(images)
    assert scores.shape == (4, 3)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)


def test_a_run_that_is_not_finished_says_what_it_lacks(tmp_path, make_config):
    folder = RunFolder(str(tmp_path / "second"))
    folder.write_record(describe_run(make_config(), "1 node"))
    run = trainer.load_run(folder.uri)
    assert (run.result, run.status) == (None, "not finished")
    assert run.history.empty
    assert repr(run) == f"<Run {folder.uri}: cnn_softmax, not finished>"
    for read in (lambda: run.note, lambda: run.steps, lambda: run.predictions, run.model):
        with pytest.raises(InputError, match=f"RUN {folder.uri} "):
            read()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run: it has no"):
        trainer.load_run(str(tmp_path))


def test_all_runs_of_a_storage_are_loaded_and_what_cannot_be_read_is_left_out(run):
    storage_uri = storage.parent(run.uri)
    storage.write_bytes(storage.join(storage_uri, "broken", "config.json"), b"{")
    assert [one.uri for one in trainer.load_runs(storage_uri)] == [run.uri]


def test_training_takes_the_options_of_the_command_line(run, monkeypatch):
    folder = RunFolder(run.uri)
    record = folder.read_record()
    folder.write_record(record.model_copy(update={"config": record.config.model_copy(update={"global_batch_size": 4})}))
    # A finished run is returned as it is, after all checks.
    given = {"config": folder.path("config.json"), "storage": storage.parent(run.uri), "run_name": "first"}
    assert trainer.train(**given, on_event=lambda event: None).uri == run.uri
    with pytest.raises(InputError, match=r"run first .* was started with another config \(seed: 0 -> 7\)"):
        trainer.train(**given, seed=7)
    with pytest.raises(InputError, match="option 'epoch' is unknown; did you mean 'epochs'"):
        trainer.train(**given, epoch=7)
    with pytest.raises(InputError, match="--track 'paper' is unknown"):
        trainer.train(**given, track=["paper"])


@pytest.mark.parametrize(("given", "added"), [("", " --run-name {}"), ("first", "")])
def test_a_run_that_got_its_name_here_says_how_it_continues(write_dataset, tmp_path, monkeypatch, given, added):
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--arch", "cnn_softmax"])
    options = {"arch": "cnn_softmax", "global_batch_size": 4, "precision": "float32"}
    request = parse_request({**options, "dataset": write_dataset(image_size=22).uri})

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.interface.train_request(request, str(tmp_path / "runs"), given, on_event=stop)
    (run,) = trainer.load_runs(str(tmp_path / "runs"))
    added = added.format(storage.basename(run.uri))
    assert getattr(stopped.value, "__notes__", []) == ([f"with{added}"] if added else [])
    assert RunFolder(run.uri).read_record().command == f"python jobs/train.py --arch cnn_softmax{added}"


def test_preparing_returns_the_manifest_of_what_is_there(write_dataset):
    with pytest.raises(InputError, match="--image-size 0: Input should be greater than or equal to 1"):
        trainer.prepare("images", "prepared", image_size=0)
    written = write_dataset(image_size=5)
    assert trainer.prepare("/photos", written.uri, image_size=5) == written.manifest


@pytest.mark.parametrize("verbose", [False, True])
def test_the_statistics_of_ray_data_are_shown_on_request(monkeypatch, capsys, tmp_path, verbose):
    def prepare(*arguments, on_event, **options):
        on_event(TasksFinished("decode", "Operator 1 Map: 2 tasks\n* Remote wall time: 1s\n"))
        on_event(EmbeddedDatasetChosen("mnist"))

    monkeypatch.setattr("data_prep.prepare.check_places", lambda *arguments, **options: "nothing")
    monkeypatch.setattr("data_prep.prepare.prepare", prepare)
    trainer.prepare("images", str(tmp_path), verbose=verbose)
    logged = capsys.readouterr().err
    assert ("decode: statistics of Ray Data\n  Operator 1 Map: 2 tasks\n  * Remote wall time" in logged) == verbose
    assert "training on the embedded 5,000 MNIST digits" in logged


def run_notebook(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()


SHOWN = """
from trainer.runtime.console import show_events
from trainer.runtime.events import StageProgressed, StudyTrialEnded
with show_events() as show:
    show(StageProgressed("a<b", 1, 2))
    show(StudyTrialEnded("trial-0001", "306 of 310"))
    show(StageProgressed("a<b", 2, 2))
"""


def test_the_notebook_of_the_documents_reads_and_draws_and_progress_is_shown_in_place(run):
    notebook = nbformat.read(REPOSITORY / "docs" / "runs.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    notebook.cells.append(nbformat.v4.new_code_cell(SHOWN))
    executed = run_notebook(notebook, Path(run.uri).parents[1])
    *cells, last = [cell for cell in executed.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    bar, line = last.outputs
    assert bar["data"]["text/html"] == '<progress value="2" max="2"></progress> a&lt;b: 2 of 2'
    assert line["text"] == "trial-0001 306 of 310\n"
