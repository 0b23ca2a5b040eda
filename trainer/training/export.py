"""Export the best weights of a run: as a Keras model, and on request as SavedModel, TensorFlow Lite or ONNX."""

import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tf_keras as keras

from data_prep.manifest import Manifest
from trainer.architectures import ARCHITECTURES, build_model
from trainer.config.config import TrainConfig
from trainer.record import checkpoint as checkpoints
from trainer.record.run_folder import RunFolder
from trainer.runtime.errors import InputError
from trainer.training.dataset import ImageSplit
from trainer.training.scaling import build_scaling


def build_export(arrays: checkpoints.Arrays, manifest: Manifest, config: TrainConfig, *, is_flat: bool = False) -> Any:
    """Return a `tf_keras.Model` without strategy or mixed precision.

    It takes uint8 or float ``[batch, height, width, channels]`` with values 0-255 and returns float32 scores
    ``[batch, num_classes]``. Its layers are the input, the scaling, the network and the head; if it is flat, those of
    the network are in place of the network.
    """
    keras.mixed_precision.set_global_policy("float32")
    network = build_model(
        config.arch, manifest.image_size, manifest.channels, manifest.num_classes, config.arch_arguments
    )
    checkpoints.assign_variables(network.variables, arrays)
    images = keras.Input((manifest.image_size, manifest.image_size, manifest.channels), name="images")
    scaled = build_scaling(manifest, config)(images)
    logits = _apply_layers(network, scaled) if is_flat else network(scaled)
    scores = keras.layers.Activation(ARCHITECTURES[config.arch].head, name="scores")(logits)
    return keras.Model(images, scores, name=config.arch)


def _apply_layers(network: Any, tensor: Any) -> Any:
    """Apply the layers of a network to another input, and return its output."""
    applied = {id(network.input): tensor}
    for layer in network.layers:
        if not isinstance(layer, keras.layers.InputLayer):
            inputs, outputs = layer.input, layer.output
            applied[id(outputs)] = layer(tf.nest.map_structure(lambda one: applied[id(one)], inputs))
    return applied[id(network.output)]


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


def score_images(
    arrays: checkpoints.Arrays, manifest: Manifest, config: TrainConfig, split: ImageSplit, batch_size: int
) -> npt.NDArray[np.float32]:
    """Return the scores of the images of a split, float32 ``[rows, num_classes]``, by a network with these weights."""
    model = build_export(arrays, manifest, config)
    batches = np.array_split(np.arange(len(split)), range(batch_size, len(split), batch_size))
    return np.concatenate([model.predict_on_batch(split.take(rows)) for rows in batches])


def write_exports(run: RunFolder, arrays: checkpoints.Arrays, manifest: Manifest, config: TrainConfig) -> None:
    """Write ``model.keras``, and ``saved_model/``, ``model.tflite`` or ``model.onnx`` if the config asks for it."""
    model = build_export(arrays, manifest, config, is_flat=True)
    with tempfile.TemporaryDirectory() as folder:
        _save_keras_model(model, manifest.class_names, Path(folder, "model.keras"))
        match config.export:
            case "saved_model":
                _save_saved_model(model, manifest, Path(folder, "saved_model"))
            case "tflite":
                _save_tflite(model, manifest, Path(folder, "model.tflite"))
            case "onnx":
                _save_onnx(model, manifest, Path(folder, "model.onnx"))
        for file in Path(folder).rglob("*"):
            if file.is_file():
                run.write(file.read_bytes(), *file.relative_to(folder).parts)


def _save_keras_model(model: Any, class_names: Sequence[str], path: Path) -> None:
    """Save a flat model as a file that both Keras 3 and `tf_keras` open, with the class names in ``metadata.json``.

    A ``.keras`` file is a ZIP archive of three files. Keras 3 opens the one that `tf_keras` writes, if no model is
    within the model, except for a few terms of the config.
    """
    config = json.dumps(keras.saving.serialize_keras_object(model))
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w") as archive:
        weights = Path(folder, "model.weights.h5")
        model.save_weights(weights)
        metadata = {"keras_version": keras.__version__, "class_names": list(class_names)}
        archive.writestr("metadata.json", json.dumps(metadata))
        archive.writestr("config.json", json.dumps(json.loads(config, object_hook=_use_common_terms)))
        archive.write(weights, weights.name)


def _use_common_terms(serialized: dict[str, Any]) -> dict[str, Any]:
    """Return an object that `tf_keras` serialized in terms that Keras 3 knows, too."""
    config: Any = serialized.get("config")
    match serialized.get("class_name"), config:
        case "Functional", {"input_layers": [images], "output_layers": [scores]}:
            # The name that is public in both, and tensors in place of lists of one.
            public_name = {"module": "keras", "class_name": "Model", "registered_name": None}
            return {**serialized, **public_name, "config": {**config, "input_layers": images, "output_layers": scores}}
        case "BatchNormalization", {"axis": [axis]}:
            return {**serialized, "config": {**config, "axis": axis}}
        case "SeparableConv2D", {"groups": _}:
            # Arguments of a plain convolution, which `tf_keras` writes and does not use.
            used = {name: value for name, value in config.items() if not name.startswith(("groups", "kernel_"))}
            return {**serialized, "config": {**used, "kernel_size": config["kernel_size"]}}
    return serialized


def _compile_scores(model: Any, manifest: Manifest) -> Any:
    """Return the computation of ``scores`` (float32) from ``images`` (uint8), for files that Keras does not read."""
    shape = [None, manifest.image_size, manifest.image_size, manifest.channels]

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="images")])  # type: ignore[untyped-decorator]
    def compute_scores(images: Any) -> dict[str, Any]:
        return {"scores": model(tf.cast(images, tf.float32), training=False)}

    return compute_scores


def _save_saved_model(model: Any, manifest: Manifest, folder: Path) -> None:
    """Save the signature ``serving_default``, from images (uint8) to scores (float32) and label (the class name)."""
    compute_scores = _compile_scores(model, manifest)
    class_names = tf.constant(manifest.class_names)

    @tf.function(input_signature=compute_scores.input_signature)  # type: ignore[untyped-decorator]
    def serve(images: Any) -> dict[str, Any]:
        scores = compute_scores(images)["scores"]
        return {"scores": scores, "label": tf.gather(class_names, tf.argmax(scores, axis=1))}

    module = tf.Module()
    module.model = model
    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})


def _save_tflite(model: Any, manifest: Manifest, path: Path) -> None:
    """Save the signature ``serving_default``, from images (uint8) to scores (float32), for TensorFlow Lite.

    As is usual for metadata of such files, the file is a ZIP archive, too: of ``class_names.json``.
    """
    function = _compile_scores(model, manifest).get_concrete_function()
    path.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions([function], model).convert())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("class_names.json", json.dumps(manifest.class_names))


def _save_onnx(model: Any, manifest: Manifest, path: Path) -> None:
    """Save the graph from images (uint8) to scores (float32) as ONNX, with ``class_names`` in its metadata."""
    # Extra `onnx`.
    import onnx
    import tf2onnx

    compute_scores = _compile_scores(model, manifest)
    converted, _ = tf2onnx.convert.from_function(compute_scores, compute_scores.input_signature)
    onnx.helper.set_model_props(converted, {"class_names": json.dumps(manifest.class_names)})
    onnx.save(converted, path)
