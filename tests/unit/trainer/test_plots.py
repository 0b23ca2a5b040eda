import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from trainer import storage
from trainer.plots import write_mistakes, write_plots
from trainer.run_folder import RunFolder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path))


def read_picture(run: RunFolder, name: str) -> Image.Image:
    picture = Image.open(io.BytesIO(storage.read_bytes(run.path("plots", name))))
    picture.load()
    return picture.convert("RGB")


@pytest.mark.parametrize(("epochs", "clip_norm"), [(1, 0.0), (12, 1.0)])
def test_a_run_has_pictures_that_are_not_blank(run, make_result, epochs, clip_norm):
    history = [
        {"epoch": epoch, "loss": 1 / epoch, "accuracy": 0.5, "val_loss": 1.2 / epoch, "val_accuracy": 0.4}
        | {"learning_rate": 0.1}
        for epoch in range(1, epochs + 1)
    ]
    steps = pa.table({"step": range(1, epochs + 1), "grad_norm": np.geomspace(0.1, 10, epochs)})
    write_plots(run, history, steps, make_result(best_epoch=1), clip_norm)
    for name in ("curves.png", "confusion.png", "gradients.png"):
        picture = read_picture(run, name)
        assert min(picture.size) >= 400
        assert len(picture.getcolors(2**24)) > 20


def test_a_gradient_that_is_not_a_number_is_left_out(run, make_result):
    row = {"epoch": 1, "loss": 1.0, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.4, "learning_rate": 0.1}
    write_plots(run, [row], pa.table({"step": [1, 2], "grad_norm": [np.nan, np.inf]}), make_result(), 0.0)
    assert read_picture(run, "gradients.png").size[0] >= 400


def predictions(predicted: list[int], losses: list[float]) -> pa.Table:
    columns = {"label": [0] * len(predicted), "predicted": predicted, "loss": losses}
    return pa.table({**columns, "confidence": np.full(len(predicted), 0.9, np.float32)})


def test_the_worst_mistakes_come_first(run):
    # Each image has a level of gray of its own; only rows 1 and 3 are wrong.
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((4, 8, 8, 1), 50, np.uint8)
    write_mistakes(run, images, predictions([0, 1, 0, 1], [9.0, 1.0, 9.0, 2.0]), ["cat", "$dog^"])
    picture = np.asarray(read_picture(run, "mistakes.png"))
    left, second = (picture[len(picture) * 2 // 3, picture.shape[1] * eighth // 8, 0] for eighth in (1, 3))
    assert (left, second) == (150, 50)


def test_a_run_without_mistakes_says_so_in_an_empty_picture(run):
    write_mistakes(run, np.zeros((2, 8, 8, 3), np.uint8), predictions([0, 0], [0.1, 0.1]), ["cat", "dog"])
    assert read_picture(run, "mistakes.png").size[0] >= 400
