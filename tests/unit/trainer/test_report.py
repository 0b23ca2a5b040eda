import html.parser
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from trainer import storage
from trainer.checkpoint import PREDICTIONS_NAME, Position, save_checkpoint
from trainer.errors import InputError
from trainer.report import write_notes_and_report
from trainer.run_folder import RunFolder, describe_run


class _Page(html.parser.HTMLParser):
    """Collects what a page loads, its text and its open elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.text, self.data, self.lines, self._element = [], "", "", 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._element = (tag, dict(attributes).get("id"))
        self.lines += tag == "polyline"
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                self.loaded.append(value)

    def handle_data(self, data):
        if self._element == ("script", "data"):
            self.data += data
        else:
            self.text += data


@pytest.fixture
def write_run(tmp_path, make_config, make_result, write_dataset):
    """Returns a function that writes a finished run, or one that has only begun."""
    manifest = write_dataset().manifest

    def write(name: str, right: int = 51, finished: bool = True, **values) -> RunFolder:
        run = RunFolder(str(tmp_path / "runs" / name))
        run.write_manifest(manifest)
        run.write_record(describe_run(make_config(clip_norm=1.0, **values), "1 node"))
        if finished:
            row = {"epoch": 1.0, "loss": 1.0, "accuracy": 0.5, "val_loss": 1.1, "val_accuracy": right / 66}
            history = [row | {"epoch": float(epoch), "images_per_second": 90.0} for epoch in (1, 2, 3)]
            predicted = [0] * right + [1] * (66 - right)
            predictions = storage.parquet_bytes(pa.table({"label": [0] * 66, "predicted": predicted}))
            position = Position(epoch=3, epoch_rows=0, step=12, global_batch_size=4, history=history)
            save_checkpoint(run.checkpoints, position, {PREDICTIONS_NAME: predictions})
            run.write_metrics(history)
            run.write_steps(pa.table({"step": range(1, 13), "grad_norm": np.geomspace(0.1, 9, 12)}))
            picture = io.BytesIO()
            Image.new("RGB", (900, 300), "red").save(picture, "PNG")
            storage.write_bytes(run.path("plots", "mistakes.png"), picture.getvalue())
            run.write_ending(make_result(findings=["overfitting: <b>less</b>"]))
        return run

    return write


def read_report(tmp_path) -> _Page:
    return _Page((tmp_path / "out" / "report.html").read_text())


def write_report(tmp_path) -> _Page:
    write_notes_and_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    return read_report(tmp_path)


def test_the_page_needs_nothing_from_outside(write_run, tmp_path):
    write_run("first")
    page = write_report(tmp_path)
    assert page.loaded
    assert all(one.startswith(("#", "data:image/")) for one in page.loaded)


def test_every_run_is_there_with_k_of_n_and_its_curves(write_run, tmp_path):
    write_run("first")
    write_run("second", finished=False)
    page = write_report(tmp_path)
    assert "loss: 0.9315 - accuracy: 0.7727 (51 of 66, 95% interval 0.658-0.857)" in page.text
    assert "not finished" in page.text
    # Train and validation in two charts, the gradient norm and where it is clipped in a third.
    assert page.lines == 6
    assert (tmp_path / "out" / "NOTES.md").read_text().count("#### cnn_softmax: ") == 2


def test_names_cannot_become_markup(write_run, tmp_path):
    write_run("first", arch_arguments={"</script><script>alert(1)": 1})
    page = write_report(tmp_path)
    assert "overfitting: <b>less</b>" in page.text
    assert "</script><script>alert(1)" in json.loads(page.data)["runs"][0]["config"]["arch_arguments"]


def test_each_pair_on_the_same_dataset_has_a_verdict(write_run, tmp_path):
    write_run("first", right=51)
    write_run("second", right=60, seed=1)
    write_run("third", dataset_fingerprint="beef")
    verdicts = json.loads(write_report(tmp_path).data)["verdicts"]
    assert verdicts.keys() == {"0,1", "0,2", "1,2"}
    assert verdicts["0,1"].startswith("second is better than first on 66 images")
    assert verdicts["0,2"].startswith("trained and validated on different datasets")


def test_a_storage_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no runs"):
        write_notes_and_report(str(tmp_path), str(tmp_path))
