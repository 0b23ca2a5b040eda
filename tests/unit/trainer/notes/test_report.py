import base64
import json
import re

import numpy as np
import pytest

from trainer.notes.report import find_studies, write_notes_and_report
from trainer.record.predictions import PREDICTIONS_NAME
from trainer.runtime import storage
from trainer.runtime.errors import InputError


def read_report(tmp_path) -> str:
    return (tmp_path / "out" / "report.html").read_text()


def write_report(tmp_path) -> str:
    write_notes_and_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    return read_report(tmp_path)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def rows_of(page: str) -> list[list[str]]:
    body = re.search(r'<table class="runs".*?</table>', page, re.DOTALL)[0]
    return [
        [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", body, re.DOTALL)[1:]
    ]


def test_the_page_needs_nothing_from_outside(write_run, tmp_path):
    write_run("first")
    loaded = re.findall(r'(?:src|srcset|action|href)="([^"]*)"', write_report(tmp_path))
    assert loaded == ["_pages/first.html"]
    assert (tmp_path / "out" / "_pages" / "first.html").exists()
    assert "@import" not in read_report(tmp_path)


def test_every_run_is_there_the_highest_accuracy_first(write_run, tmp_path, make_result, evaluation):
    write_run("begun", finished=False)
    write_run("first")
    better = write_run("better", seed=1)
    better.write_ending(make_result(val=evaluation.model_copy(update={"accuracy": 0.9}), train_seconds=90.0))
    rows = rows_of(write_report(tmp_path))
    assert [row[0] for row in rows] == ["better", "first", "begun"]
    assert rows[1][2:4] == ["cnn_softmax", "0.7727 51 of 66, 0.658-0.857"]
    # The mean of the last epochs, which nobody chose.
    assert (rows[1][4], rows[2][4]) == ("0.7500", "")
    assert rows[1][9] == "overfitting"
    assert rows[2][9] == "not finished"
    assert rows[0][8] == "1.5"
    assert (tmp_path / "out" / "NOTES.md").read_text().count("#### cnn_softmax: ") == 3


def test_a_run_is_read_as_often_however_many_there_are(write_run, tmp_path, monkeypatch):
    read, counts = storage.read_bytes, []
    monkeypatch.setattr(storage, "read_bytes", lambda *place: counts.append(place) or read(*place))
    reads = []
    for group in range(3):
        for number in range(2):
            write_run(f"run-{group}-{number}", seed=2 * group + number)
        counts.clear()
        write_notes_and_report(str(tmp_path / "runs"), str(tmp_path / f"out-{group}"))
        reads.append(len(counts))
    assert reads[2] - reads[1] == reads[1] - reads[0] > 0


def test_datasets_of_one_name_are_told_apart(write_run, tmp_path):
    write_run("first", dataset="/a/digits", dataset_fingerprint="0123456789")
    write_run("second", dataset="/b/digits", dataset_fingerprint="abcdef0123")
    write_run("third", dataset="/b/signs", dataset_fingerprint="0123456789")
    assert sorted(row[1] for row in rows_of(write_report(tmp_path))) == ["digits 012345", "digits abcdef", "signs"]


def test_the_script_has_the_curves_and_the_options_in_which_runs_differ(write_run, tmp_path):
    write_run("first", seed=1)
    write_run("second", seed=2)
    data = data_of(write_report(tmp_path))
    assert [run["config"] for run in data["runs"]] == [{"seed": "1"}, {"seed": "2"}]
    assert data["config"]["arch"] == "cnn_softmax"
    (first, _) = data["runs"]
    assert (first["epochs"], first["val_loss"], first["val_accuracy"]) == ([1, 2, 3], [5, 2.5, 2], [0.1, 0.3, 0.6])
    assert first["best"] == 3


def test_the_script_can_tell_which_predictions_are_correct(write_run, tmp_path, monkeypatch):
    write_run("first", right=51)
    write_run("second", right=60, seed=1)
    first, second = data_of(write_report(tmp_path))["runs"]
    assert (first["images"], second["images"]) == (66, 66)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(first["correct"]), np.uint8))
    assert bits.tolist() == [1] * 51 + [0] * 21
    # Of very many images only the first runs have them.
    monkeypatch.setattr("trainer.notes.report._MOST_CORRECT_BYTES", 20)
    assert ["correct" in run for run in data_of(write_report(tmp_path))["runs"]] == [True, False]


def test_names_cannot_become_markup(write_run, tmp_path):
    write_run("first", arch_arguments={"</script><script>alert(1)": 1})
    page = write_report(tmp_path)
    assert "</script><script>alert(1)" in data_of(page)["config"]["arch_arguments"]
    assert "overfitting: &lt;b&gt;less&lt;/b&gt;" in (tmp_path / "out" / "_pages" / "first.html").read_text()


def test_studies_are_linked(write_run, tmp_path):
    write_run("first")
    storage.write_bytes(str(tmp_path / "runs" / "lr" / "2026-11-28-1" / "study.html"), b"page")
    storage.write_bytes(str(tmp_path / "runs" / "lr" / "2026-11-28-2" / "study.json"), b"{}")
    assert find_studies(str(tmp_path / "runs"), []) == [str(tmp_path / "runs/lr/2026-11-28-1/study.html")]
    assert '<a href="../runs/lr/2026-11-28-1/study.html">lr/2026-11-28-1</a>' in write_report(tmp_path)


def test_a_storage_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no runs"):
        write_notes_and_report(str(tmp_path), str(tmp_path))


def test_a_run_that_cannot_be_read_does_not_fail_the_page(write_run, tmp_path):
    write_run("whole")
    for name, file in (("a", "config.json"), ("b", "result.json"), ("c", "metrics.parquet"), ("d", PREDICTIONS_NAME)):
        storage.write_bytes(write_run(name, seed=1).path(file), b"PAR1 and no more")
    _, (left_out,) = write_notes_and_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    assert "runs/a/config.json cannot be read" in left_out
    page = read_report(tmp_path)
    assert left_out in page
    assert {row[0]: row[9] for row in rows_of(page)} == {
        **dict.fromkeys(["whole", "c", "d"], "overfitting"),
        "b": "cannot be read",
    }
    assert ["correct" in run for run in data_of(page)["runs"] if run["name"] == "d"] == [False]


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
    # A page of an earlier version.
    page = tmp_path / "out" / "report.html"
    page.write_text("<caption>All runs. A heading sorts by its column.</caption>")
    write_run("second")
    assert "second" in write_report(tmp_path)
    assert "generator" in page.read_text()
