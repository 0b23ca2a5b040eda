import io

import numpy as np
import pytest
from PIL import Image

from data_prep.card import write_card
from trainer import storage


def read_sheet(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(storage.read_bytes(storage.join(uri, "contact_sheet.png"))))


def test_the_card_counts_the_images_of_each_class_and_split(write_dataset):
    written = write_dataset(rows=(7, 4, 3))
    write_card(written.uri, written.manifest)
    lines = storage.read_bytes(storage.join(written.uri, "README.md")).decode().splitlines()
    assert lines[0] == "# 14 images of 3 classes"
    assert "5x5x1 uint8, from /photos" in lines
    assert "| all | 7 | 4 | 3 | 14 |" in lines
    cats = [int((written.labels[split] == 0).sum()) for split in ("train", "val", "test")]
    assert f"| cat | {cats[0]} | {cats[1]} | {cats[2]} | {sum(cats)} |" in lines
    assert "Not used: 3 files (rejected.parquet)" in lines
    assert "- empty: 2" in lines


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_contact_sheet_shows_the_first_training_images_of_each_class_in_its_row(write_dataset, channels, mode):
    written = write_dataset(rows=(40, 1, 1), channels=channels)
    write_card(written.uri, written.manifest)
    sheet = read_sheet(written.uri)
    assert (sheet.mode, sheet.size) == (mode, (8 * 96, 3 * 96))
    for label in range(3):
        for position, row in enumerate(np.flatnonzero(written.labels["train"] == label)[:8]):
            tile = np.asarray(sheet)[label * 96 : (label + 1) * 96, position * 96 : (position + 1) * 96]
            mean = written.images["train"][row].mean(axis=(0, 1))
            assert np.abs(tile.reshape(96 * 96, channels).mean(axis=0) - mean).max() < 10


def test_a_class_with_few_images_leaves_its_row_white(write_dataset):
    written = write_dataset(rows=(3, 1, 1))
    write_card(written.uri, written.manifest)
    assert (np.asarray(read_sheet(written.uri))[:, 3 * 96 :] == 255).all()
