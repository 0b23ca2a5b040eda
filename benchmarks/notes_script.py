"""The notes' own script: `model.fit` on float32 arrays in memory, pixels times 1/255, batch 32, no augmentation.

Adam at its default rate, 0.001, for every network but AlexNet, which the notes trained by SGD at 0.001. It imports no
more than it needs, so that the seconds of its process are the script's.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
SGD_ARCHS = ("alexnet",)


def build_script(dataset: str, arch: str, seed: int = 0) -> tuple[Any, tuple[Any, Any], tuple[Any, Any]]:
    """Return the compiled model, and images and labels of train and of val."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tf_keras as keras

    from trainer.architectures import ARCHITECTURES, build_model
    from trainer.training.dataset import load_manifest, open_split

    keras.utils.set_random_seed(seed)
    manifest = load_manifest(dataset)
    splits = [open_split(dataset, manifest, name) for name in ("train", "val")]
    train, val = [((split.take(np.arange(len(split))) / 255.0).astype("float32"), split.labels) for split in splits]
    network = build_model(arch, manifest.image_size, manifest.channels, manifest.num_classes)
    model = keras.Sequential([network, keras.layers.Activation(ARCHITECTURES[arch].head)])
    optimizer = keras.optimizers.SGD(0.001) if arch in SGD_ARCHS else "adam"
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, train, val


def main(dataset: str, arch: str, epochs: str, seed: str, output: str) -> None:
    """Train, and write when each epoch ended, by clock and by cores, and what the network then predicted of val.

    The predictions take the place of the validation by `fit`, which is the same pass over the same images.
    """
    model, train, (images, labels) = build_script(dataset, arch, int(seed))
    import tf_keras as keras

    ended, cpu_seconds, predicted, losses = [], [], [], []

    class Recorder(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            scores = self.model.predict(images, batch_size=BATCH, verbose=0)
            predicted.append(scores.argmax(axis=1).tolist())
            losses.append(keras.losses.sparse_categorical_crossentropy(labels, scores).numpy().tolist())
            ended.append(time.time())
            cpu_seconds.append(time.process_time())

    model.fit(*train, batch_size=BATCH, epochs=int(epochs), verbose=0, callbacks=[Recorder()])
    record = {"ended": ended, "cpu_seconds": cpu_seconds, "predicted": predicted, "losses": losses}
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
