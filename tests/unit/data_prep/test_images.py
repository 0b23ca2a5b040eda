from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.decode import ImageOptions
from data_prep.images import decode_file, decode_listed, slice_images
from data_prep.sources import Source, find_images
from trainer.runtime.errors import InputError

OPTIONS = ImageOptions(image_size=4)


@pytest.fixture
def source(tmp_path) -> Source:
    for name, value in (("a/1", 10), ("a/2", 20), ("b/3", 30)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9), value).save(path)
    (tmp_path / "b" / "page.png").write_text("<html>")
    return find_images(str(tmp_path))


def test_images_are_decoded_in_order_and_others_have_their_reason(source):
    Path(source.uri, "a", "2.png").unlink()
    contents, outcomes = zip(*decode_listed(source.uri, source.images, OPTIONS), strict=True)
    assert [content is None for content in contents] == [False, True, False, False]
    assert outcomes[1] == "unreadable"
    assert outcomes[3] == "not_an_image"
    np.testing.assert_array_equal(outcomes[0], np.full((4, 4, 1), 10))
    np.testing.assert_array_equal(outcomes[2], np.full((4, 4, 1), 30))


@pytest.mark.parametrize(("image_size", "sizes"), [(250, [256, 256, 88]), (4096, [2] * 300)])
def test_slices_cover_all_images_in_order_and_are_bounded(source, image_size, sizes):
    many = replace(source, images=source.images.take([0] * 600))
    slices = slice_images(many, ImageOptions(image_size=image_size))
    assert [row for rows in slices for row in rows] == list(range(600))
    assert [len(rows) for rows in slices] == sizes


def test_one_file_is_decoded_as_for_a_dataset(source):
    np.testing.assert_array_equal(decode_file(f"{source.uri}/a/2.png", OPTIONS), np.full((4, 4, 1), 20))


@pytest.mark.parametrize("name", ["b/page.png", "b/missing.png"])
def test_a_file_that_is_no_image_is_refused(source, name):
    with pytest.raises(InputError, match=rf"{name} cannot be used: .*; give image files"):
        decode_file(f"{source.uri}/{name}", OPTIONS)
