from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import PrepareConfig
from data_prep.preview import preview_source
from data_prep.sources import find_images


@pytest.fixture
def source(tmp_path) -> Path:
    """Two classes of photos in two sizes, one of them in gray, beside what is no image."""
    for index in range(3):
        for name, shape in (("cat", (20, 30, 3)), ("dog", (25, 25))):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.full(shape, index, np.uint8)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def preview(source: Path, **options) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    key = ""
    for line in preview_source(find_images(str(source)), PrepareConfig(**options)):
        key = line[:10].strip() or key
        lines.setdefault(key, []).append(line[10:])
    return lines


def test_it_says_what_was_recognized_and_what_will_be_left_out(source):
    assert preview(source, image_size=100, channels=3, resize="pad") == {
        "source": [f"{source}: folder, 7 images of 2 classes"],
        "classes": ["cat 4, dog 3"],
        "splits": ["none in the source: 0.15 of each class become val, 0.15 test"],
        "sizes": ["3 30x20, 3 25x25 (of 7 looked at), each becomes 100x100 (pad)"],
        "channels": ["3 color, 3 gray (of 7 looked at), each becomes color"],
        "sample": ["cat/0.png: cat", "dog/0.png: dog"],
        "left out": ["1 not_an_image_name", "1 damaged (of 7 looked at)"],
        "dataset": ["about 0 MB of pixels"],
    }


def test_splits_of_the_source_are_kept(source, tmp_path):
    root = tmp_path.parent / f"{tmp_path.name}-split"
    root.mkdir()
    (root / "train").symlink_to(source)
    (root / "test").symlink_to(source)
    assert preview(root)["splits"] == ["those of the source: train 7, test 7; 0.15 of each class become val"]


def test_of_many_images_some_are_looked_at(source):
    for index in range(300):
        (source / "dog" / f"{index + 10}.png").write_bytes(b"")
    lines = preview(source)
    assert lines["source"] == [f"{source}: folder, 307 images of 2 classes"]
    assert lines["sizes"][0].startswith("1 30x20")
    assert "(of 100 looked at)" in lines["left out"][1]
