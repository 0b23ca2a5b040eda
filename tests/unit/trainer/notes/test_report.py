import html.parser
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from trainer.notes.report import write_notes_and_report
from trainer.record.checkpoint import PREDICTIONS_NAME, Position, save_checkpoint
from trainer.record.evaluation_result import summarise
from trainer.record.run_folder import RunFolder, describe_run
from trainer.runtime import storage
from trainer.runtime.errors import InputError


class _Page(html.parser.HTMLParser):
    """Collect what a page loads, its text and its open elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.text, self.data, self._element = [], "", "", ("", None)
        # Of each chart, by its name: the names of its lines, and their points in the order in which they are drawn.
        self.names, self.charts, self.tables = {}, {}, []
        self._keys: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self._element = (tag, values.get("id") or values.get("class"))
        if tag == "svg":
            self._chart = values["aria-label"]
            self.names[self._chart], self._keys, self.charts[self._chart] = self._keys, [], []
        if tag == "polyline":
            points = [tuple(map(float, point.split(","))) for point in values["points"].split()]
            self.charts[self._chart].append((values.get("class"), points))
        if tag == "table":
            self.tables.append([])
        if tag == "tr" and self.tables:
            self.tables[-1].append([])
        if tag in ("td", "th") and self.tables:
            self.tables[-1][-1].append("")
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                self.loaded.append(value)

    def handle_data(self, data):
        if self._element == ("script", "data"):
            self.data += data
            return
        self.text += data
        if self._element[0] == "span" and (self._element[1] or "").startswith("key") and data.strip():
            self._keys.append(data)
        if self._element[0] in ("td", "th") and data.strip():
            self.tables[-1][-1][-1] += data


@pytest.fixture
def write_run(tmp_path, make_config, make_result, write_dataset):
    """Return a function that writes a finished run, or one that has only begun."""
    manifest = write_dataset().manifest

    def write(name: str, right: int = 51, finished: bool = True, **values) -> RunFolder:
        run = RunFolder(str(tmp_path / "runs" / name))
        run.write_manifest(manifest)
        run.write_record(describe_run(make_config(clip_norm=1.0, **values), "1 node"))
        if finished:
            columns = {"epoch": (1.0, 2.0, 3.0), "loss": (3.0, 2.0, 1.0), "val_loss": (5.0, 2.5, 2.0)}
            columns |= {"accuracy": (0.2, 0.4, 0.8), "val_accuracy": (0.1, 0.3, 0.6), "images_per_second": (90.0,) * 3}
            history = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
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
    # One curve each of loss and accuracy of train and validation, and the gradient norm with where it is clipped.
    assert [len(lines) for lines in page.charts.values()] == [2, 2, 2]
    assert (tmp_path / "out" / "NOTES.md").read_text().count("#### cnn_softmax: ") == 2


def test_the_curves_stand_where_their_values_are(write_run, tmp_path):
    write_run("first")
    page = write_report(tmp_path)
    loss, accuracy, norm = page.charts
    # 300 wide and 120 high; 0 is on top, where the largest value is.
    assert page.charts[loss] == [
        (None, [(0, 60), (150, 90), (300, 120)]),
        ("second", [(0, 0), (150, 75), (300, 90)]),
    ]
    assert page.charts[accuracy] == [
        (None, [(0, 102.9), (150, 68.6), (300, 0)]),
        ("second", [(0, 120), (150, 85.7), (300, 34.3)]),
    ]
    assert (loss, accuracy) == ("loss of first, from 1 to 5", "accuracy of first, from 0.1 to 0.8")
    assert page.names[loss] == page.names[accuracy] == ["train", "val"]
    assert norm == "gradient norm, unclipped of first, from 0.1 to 9"
    (_, norms), (_, clipped) = page.charts[norm]
    assert [y for _, y in norms] == sorted((y for _, y in norms), reverse=True)
    assert (norms[0], norms[-1]) == ((0, 120), (300, 0))
    # A norm of 1 of 0.1 to 9, in powers of ten.
    assert {y for _, y in clipped} == {58.6}
    assert page.names[norm] == ["norm", "clipped to"]


def test_the_rows_of_the_confusion_matrix_are_true_classes(write_run, tmp_path):
    write_run("first")
    *_, matrix = write_report(tmp_path).tables
    assert matrix == [
        ["", "cat", "dog", "eel", "correct"],
        ["cat", "22", "", "", "22 of 22"],
        ["dog", "2", "20", "", "20 of 22"],
        ["eel", "", "13", "9", "9 of 22"],
    ]


def test_a_run_of_many_classes_has_the_most_confused_and_the_weakest(write_run, tmp_path, make_result):
    run = write_run("first")
    labels = np.arange(1000).repeat(3)
    predicted = labels.copy()
    predicted[-3:] = 7
    columns = {"label": labels, "predicted": predicted, "likelier": np.int32(labels != predicted)}
    columns |= {"loss": np.ones(3000), "confidence": np.ones(3000)}
    run.write_ending(make_result(val=summarise("val", pa.table(columns), [f"class {label}" for label in range(1000)])))
    *_, confused, weakest = write_report(tmp_path).tables
    assert confused == [["class", "predicted as", "images"], ["class 999", "class 7", "3"]]
    assert weakest[:3] == [["class", "correct"], ["class 999", "0 of 3"], ["class 0", "3 of 3"]]
    assert len(weakest) == 21
    assert (tmp_path / "out" / "report.html").stat().st_size < 50_000


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


def test_a_run_that_cannot_be_read_does_not_fail_the_page(write_run, tmp_path):
    write_run("whole")
    for name, file in (("a", "config.json"), ("b", "result.json"), ("c", "metrics.parquet"), ("d", "steps.parquet")):
        storage.write_bytes(write_run(name, seed=1).path(file), b"PAR1 and no more")
    checkpoint = write_run("e").path("checkpoints", "step-00000012", "checkpoint.json")
    storage.write_bytes(checkpoint, b'{"format": 9}')
    _, (left_out,) = write_notes_and_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    assert "runs/a/config.json cannot be read" in left_out
    page = read_report(tmp_path)
    assert left_out in page.text
    for name in ("b/result.json", "c/metrics.parquet", "d/steps.parquet"):
        assert page.text.count(f"{name} cannot be read: ") == 1
    # That of the whole run, and of the one whose checkpoint alone cannot be read.
    assert page.text.count("(51 of 66") == 2
    assert json.loads(page.data)["verdicts"] == {}


def test_a_storage_of_which_no_run_can_be_read_is_refused_with_the_reason(write_run, tmp_path):
    storage.write_bytes(write_run("a").path("config.json"), b"{}")
    with pytest.raises(InputError, match=r"no run that can be read: .*a/config\.json cannot be read: config: Field"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["NOTES.md", "report.html"])
def test_a_file_that_is_not_its_own_is_not_replaced(write_run, tmp_path, name):
    write_run("first")
    storage.write_bytes(str(tmp_path / "out" / name), b"# Training notes\n\nmy own")
    with pytest.raises(InputError, match=rf"{name} was not written by this job .* with --output"):
        write_report(tmp_path)
    assert (tmp_path / "out" / name).read_bytes() == b"# Training notes\n\nmy own"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_its_own_files_are_written_again(write_run, tmp_path):
    write_run("first")
    write_report(tmp_path)
    # As it was before the page had a mark.
    page = tmp_path / "out" / "report.html"
    page.write_text(page.read_text().replace('<meta name="generator"', "<meta"))
    write_run("second")
    assert "second" in write_report(tmp_path).text
    assert "generator" in page.read_text()
