import io
import re
import struct
import warnings

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.unit.trainer.config.test_batch_table import make_table, size
from trainer.notes.plots import (
    draw_batch_sizes,
    draw_confusion,
    draw_curves,
    draw_gradients,
    draw_mistakes,
    to_png,
    to_svg,
    write_mistakes,
    write_plots,
)
from trainer.record.evaluation_result import EvaluationResult, find_mistakes, summarise
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path))


def read_picture(run: RunFolder, name: str) -> Image.Image:
    picture = Image.open(io.BytesIO(storage.read_bytes(run.path("plots", name))))
    picture.load()
    return picture.convert("RGB")


def make_history(epochs: int) -> list[dict[str, float]]:
    """Every column of every epoch has a value of its own."""
    return [
        {
            "epoch": epoch,
            "loss": 3 / epoch,
            "val_loss": 4 / epoch,
            "accuracy": 0.1 * epoch,
            "val_accuracy": 0.07 * epoch,
        }
        | {"learning_rate": 0.01 * epoch}
        for epoch in range(1, epochs + 1)
    ]


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each curve of a drawing, by its label."""
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}


@pytest.mark.parametrize(("epochs", "clip_norm"), [(1, 0.0), (9, 1.0)])
def test_a_run_has_pictures_that_are_not_blank(run, make_result, epochs, clip_norm):
    steps = pa.table({"step": range(1, epochs + 1), "grad_norm": np.geomspace(0.1, 10, epochs)})
    assert write_plots(run, make_history(epochs), steps, make_result(best_epoch=1), clip_norm) == ""
    for name in ("curves.png", "confusion.png", "gradients.png"):
        picture = read_picture(run, name)
        assert min(picture.size) >= 400
        assert len(picture.getcolors(2**24)) > 20


def test_curves_are_those_of_the_history():
    history = make_history(9)
    loss, accuracy, rate = draw_curves(history, best_epoch=4).axes
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        assert axes.get_ylabel() == name
        lines = lines_of(axes)
        assert lines["train"] == [(row["epoch"], row[name]) for row in history]
        assert lines["val"] == [(row["epoch"], row[f"val_{name}"]) for row in history]
        assert {x for x, _ in lines["best epoch"]} == {4}
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "val", "best epoch"]
        assert axes.get_ylim()[0] < axes.get_ylim()[1]
    (line,) = lines_of(rate).values()
    assert line == [(row["epoch"], row["learning_rate"]) for row in history]


def test_gradient_norms_are_drawn_by_step_and_counted_and_where_they_are_clipped():
    norms = np.geomspace(0.1, 10, 30)
    by_step, histogram = draw_gradients(pa.table({"step": range(1, 31), "grad_norm": norms}), 2.0).axes
    clipped = lines_of(by_step)["clipped to 2"]
    assert {y for _, y in clipped} == {2.0}
    (drawn,) = (points for label, points in lines_of(by_step).items() if label != "clipped to 2")
    assert drawn == list(zip(range(1, 31), norms, strict=True))
    assert sum(bar.get_height() for bar in histogram.patches) == 30
    assert {x for x, _ in lines_of(histogram)["clipped to 2"]} == {2.0}
    assert {x for x, _ in lines_of(histogram)["90th percentile"]} == {np.percentile(norms, 90)}


def test_a_gradient_that_is_not_a_number_is_left_out(run, make_result):
    steps = pa.table({"step": [1, 2], "grad_norm": [np.nan, np.inf]})
    write_plots(run, make_history(1), steps, make_result(), 0.0)
    assert read_picture(run, "gradients.png").size[0] >= 400


def test_the_rows_of_the_matrix_are_true_classes_and_its_columns_what_they_were_taken_for(evaluation):
    (axes,) = draw_confusion(evaluation).axes
    # 22 images of each class: 2 dogs were predicted as cats, 13 eels as dogs.
    expected = [[22, 0, 0], [2, 20, 0], [0, 13, 9]]
    assert axes.images[0].get_array().tolist() == expected
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "eel"]
    counts = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in axes.texts}
    assert counts == {(0, 0): 22, (1, 0): 2, (1, 1): 20, (2, 1): 13, (2, 2): 9}
    # The first row is on top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def evaluate_many(num_classes: int) -> EvaluationResult:
    """Ten images of each class; of class 3 four are predicted as the last class, all others are correct."""
    labels = np.arange(num_classes).repeat(10)
    predicted = labels.copy()
    predicted[30:34] = num_classes - 1
    columns = {"label": labels, "predicted": predicted, "likelier": np.int32(labels != predicted)}
    columns |= {"loss": np.ones(len(labels)), "confidence": np.ones(len(labels))}
    return summarise("val", pa.table(columns), [f"a class with a long name {label}" for label in range(num_classes)])


@pytest.mark.parametrize(("num_classes", "block", "side"), [(51, 1, 51), (400, 1, 400), (1000, 3, 334)])
def test_many_classes_are_an_overview_with_the_most_confused_as_a_list(num_classes, block, side):
    figure = draw_confusion(evaluate_many(num_classes))
    axes, listed, _ = figure.axes
    shares = np.asarray(axes.images[0].get_array())
    assert shares.shape == (side, side)
    row, column = 3 // block, (num_classes - 1) // block
    # Of the classes that share the row of class 3, which has ten images as each.
    in_row = 10 * len(range(row * block, min(num_classes, (row + 1) * block)))
    assert shares[row, column] == pytest.approx(4 / in_row)
    assert shares[row, row] == pytest.approx(1 - 4 / in_row)
    assert shares.sum() == pytest.approx(side)
    assert axes.get_ylim() == (side * block, 0)
    assert (axes.get_xlabel().partition(",")[0], axes.get_ylabel().partition(",")[0]) == ("predicted", "true")
    assert not axes.texts
    (text,) = listed.texts
    last = f"a class with…{f'long name {num_classes - 1}'[-11:]}"
    assert text.get_text().splitlines()[::2] == [
        f"{num_classes} classes; images most often confused:",
        f"a class with…long name 3, predicted as {last}: 4",
    ]


@pytest.mark.parametrize("num_classes", [10, 50, 51, 1000])
def test_the_picture_of_the_matrix_is_small_whatever_the_number_of_classes(num_classes):
    header = to_png(draw_confusion(evaluate_many(num_classes)))[:24]
    assert header.startswith(b"\x89PNG")
    assert max(struct.unpack(">II", header[16:24])) <= 2000


def test_characters_that_no_font_has_are_reported(run, evaluation, make_result):
    # Cuneiform.
    name = "\U00012001"
    table = pa.table({"label": [0, 1], "predicted": [1, 1], "loss": [1.0, 1.0], "confidence": [0.5, 0.5]})
    named = pa.table({**predictions([1], [1.0]).to_pydict(), "path": [f"{name}.png"]})
    val = summarise("val", table.append_column("likelier", pa.array([1, 0])), ["cat", name])
    steps = pa.table({"step": [1], "grad_norm": [1.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_plots(run, make_history(1), steps, make_result(val=val), 0.0) == name
        write_mistakes(run, np.zeros((1, 8, 8, 1), np.uint8), named)


def predictions(predicted: list[int], losses: list[float]) -> pa.Table:
    names = ["cat", "$dog^"]
    columns = {"label": ["cat"] * len(predicted), "predicted": [names[one] for one in predicted], "loss": losses}
    return pa.table({**columns, "confidence": np.full(len(predicted), 0.9, np.float32)})


def test_the_worst_mistakes_come_first(run):
    # Each image has a level of gray of its own; only rows 1 and 3 are wrong.
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((4, 8, 8, 1), 50, np.uint8)
    table = predictions([0, 1, 0, 1], [9.0, 1.0, 9.0, 2.0])
    write_mistakes(run, images[find_mistakes(table)], table)
    picture = np.asarray(read_picture(run, "mistakes.png"))
    left, second = (picture[len(picture) * 2 // 3, picture.shape[1] * eighth // 8, 0] for eighth in (1, 3))
    assert (left, second) == (150, 50)


def test_a_mistake_says_what_it_is_what_it_was_taken_for_and_how_surely():
    image, table = np.zeros((1, 8, 8, 1), np.uint8), predictions([1], [1.0])
    assert draw_mistakes(image, table).axes[0].get_title() == "cat,\nnot $dog^\n(confidence 0.90)"
    figure = draw_mistakes(image, table.append_column("path", pa.array(["cat/_7^.png"])))
    assert figure.axes[0].get_title() == "cat/_7^.png\ncat,\nnot $dog^\n(confidence 0.90)"


def test_batch_sizes_are_drawn_with_their_speed_and_memory():
    rows = [size(images, 1 + images / 100, seconds, replicas=2) for images, seconds in ((8, 0.1), (16, 0.12))]
    of_speed, of_memory = draw_batch_sizes(make_table(rows, limit_gib=4.0, replicas=2)).axes
    assert lines_of(of_speed)["float32"] == [(16, 160), (32, pytest.approx(32 / 0.12))]
    assert lines_of(of_memory)["float32"] == [(16, 1.08), (32, 1.16)]
    assert of_speed.get_ylabel() == "images/s"
    assert of_memory.get_ylabel() == "GiB per worker"


@pytest.mark.parametrize(("loss", "scale"), [(6.9, "linear"), (4.8e12, "log")])
def test_a_loss_that_would_flatten_the_others_has_a_logarithmic_axis(loss, scale):
    history = make_history(3)
    history[1]["val_loss"] = loss
    of_loss, of_accuracy, _ = draw_curves(history, 1).axes
    assert (of_loss.get_yscale(), of_accuracy.get_yscale()) == (scale, "linear")


def test_a_run_without_mistakes_says_so_in_an_empty_picture(run):
    write_mistakes(run, np.zeros((0, 8, 8, 3), np.uint8), predictions([0, 0], [0.1, 0.1]))
    assert read_picture(run, "mistakes.png").size[0] >= 400


def test_a_drawing_takes_the_colors_of_its_page():
    drawing = to_svg(draw_curves(make_history(3), best_epoch=2))
    assert drawing.startswith("<svg")
    assert "currentColor" in drawing
    assert "var(--c0)" in drawing
    assert not re.search("#(000000|0072b2|d55e00)", drawing)
    assert set(re.findall('http[^"]*', drawing)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    # The words stay words.
    assert ">accuracy<" in drawing
