import json
import re

import numpy as np
import pyarrow as pa
import pytest

from trainer.notes.run_page import format_run_page, thin_out, view_run, write_run_page
from trainer.record.evaluation_result import summarise
from trainer.record.predictions import PREDICTIONS_NAME, THUMBNAILS_NAME, make_thumbnails, select_shown
from trainer.record.run_folder import RunFolder, StartedRun
from trainer.runtime import storage


def page_of(run: RunFolder) -> str:
    started = StartedRun(run, run.read_record())
    folder = storage.join(storage.parent(run.uri), "_pages")
    overview = "all runs", storage.join(folder, "..", "report.html")
    return format_run_page(view_run(started, [started]), folder, overview)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_the_curves_have_the_values_of_each_epoch_and_the_best(write_run):
    charts = {chart["title"]: chart for chart in data_of(page_of(write_run("first")))["charts"]}
    train, val = charts["loss"]["lines"]
    assert (train["name"], train["x"], train["y"], train["best"]) == ("train", [1, 2, 3], [3, 2, 1], None)
    assert (val["name"], val["y"], val["best"]) == ("val", [5, 2.5, 2], 3)
    assert [line["y"] for line in charts["accuracy"]["lines"]] == [[0.2, 0.4, 0.8], [0.1, 0.3, 0.6]]
    norm, clipped = charts["gradient norm, unclipped"]["lines"]
    assert (norm["x"], norm["y"][0], norm["y"][-1]) == (list(range(1, 13)), 0.1, 9)
    assert (clipped["x"], clipped["y"]) == ([1, 12], [1, 1])


@pytest.mark.parametrize(("loss", "logarithmic"), [(6.9, False), (4.8e12, True), (float("inf"), False)])
def test_a_loss_that_would_flatten_the_others_has_a_logarithmic_axis(write_run, loss, logarithmic):
    run = write_run("first")
    rows = run.read_metrics()
    run.write_metrics([{**rows[0], "val_loss": loss}, *rows[1:]])
    charts = {chart["title"]: chart for chart in data_of(page_of(run))["charts"]}
    assert charts["loss"]["logarithmic"] == logarithmic
    assert not charts["accuracy"]["logarithmic"]


def test_a_long_curve_is_thinned_out_and_keeps_its_gaps():
    assert thin_out(np.arange(1000), 4) == [0, 250, 500, 750]
    assert thin_out([1 / 3, np.nan, np.inf], 9) == [0.3333, None, None]


def test_each_mistake_has_its_file_its_classes_and_its_picture(write_run):
    run = write_run("first")
    table = pa.table(
        {
            "path": ["a.png", "b.png", "c.png", "d.png", "e.png"],
            "label": ["cat", "dog", "eel", "dog", "eel"],
            "predicted": ["cat", "cat", "dog", "dog", "eel"],
            "confidence": [0.9, 0.8, 0.7, 0.9, 0.9],
            "loss": [0.1, 1.0, 2.0, 0.1, 0.1],
            "mean_loss": [0.2, 3.0, 1.5, 0.2, 0.2],
        }
    )
    storage.write_bytes(run.path(PREDICTIONS_NAME), storage.parquet_bytes(table))
    images = np.zeros((3, 8, 8, 1), np.uint8)
    shown = select_shown(table)
    thumbnails = make_thumbnails(images[shown], shown)
    storage.write_bytes(run.path(THUMBNAILS_NAME), storage.parquet_bytes(thumbnails))
    data = data_of(page_of(run))
    assert data["mistakes"] == [[2, "c.png", 2, 1, 0.7, 2.0], [1, "b.png", 1, 0, 0.8, 1.0]]
    assert data["suspects"] == [[1, "b.png", 1, 0, 0.8, 3.0], [2, "c.png", 2, 1, 0.7, 1.5]]
    assert set(data["images"]) == {"1", "2"}
    # Of very many mistakes the others are listed without one.
    storage.write_bytes(run.path(THUMBNAILS_NAME), storage.parquet_bytes(thumbnails.slice(0, 1)))
    data = data_of(page_of(run))
    assert (len(data["mistakes"]), data["wrong"], set(data["images"])) == (2, 2, {"1"})
    assert data["classes"] == ["cat", "dog", "eel"]


def test_each_count_of_the_confusion_matrix_leads_to_its_images(write_run):
    matrix = re.search(r'<table class="confusion".*?</table>', page_of(write_run("first")), re.DOTALL)[0]
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", matrix)]
    assert cells == ["", "22", "", "", "2", "20", "", "", "13", "9"]
    leading = re.findall(r'data-label="(\d)" data-predicted="(\d)">(\d+)<', matrix)
    assert leading == [("1", "0", "2"), ("2", "1", "13")]


def test_a_run_of_many_classes_has_the_most_confused_and_all_classes(write_run, make_result):
    run = write_run("first")
    labels = np.arange(1000).repeat(3)
    predicted = labels.copy()
    predicted[-3:] = 7
    columns = {"label": labels, "predicted": predicted, "likelier": np.int32(labels != predicted)}
    columns |= {"loss": np.ones(3000), "confidence": np.ones(3000)}
    run.write_ending(make_result(val=summarise("val", pa.table(columns), [f"class {label}" for label in range(1000)])))
    page = page_of(run)
    assert 'data-label="999" data-predicted="7">3<' in page
    # The worst of all classes is the first in their table.
    names = re.findall(r'<tr><th scope="row" data-value="(class \d+)">', page)
    assert (len(names), names[0]) == (1000, "class 999")
    assert len(page) < 400_000


def test_a_page_leads_to_what_there_is_of_the_run(write_run):
    run = write_run("first")
    storage.write_bytes(run.path("note.md"), b"note")
    storage.write_bytes(run.path("explanations", "report.html"), b"page")
    (links,) = re.findall(r"<nav.*?</nav>", page_of(run))
    assert re.findall('href="(.*?)"', links) == [
        "../report.html",
        "../first/note.md",
        "../first/explanations/report.html",
        "../first/predictions.parquet",
        "../first/metrics.csv",
    ]


def test_a_page_says_what_the_run_chose(write_run, make_result):
    run = write_run("first", augment="auto")
    run.write_ending(make_result(augmentation_used="zoom", augmentation="zoom 0.1 after 2 epochs", noise_scale=9.0))
    page = page_of(run)
    assert "augmentation: zoom; validation loss of those tried: zoom 0.1 after 2 epochs" in page
    assert "gradient noise scale: 9 images" in page


def test_what_training_showed_about_the_batch_is_no_finding(write_run, make_result):
    run = write_run("first")
    run.write_ending(make_result(findings=["overfitting: try less"], batch_remarks=("batch table: measured again",)))
    page = page_of(run)
    assert re.findall('<p class="finding">(.*?)</p>', page) == ["overfitting: try less"]
    assert "<p>batch table: measured again</p>" in page


def test_a_page_is_written_again_only_where_something_has_changed(write_run, tmp_path, make_result):
    run, folder = write_run("first"), str(tmp_path / "pages")

    path = tmp_path / "pages" / "first.html"
    started = StartedRun(run, run.read_record())

    def write() -> str:
        write_run_page(view_run(started, [started]), folder, ("all runs", str(tmp_path / "report.html")))
        return path.read_text()

    first = write()
    path.write_text(f"{first}<!-- as it was -->")
    assert write() == f"{first}<!-- as it was -->"
    run.write_ending(make_result(findings=["new"]))
    assert write().count("new") == first.count("new") + 1
    write_run_page(view_run(started, [started]), folder, ("study", str(tmp_path / "report.html")))
    assert ">study</a>" in path.read_text()
    # Of a run that has not ended the page changes with its curves.
    run.delete_interruption()
    assert write() != first
    path.write_text("")
    assert "not finished" in write()


@pytest.mark.parametrize("name", ["metrics.parquet", "steps.parquet", "result.json", "predictions.parquet"])
def test_a_run_with_a_damaged_file_has_a_page_that_says_so_or_lacks_it(write_run, name):
    run = write_run("first")
    storage.write_bytes(run.path(name), b"PAR1 and no more")
    page = page_of(run)
    assert page.count(f"{name} cannot be read: ") == (name != "predictions.parquet")
    assert "<h1>first</h1>" in page
