"""Transfer learning: a network whose layers start from the weights of another one.

Layers are matched by name. The last layer is loaded only if it fits, so a trunk can serve other classes.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from trainer.config.pretrained import find_published, read_published
from trainer.record import checkpoint as checkpoints
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_count

HEAD = "logits"
# What `tf_keras.applications` calls the last layer of the networks whose weight files are read here.
_HEAD_IN_APPLICATIONS = "predictions"

# In the order of `tf_keras`, for any layer that has some of them: the first two are for depthwise and separable ones.
_WEIGHT_NAMES = (
    "depthwise_kernel",
    "pointwise_kernel",
    "kernel",
    "bias",
    "gamma",
    "beta",
    "moving_mean",
    "moving_variance",
)

LayerWeights = Mapping[str, list[npt.NDArray[np.float32]]]
"""The arrays of each layer by its name, in the order of `tf_keras` (kernel, bias; gamma, beta, mean, variance)."""


@dataclass(frozen=True)
class Transfer:
    """Which layers were loaded."""

    loaded: list[str]
    initialised: list[str]
    """Layers that keep their random weights."""

    def __str__(self) -> str:
        kept = f"; at random: {', '.join(self.initialised)}" if self.initialised else ""
        loaded = format_count(len(self.loaded), "layer")
        return f"{loaded} with weights from elsewhere, {self.loaded[0]} to {self.loaded[-1]}{kept}"


def read_weights(location: str) -> LayerWeights:
    """Return the weights of a network by layer.

    Args:
        location: local path or s3:// URI of a run, whose best checkpoint is used, or of a ``.safetensors`` or ``.h5``
            file; the latter as `tf_keras` writes it with ``save_weights`` or ``save``, as are the files of
            Keras applications.

    Raises:
        InputError: there is nothing that can be read.
    """
    if location.endswith(".safetensors"):
        return _read_safetensors(location)
    if location.endswith((".h5", ".hdf5")):
        return _parse_hdf5(location, _read_file(location))
    folder = storage.join(location, "checkpoints")
    best = checkpoints.find_best(folder)
    if best is None:
        raise InputError(
            f"--init-from {location} is neither a run with a checkpoint nor a .safetensors or .h5 file; give one"
        )
    arrays = checkpoints.from_safetensors(checkpoints.read_file(folder, best, checkpoints.MODEL_NAME))
    return _by_layer(location, arrays)


def read_initial_weights(init_from: str, storage_uri: str, model: Any) -> LayerWeights:
    """Return what ``--init-from`` names, for a `tf_keras.Model`.

    Args:
        init_from: a run or a file, see `read_weights`, or ``keras:NAME``.
        storage_uri: the storage of the run, which has a copy of published weights.
        model: the network; layers of published weights are matched to its layers by their order, as Keras does: some
            have no names there.

    Raises:
        InputError: it cannot be read.
    """
    published = find_published(init_from)
    if published is None:
        return read_weights(init_from)
    of_file = _parse_hdf5(init_from, read_published(published, storage_uri))
    arrays = [of_layer for of_layer in of_file.values() if of_layer]
    if published.is_bgr:
        arrays[0] = [np.flip(arrays[0][0], axis=2), *arrays[0][1:]]
    return dict(zip((layer.name for layer in model.layers if layer.weights), arrays, strict=False))


def _read_file(location: str) -> bytes:
    try:
        return storage.read_bytes(location)
    except FileNotFoundError as error:
        raise InputError(f"--init-from {location}: there is no such file") from error


def _read_safetensors(location: str) -> LayerWeights:
    try:
        arrays = checkpoints.from_safetensors(_read_file(location))
    except SafetensorError as error:
        raise InputError(f"--init-from {location} is not a safetensors file: {error}; give another one") from error
    return _by_layer(location, arrays)


def _by_layer(location: str, arrays: checkpoints.Arrays) -> LayerWeights:
    if unknown := [name for name in arrays if _weight_name(name) not in _WEIGHT_NAMES]:
        raise InputError(
            f"--init-from {location} holds {unknown[0]}, which is not a variable of tf_keras "
            f"({', '.join(_WEIGHT_NAMES)}); give a run, or the model.safetensors of one of its checkpoints"
        )
    layers: dict[str, list[npt.NDArray[np.float32]]] = {}
    # safetensors sorts by name.
    for name in sorted(arrays, key=lambda name: _WEIGHT_NAMES.index(_weight_name(name))):
        layers.setdefault(name.partition("/")[0], []).append(arrays[name])
    return layers


def _weight_name(variable: str) -> str:
    return variable.rpartition("/")[2].partition(":")[0]


def _parse_hdf5(location: str, content: bytes) -> LayerWeights:
    import h5py

    try:
        opened = h5py.File(io.BytesIO(content))
    except OSError as error:
        raise InputError(f"--init-from {location} is not an HDF5 file: {error}; give another one") from error
    with opened as file:
        # `save` writes the weights in a group beside the network, `save_weights` writes them alone.
        root = file.get("model_weights", file)
        if "layer_names" not in root.attrs:
            raise InputError(
                f"--init-from {location} has no layer names, unlike the Keras-applications files; "
                "write it with tf_keras' model.save_weights('NAME.h5')"
            )
        return {
            _text(layer).replace(_HEAD_IN_APPLICATIONS, HEAD): [
                np.asarray(root[_text(layer)][_text(weight)]) for weight in root[_text(layer)].attrs["weight_names"]
            ]
            for layer in root.attrs["layer_names"]
        }


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def transfer_weights(model: Any, weights: LayerWeights) -> Transfer:
    """Set each layer of a `tf_keras.Model` to the weights of the same name.

    A first convolution with another number of channels treats gray as the mean of red, green and blue. Dense layers of
    another shape, because of another image size or number of classes, keep their random weights.

    Raises:
        InputError: no name matches, or the weights of a convolution have another shape.
    """
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    matching = [name for name in layers if weights.get(name)]
    if not matching:
        raise InputError(
            f"--init-from: no layer name matches the network's: the weights have {', '.join(list(weights)[:4])}, ..., "
            f"the network has {', '.join(list(layers)[:4])}, ...; give weights of the same family"
        )
    loaded = []
    for name in matching:
        layer, shapes = layers[name], [tuple(weight.shape) for weight in layers[name].weights]
        arrays = [_fit_channels(array, shape) for array, shape in zip(weights[name], shapes, strict=False)]
        if [array.shape for array in arrays] == shapes:
            layer.set_weights(arrays)
            loaded.append(name)
        elif len(shapes[0]) == 4 or len(arrays) != len(shapes):
            there = [array.shape for array in weights[name]]
            raise InputError(
                f"--init-from: layer {name} has weights of shapes {there}, the network needs {shapes}; give the same "
                "--arch and --arch-argument as those weights have"
            )
    return Transfer(loaded, [name for name in layers if name not in loaded])


def _fit_channels(array: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a kernel ``[height, width, channels, filters]`` for gray instead of RGB input, or the reverse."""
    if array.ndim == 4 and (array.shape[2], shape[2]) == (3, 1):
        return np.asarray(array.sum(axis=2, keepdims=True))
    if array.ndim == 4 and (array.shape[2], shape[2]) == (1, 3):
        return np.repeat(array / 3, 3, axis=2)
    return array


def freeze_trunk(model: Any) -> None:
    """Make only the last layer trainable; BatchNorm then uses its moving averages without updating them."""
    for layer in model.layers:
        layer.trainable = layer.name == HEAD
