"""Export the best weights of a run: as a Keras model, and on request as a SavedModel for plain TensorFlow."""

import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.architectures import ARCHITECTURES, build_model
from trainer.config.config import TrainConfig
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder
from trainer.runtime.errors import InputError
from trainer.training.scaling import build_scaling


def build_export(arrays: checkpoints.Arrays, manifest: Manifest, config: TrainConfig) -> Any:
    """Return a `tf_keras.Model` without strategy or mixed precision.

    It takes uint8 or float ``[batch, height, width, channels]`` with values 0-255 and returns float32 scores
    ``[batch, num_classes]``.
    """
    keras.mixed_precision.set_global_policy("float32")
    network = build_model(
        config.arch, manifest.image_size, manifest.channels, manifest.num_classes, config.arch_arguments
    )
    checkpoints.assign_variables(network.variables, arrays)
    images = keras.Input((manifest.image_size, manifest.image_size, manifest.channels), name="images")
    scaled = build_scaling(manifest, config)(images)
    scores = keras.layers.Activation(ARCHITECTURES[config.arch].head, name="scores")(network(scaled))
    return keras.Model(images, scores, name=config.arch)


def load_export(run: RunFolder) -> Any:
    """Return the model of a finished run as `build_export` makes it, from the best checkpoint.

    ``model.keras`` is not used: loading somebody else's file can run code that is in it.

    Raises:
        InputError: the checkpoint is gone or damaged.
    """
    record, result = run.read_record(), run.read_result()
    if record is None or result is None:
        raise InputError(f"RUN {run.uri} is not finished; run its command again to finish it")
    best = checkpoints.find_named(run.checkpoints, result.best_checkpoint)
    content = checkpoints.read_file(run.checkpoints, best, checkpoints.MODEL_NAME)
    return build_export(checkpoints.from_safetensors(content), run.read_manifest(), record.config)


def write_exports(run: RunFolder, arrays: checkpoints.Arrays, manifest: Manifest, config: TrainConfig) -> None:
    """Write ``model.keras``, and ``saved_model/`` where the config asks for it."""
    model = build_export(arrays, manifest, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        run.write(path.read_bytes(), "model.keras")
        if config.export == "saved_model":
            _save_saved_model(model, manifest, Path(folder, "saved_model"))
            for file in Path(folder, "saved_model").rglob("*"):
                if file.is_file():
                    run.write(file.read_bytes(), *file.relative_to(folder).parts)


def _save_saved_model(model: Any, manifest: Manifest, folder: Path) -> None:
    """Save the signature ``serving_default``, from images (uint8) to scores (float32) and label (the class name)."""
    size = manifest.image_size
    class_names = tf.constant(manifest.class_names)

    @tf.function(  # type: ignore[untyped-decorator]
        input_signature=[tf.TensorSpec([None, size, size, manifest.channels], tf.uint8, name="images")]
    )
    def serve(images: Any) -> dict[str, Any]:
        scores = model(tf.cast(images, tf.float32), training=False)
        return {"scores": scores, "label": tf.gather(class_names, tf.argmax(scores, axis=1))}

    module = tf.Module()
    module.model = model
    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})
