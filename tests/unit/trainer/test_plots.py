import io

import pytest
from PIL import Image

from trainer import storage
from trainer.plots import write_plots
from trainer.run_folder import RunFolder


def read_picture(run: RunFolder, name: str) -> Image.Image:
    picture = Image.open(io.BytesIO(storage.read_bytes(run.path("plots", name))))
    picture.load()
    return picture


@pytest.mark.parametrize("epochs", [1, 12])
def test_a_run_has_two_pictures_that_are_not_blank(tmp_path, make_result, epochs):
    history = [
        {"epoch": epoch, "loss": 1 / epoch, "accuracy": 0.5, "val_loss": 1.2 / epoch, "val_accuracy": 0.4}
        for epoch in range(1, epochs + 1)
    ]
    run = RunFolder(str(tmp_path))
    write_plots(run, history, make_result(best_epoch=1))
    for name in ("curves.png", "confusion.png"):
        picture = read_picture(run, name)
        assert min(picture.size) >= 400
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
