"""The pages in a real browser, Chromium: what one can click, hover over and print, on a large screen and on a phone."""

import contextlib
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.unit.conftest import evaluation, make_config, make_result, write_dataset, write_run  # noqa: F401
from trainer.notes.comparison import compare_predictions
from trainer.notes.plots import to_svg
from trainer.notes.report import write_notes_and_report
from trainer.record.evaluation_result import summarise
from trainer.record.predictions import PREDICTIONS_NAME, THUMBNAILS_NAME, make_thumbnails, select_shown
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.html import Section, Table, render_sections
from trainer.study.analysis import Importance
from trainer.study.plots import draw_importance

PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
# Of the light page: the lines of train and of val.
BLUE, ORANGE = (0, 114, 178), (194, 77, 0)
# Of the third of the chosen runs.
GREEN = (0, 122, 90)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Debian's; without it that of `playwright install chromium`.
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        # Its sandbox needs a user other than root.
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Return a function that opens a page; afterwards nothing may have been reported on its console."""
    reported = []
    with contextlib.ExitStack() as stack:

        def open_page(path: Path, size: dict[str, int] = LAPTOP, scheme: str = "light") -> Page:
            context = stack.enter_context(browser.new_context(viewport=size, color_scheme=scheme, offline=True))
            page = context.new_page()
            page.on("console", lambda message: reported.append(message.text))
            page.on("pageerror", lambda error: reported.append(str(error)))
            page.goto(path.as_uri())
            return page

        yield open_page
    assert reported == []


def predict(run: RunFolder, wrong: int) -> pa.Table:
    """Give a run predictions of 40 images: the last ones wrong, each with a gray level of its own."""
    labels = np.array(["cat", "dog"] * 20)
    predicted = labels.copy()
    predicted[40 - wrong :] = np.where(labels[40 - wrong :] == "cat", "dog", "eel")
    losses = np.where(labels == predicted, 0.1, np.arange(40))
    columns = {"path": [f"{label}/{row}.png" for row, label in enumerate(labels)], "label": labels}
    columns |= {"predicted": predicted, "confidence": np.full(40, 0.75), "loss": losses, "mean_loss": losses}
    table = pa.table(columns)
    storage.write_bytes(run.path(PREDICTIONS_NAME), storage.parquet_bytes(table))
    images = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None] * 6, (40, 16, 16, 1))
    shown = select_shown(table)
    storage.write_bytes(run.path(THUMBNAILS_NAME), storage.parquet_bytes(make_thumbnails(images[shown], shown)))
    return table


@pytest.fixture
def runs(tmp_path, write_run, make_result, evaluation) -> dict[str, pa.Table]:  # noqa: F811
    """Three finished runs and their predictions; the pages of all are written."""
    tables = {}
    for number, name in enumerate(("first", "second", "third")):
        run = write_run(name, seed=number, arch=("cnn_softmax", "alexnet", "vgg16")[number])
        # The third one diverged.
        accuracy = {"accuracy": 0.9 - number / 10, "loss": (0.5, 0.6, 5.4e27)[number]}
        run.write_ending(make_result(val=evaluation.model_copy(update=accuracy), best_epoch=3))
        tables[name] = predict(run, wrong=(2, 12, 4)[number])
    write_notes_and_report(str(tmp_path / "runs"))
    return tables


def names_of(page: Page) -> list[str]:
    """Return the runs that the table shows, in its order."""
    return page.locator("#runs tbody tr:visible th a").all_text_contents()


def assert_fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def count_pixels(page: Page, selector: str, color: tuple[int, int, int]) -> int:
    picture = np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB"))
    return int((np.abs(picture.astype(int) - color).max(axis=-1) < 12).sum())


def test_the_table_of_runs_is_sorted_filtered_and_leads_to_each_run(visit, runs, tmp_path):
    page = visit(tmp_path / "runs" / "report.html")
    assert_fits(page)
    assert names_of(page) == ["first", "second", "third"]
    # No heading is broken, however long the values of others are.
    heights = page.locator("#runs thead th").evaluate_all("all => all.map(one => one.clientHeight)")
    assert max(heights) < 40
    assert page.locator('#runs td[data-name="loss"]').last.text_content() == "5.4e+27"
    loss = page.get_by_role("button", name="loss", exact=True)
    loss.click()
    loss.click()
    assert names_of(page) == ["third", "second", "first"]
    assert page.locator("#runs th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_label("filter").fill("ALEX net")
    assert names_of(page) == ["second"]
    assert page.locator("#count").text_content() == "1 of 3 runs"
    page.get_by_role("link", name="second").click()
    assert page.locator("h1").text_content() == "second"
    page.get_by_role("link", name="all runs").click()
    assert page.locator("h1").text_content() == "Training notes"


def test_a_long_table_scrolls_under_its_head_above_the_charts(visit, runs, tmp_path):
    page = visit(tmp_path / "runs" / "report.html", {"width": 1280, "height": 200})
    page.locator(".list").evaluate("list => list.scrollTo(0, list.scrollHeight)")
    parts = (".list", "#runs thead th:first-child", "#runs tbody tr:last-child")
    rows, head, last = (page.locator(one).bounding_box() for one in parts)
    assert head["y"] == pytest.approx(rows["y"], abs=1)
    # The last row is in sight, too, so the list ends on the screen, with the charts below it.
    assert last["y"] + last["height"] == pytest.approx(rows["y"] + rows["height"], abs=1)
    assert rows["height"] <= 200


def test_chosen_runs_share_a_chart_and_are_compared_exactly(visit, runs, tmp_path):
    page = visit(tmp_path / "runs" / "report.html")
    assert page.evaluate("charts.map(chart => chart.title)") == ["validation loss", "validation accuracy"]
    assert page.evaluate("charts[0].series.slice(1).map(line => line.label)") == ["first", "second", "third"]
    assert page.evaluate("charts[0].data") == [[1, 2, 3], *[[5, 2.5, 2]] * 3]
    assert page.evaluate("charts[0].axes[0]._values.filter(Boolean)") == ["1", "2", "3"]
    labels = [float(label) for label in page.evaluate("charts[0].axes[1]._values.filter(Boolean)")]
    assert labels == sorted(labels)
    assert labels[0] <= 2 < 5 <= labels[-1] + 1
    assert page.evaluate("charts[0].valToPos(5, 'y') < charts[0].valToPos(2, 'y')"), "from the top: 5 is above 2"
    verdicts = page.locator("#verdicts p").all_text_contents()
    for verdict, other in zip(verdicts, ("second", "third"), strict=True):
        expected = compare_predictions(runs["first"], runs[other])
        assert f"correct only in first: {expected.first_only}, only in {other}: {expected.second_only}; " in verdict
        (p_value,) = re.findall(r"p = ([\d.e-]+)\)", verdict)
        assert float(p_value) == pytest.approx(expected.p_value, rel=0.05)
        assert ("first is better than" in verdict) == expected.is_distinguishable
    assert "better" in verdicts[0]
    assert "not distinguishable" in verdicts[1]
    assert "seed" in page.locator(".compared tbody").text_content()
    page.get_by_label("show third below").uncheck()
    assert page.evaluate("charts[0].series.slice(1).map(line => line.label)") == ["first", "second"]
    assert page.evaluate("charts[0].scales.y.distr") == 1, "linear"


def test_a_curve_tells_its_values_under_the_mouse(visit, runs, tmp_path):
    page = visit(tmp_path / "runs" / "_pages" / "first.html")
    area = page.locator("#charts .u-over").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    legend = page.locator("#charts .u-legend").first
    page.wait_for_function("document.querySelector('#charts .u-legend').textContent.includes('3')")
    assert re.sub(r"\s", "", legend.text_content()) == "epoch3train1val2"
    # The other charts over epochs follow.
    assert re.sub(r"\s", "", page.locator("#charts .u-legend").nth(1).text_content()) == "epoch3train0.8val0.6"
    for color in (BLUE, ORANGE):
        assert count_pixels(page, "#charts .u-wrap", color) > 100


def test_a_click_on_the_confusion_matrix_shows_its_images(visit, runs, tmp_path):
    page = visit(tmp_path / "runs" / "_pages" / "second.html")
    assert_fits(page)
    figures = page.locator("#mistakes figure")
    assert figures.count() == 12
    # The highest loss first: the last image.
    assert "dog/39.png" in figures.first.text_content()
    # Dogs predicted as eels, of the result's matrix: none, so no button; dogs as cats: two in the matrix.
    page.locator('#confusion button[data-label="1"][data-predicted="0"]').click()
    assert page.get_by_label("true class").input_value() == "1"
    assert figures.count() == 0
    page.get_by_label("predicted class").select_option("eel")
    assert figures.count() == 6
    assert page.locator("#shown").text_content() == "6 of 12 mistakes, the highest loss first"
    assert all("dog taken for eel" in text for text in figures.all_text_contents())
    picture = figures.first.locator("img")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
    assert "cat/38.png" in page.locator("#suspects figure").nth(1).text_content()
    page.get_by_label("true class").select_option("cat")
    assert figures.count() == 0
    page.locator("#classes").get_by_role("button", name="dog", exact=True).click()
    assert page.get_by_label("true class").input_value() == "1"
    assert page.get_by_label("predicted class").input_value() == ""
    assert figures.count() == 6
    page.get_by_role("button", name="F1").click()
    assert page.locator("#classes tbody th").all_text_contents() == ["eel", "dog", "cat"]


@pytest.fixture
def many_classes(tmp_path, write_run, make_result) -> Path:  # noqa: F811
    """The page of a run of 48 classes with long names that differ at their ends, two of which are confused."""
    names = [f"great white shark, man-eater, Carcharodon carcharias {label}" for label in range(48)]
    labels = np.arange(48).repeat(2)
    predicted = np.where(labels == 47, 0, labels)
    columns = {"label": labels, "predicted": predicted, "likelier": np.int32(labels != predicted)}
    columns |= {"loss": np.ones(96), "confidence": np.ones(96)}
    write_run("many").write_ending(make_result(val=summarise("val", pa.table(columns), names)))
    write_notes_and_report(str(tmp_path / "runs"))
    return tmp_path / "runs" / "_pages" / "many.html"


@pytest.mark.parametrize("size", [LAPTOP, PHONE])
def test_the_names_of_many_classes_stay_beside_their_counts(visit, many_classes, size):
    page = visit(many_classes, size)
    assert_fits(page)
    matrix, row, column = (page.locator(one) for one in (".matrix", "#confusion tbody th", "#confusion thead th"))
    matrix.evaluate("matrix => matrix.scrollTo(matrix.scrollWidth, matrix.scrollHeight)")
    box, last = matrix.bounding_box(), row.last.bounding_box()
    assert last["x"] == pytest.approx(box["x"], abs=1)
    assert last["width"] < 200
    assert column.last.bounding_box()["y"] == pytest.approx(box["y"], abs=1)
    # Long names are without their middles, the whole ones under the mouse.
    assert row.last.text_content() == "great white …rcharias 47"
    assert row.last.get_attribute("title") == "great white shark, man-eater, Carcharodon carcharias 47"
    assert page.locator('#confusion button[data-label="47"]').text_content() == "2"


def write_sections(folder: Path) -> Path:
    """Write a page as studies and explanations are."""
    drawing = to_svg(draw_importance([Importance("base_learning_rate", 0.7, 0.01), Importance("optimizer", 0.1, 0.4)]))
    picture = io.BytesIO()
    Image.new("RGB", (1400, 300)).save(picture, "PNG")
    table = Table(("trial", *"abcdefgh"), [("trial-0001", *["0.123456789"] * 8)], {"trial-0001": "_pages/trial.html"})
    sections = [
        Section("Which matter?", ["a " * 300], picture="importance"),
        Section("Maps", [], picture="maps", command="python jobs/train.py " * 20),
        Section("All trials", [], table),
    ]
    pictures, drawings = {"maps": picture.getvalue()}, {"importance": drawing}
    path = folder / "study.html"
    path.write_text(render_sections("Which?", "two", sections, pictures, drawings))
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_a_phone_or_loses_its_text_in_the_dark(visit, runs, tmp_path, scheme):
    written = [tmp_path / "runs" / "report.html", tmp_path / "runs" / "_pages" / "first.html", write_sections(tmp_path)]
    for path in written:
        page = visit(path, PHONE, scheme)
        assert_fits(page)
        text, back = (
            sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
            for name in ("color", "backgroundColor")
        )
        assert (back - text) * (1 if scheme == "light" else -1) > 400
    # Drawings take the colors of the page.
    assert page.evaluate("getComputedStyle(document.querySelector('.drawing text')).fill") == page.evaluate(
        "getComputedStyle(document.body).color"
    )
    assert page.locator("table a").get_attribute("href") == "_pages/trial.html"


def test_a_page_is_printed_in_light_colors_without_its_controls(visit, runs, tmp_path):
    page = visit(tmp_path / "runs" / "_pages" / "second.html", scheme="dark")
    assert page.get_by_label("true class").is_visible()
    page.emulate_media(media="print")
    assert not page.get_by_label("true class").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert count_pixels(page, "#charts .u-wrap", BLUE) > 100
    assert page.pdf().startswith(b"%PDF")
    page = visit(tmp_path / "runs" / "report.html", scheme="dark")
    page.emulate_media(media="print")
    # The chosen runs are printed, too.
    assert count_pixels(page, "#chosen .u-wrap", GREEN) > 100
    assert page.locator("#chosen .u-marker").nth(3).evaluate("marker => marker.style.borderColor") == "rgb(0, 122, 90)"
