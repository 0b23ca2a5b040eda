import hashlib
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.card import describe_few_levels, list_classes
from data_prep.card import write_card as write_card_of
from data_prep.manifest import Manifest, Split, read_index
from data_prep.shards import write_shard
from trainer.runtime import storage


def write_card(uri: str, manifest: Manifest) -> None:
    write_card_of(uri, manifest, read_index(uri, manifest))


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


def test_the_lines_of_the_card_read_the_dataset(write_dataset, monkeypatch):
    written = write_dataset(rows=(7, 4, 3), channels=3)
    write_card(written.uri, written.manifest)
    lines = storage.read_bytes(storage.join(written.uri, "README.md")).decode().splitlines()
    code = lines[lines.index("```python") + 1 : lines.index("```")]
    monkeypatch.chdir(written.uri)
    read: dict = {}
    # The package of Hugging Face is not installed: what is given to it is a plain table.
    exec("\n".join(line for line in code if "datasets" not in line), read)
    images = np.concatenate([chunk.to_numpy_ndarray() for chunk in read["images"].chunks])
    np.testing.assert_array_equal(images, np.concatenate(list(written.images.values())))
    assert read["index"]["label"].to_pylist() == np.concatenate(list(written.labels.values())).tolist()
    assert read["table"].to_pylist()[2] == {"image": images[2].ravel().tolist(), "label": written.labels["train"][2]}
    assert [line for line in code if "datasets" in line] == ["import datasets", "dataset = datasets.Dataset(table)"]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_contact_sheet_shows_the_first_training_images_of_each_class_in_its_row(write_dataset, channels, mode):
    written = write_dataset(rows=(40, 1, 1), channels=channels)
    write_card(written.uri, written.manifest)
    sheet = read_sheet(written.uri)
    # Above the images of 80 pixels is the name of their class, in 16 pixels.
    assert (sheet.mode, sheet.size) == (mode, (8 * 80, 3 * 96))
    for label in range(3):
        for position, row in enumerate(np.flatnonzero(written.labels["train"] == label)[:8]):
            tile = np.asarray(sheet)[label * 96 + 16 : (label + 1) * 96, position * 80 : (position + 1) * 80]
            mean = written.images["train"][row].mean(axis=(0, 1))
            assert np.abs(tile.reshape(80 * 80, channels).mean(axis=0) - mean).max() < 10


def test_a_class_with_few_images_leaves_its_row_white(write_dataset):
    written = write_dataset(rows=(3, 1, 1))
    write_card(written.uri, written.manifest)
    assert (np.asarray(read_sheet(written.uri))[:, 3 * 80 :] == 255).all()


def test_each_row_of_the_contact_sheet_has_the_name_of_its_class_within_its_width(write_dataset):
    written = write_dataset(rows=(3, 1, 1))
    names = ["cat", "a dog of a kind whose name takes more room than eight of its images " * 3, "猫 γάτα"]
    write_card(written.uri, written.manifest.model_copy(update={"class_names": names}))
    sheet = np.asarray(read_sheet(written.uri))
    widths = [np.flatnonzero((sheet[row * 96 : row * 96 + 16] < 128).any(axis=0)) for row in range(3)]
    assert all(len(one) for one in widths)
    assert widths[0].max() < 40
    assert 500 < widths[1].max() < 8 * 80


@pytest.fixture
def write_classes(write_dataset):
    """Return a function that writes a dataset of many classes: two train images each, with a gray of their own."""

    def write(num_classes: int):
        labels = np.arange(num_classes).repeat(2)
        written = write_dataset(rows=(len(labels), 0, 0), rows_per_shard=700)
        images = np.full((len(labels), 5, 5, 1), (labels % 250)[:, None, None, None], np.uint8)
        for number, shard in enumerate(written.manifest.shards):
            with write_shard(storage.join(written.uri, shard.path), (5, 5, 1)) as writer:
                for image in images[number * 700 : (number + 1) * 700]:
                    writer.add(image)
        index = read_index(written.uri, written.manifest)
        index = index.set_column(index.column_names.index("label"), "label", pa.array(labels, pa.int32()))
        content = storage.parquet_bytes(index)
        storage.write_bytes(storage.join(written.uri, "index.parquet"), content)
        tables = {"index.parquet": hashlib.sha256(content).hexdigest()}
        # The last three classes have the fewest and the most images in val.
        counts = [2] * num_classes
        splits = {
            "train": Split(rows_per_class=counts),
            "val": Split(rows_per_class=[*counts[3:], 1, 0, 9]),
            "test": Split(rows_per_class=[0] * num_classes),
        }
        names = [f"kind {label:05d}" for label in range(num_classes)]
        return written.uri, written.manifest.model_copy(
            update={"class_names": names, "splits": splits, "tables": tables}
        )

    return write


@pytest.mark.parametrize(
    ("num_classes", "size"),
    [
        # Eight images a class in one column of classes, four in three columns, one in twenty.
        (10, (8 * 80, 10 * 96)),
        (51, (3 * (4 * 80 + 4) - 4, 20 * 96)),
        (1000, (20 * (80 + 4) - 4, 20 * 96)),
    ],
)
def test_a_contact_sheet_of_any_number_of_classes_is_small(write_classes, num_classes, size):
    uri, manifest = write_classes(num_classes)
    write_card(uri, manifest)
    sheet = read_sheet(uri)
    assert sheet.size == size
    assert max(size) <= 2000
    # The tenth class, and the twenty-first on top of the next column.
    assert sheet.getpixel((40, 9 * 96 + 56)) == 9
    if num_classes > 20:
        width = (size[0] + 4) // (3 if num_classes == 51 else 20)
        assert sheet.getpixel((width + 40, 56)) == 20
        assert sheet.getpixel((width - 2, 56)) == 255


def test_the_card_of_many_classes_has_those_with_the_fewest_and_the_most_images(write_classes):
    uri, manifest = write_classes(1000)
    rows = list_classes(manifest)
    assert rows[0] == ("kind 00998", "2", "0", "0", "2")
    assert rows[1] == ("kind 00997", "2", "1", "0", "3")
    assert rows[-2] == ("kind 00999", "2", "9", "0", "11")
    assert rows[-1] == ("all", "2000", "2004", "0", "4004")
    assert len(rows) == 10 + 1 + 10 + 1
    assert rows[10] == ("... 980 classes between, see manifest.json", "", "", "", "")
    write_card(uri, manifest)
    card = storage.read_bytes(storage.join(uri, "README.md")).decode()
    assert card.startswith("# 4004 images of 1000 classes\n")
    assert "![the first images of 400 classes](contact_sheet.png)" in card
    assert f"fingerprint {manifest.fingerprint[:12]}\n" in card
    assert len(card) < 4000


def test_fifty_classes_are_all_in_the_card_in_their_order(write_classes):
    _, manifest = write_classes(50)
    assert [row[0] for row in list_classes(manifest)] == [*manifest.class_names, "all"]


@pytest.mark.parametrize(
    ("gray_levels", "value_range", "warning"),
    [
        (None, None, ""),
        ((100, 163), None, ""),
        ((100, 162), None, "warning: 99% of pixels lie in 63 of 256 gray levels, 100-162 (contact_sheet.png)"),
        ((64, 127), (0, 4096), ""),
        (
            (64, 126),
            (0, 4096),
            "warning: 99% of pixels lie in 63 of 256 gray levels, 64-126 (contact_sheet.png); to spread them "
            "over all gray levels, use --value-range 1024:2032 (darker values become black, brighter ones white)",
        ),
    ],
)
def test_fewer_than_64_gray_levels_are_warned_about(write_dataset, gray_levels, value_range, warning):
    written = write_dataset()
    counts = [int(gray_levels[0] <= level <= gray_levels[1]) for level in range(256)] if gray_levels else None
    manifest = written.manifest.model_copy(update={"value_counts": counts, "value_range": value_range})
    assert describe_few_levels(manifest) == warning
    write_card(written.uri, manifest)
    card = storage.read_bytes(storage.join(written.uri, "README.md")).decode()
    assert (f"\n{warning}\n" in card) if warning else ("warning" not in card)
