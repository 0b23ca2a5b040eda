import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tests.conftest import TINY_NETWORKS
from trainer.architectures import ARCHITECTURES, build_model
from trainer.record.checkpoint import read_variables
from trainer.record.run_folder import RunFolder
from trainer.training.export import build_export, write_exports
from trainer.training.network import build_network_for_evaluation
from trainer.training.scaling import build_scaling

SIZE = 22
NETWORK = {"first_filters": 3, "later_filters": [4], "dense_units": 8}
# All kinds of layers, and few of each.
SHORT: dict[str, dict] = {
    **TINY_NETWORKS,
    "cnn_tapered": {**TINY_NETWORKS["cnn_tapered"], "batch_norm": True, "dropout": 0.5},
}


@pytest.fixture
def manifest(write_dataset):
    return write_dataset(rows=(6, 1, 1), image_size=SIZE).manifest


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 1), np.uint8)


def expected_scores(network, manifest, config, images: np.ndarray) -> np.ndarray:
    scaled = build_scaling(manifest, config)(images.astype(np.float32))
    logits = network(scaled, training=False).numpy().astype(np.float64)
    if config.arch == "cnn_sigmoid":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("arch", "precision"), [("cnn_softmax", "float32"), ("cnn_sigmoid", "mixed_bfloat16")])
def test_an_export_scores_raw_pixels_as_the_network_does(make_config, manifest, images, arch, precision):
    config = make_config(arch=arch, precision=precision, arch_arguments=NETWORK)
    network = build_network_for_evaluation(manifest, config)
    try:
        expected = expected_scores(network.model, manifest, config, images)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    exported = build_export(read_variables(network.model.variables), manifest, config)
    scores = exported(images).numpy()
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5 if precision == "float32" else 0.03)
    assert exported.name == arch


# Without this package, and with Keras 3 as tf.keras, as where most people would open the file.
_LOAD = """
import json, sys, warnings, zipfile, numpy, keras, tensorflow
warnings.simplefilter("error", UserWarning)
assert tensorflow.keras.Model is keras.Model and keras.__version__ >= "3"
for path in sys.argv[1:]:
    model = keras.saving.load_model(path)
    names = json.loads(zipfile.ZipFile(path).read("metadata.json"))["class_names"]
    numpy.savez(path + ".npz", scores=model(numpy.load(path + ".images.npy")), names=names)
    assert not [name for name in sys.modules if name.startswith(("tf_keras", "trainer"))]
"""


def build_random(manifest, config):
    """Return a network of which no two arrays are alike, as those of a new BatchNorm are."""
    network = build_model(config.arch, manifest.image_size, manifest.channels, 3, config.arch_arguments)
    random = np.random.default_rng(0)
    for variable in network.variables:
        if len(variable.shape) == 1:
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        else:
            variable.assign(random.normal(0, 0.3 * np.prod(variable.shape[:-1]) ** -0.5, variable.shape))
    return network


def write_random_export(manifest, config, run: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """Write the exports of a network of random weights; return images, and the scores that the network gives them."""
    network = build_random(manifest, config)
    write_exports(run, read_variables(network.variables), manifest, config)
    shape = (3, manifest.image_size, manifest.image_size, manifest.channels)
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    return images, expected_scores(network, manifest, config, images)


# One of each kind of network; the others differ in numbers only.
KINDS = ["cnn_sigmoid", "cnn_tapered", "alexnet", "googlenet", "resnet50"]


@pytest.mark.parametrize("archs", [KINDS, pytest.param([*SHORT], marks=pytest.mark.slow)], ids=["kinds", "all"])
def test_keras_3_opens_every_architecture_and_gives_equal_scores(make_config, write_dataset, tmp_path, archs):
    expected = {}
    for arch in archs:
        size = max(8, ARCHITECTURES[arch].min_image_size)
        channels, scaling = (3, "image") if arch == "resnet50" else (1, "standardize")
        manifest = write_dataset(rows=(1, 1, 1), image_size=size, channels=channels).manifest
        config = make_config(arch=arch, arch_arguments=SHORT[arch], input_scaling=scaling)
        run = RunFolder(str(tmp_path / arch))
        images, expected[run.path("model.keras")] = write_random_export(manifest, config, run)
        np.save(run.path("model.keras.images.npy"), images)
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    command = [sys.executable, "-c", _LOAD, *expected]
    subprocess.run(command, check=True, env={**environment, "KERAS_BACKEND": "tensorflow"}, cwd=tmp_path)
    for path, scores in expected.items():
        loaded = np.load(f"{path}.npz")
        np.testing.assert_allclose(loaded["scores"], scores, rtol=0, atol=1e-6)
        assert loaded["names"].tolist() == manifest.class_names


@pytest.mark.parametrize("arch", ["cnn_sigmoid", "resnet18"])
def test_tf_keras_opens_the_same_file(make_config, write_dataset, tmp_path, arch):
    manifest = write_dataset(rows=(1, 1, 1), image_size=32).manifest
    config, run = make_config(arch=arch, arch_arguments=SHORT[arch]), RunFolder(str(tmp_path / "run"))
    images, scores = write_random_export(manifest, config, run)
    loaded = keras.models.load_model(run.path("model.keras"))
    np.testing.assert_allclose(loaded(images), scores, rtol=0, atol=1e-6)


def run_tflite(path: str, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    names = json.loads(zipfile.ZipFile(path).read("class_names.json"))
    return tf.lite.Interpreter(path).get_signature_runner("serving_default")(images=images)["scores"], names


def run_onnx(path: str, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    return session.run(["scores"], {"images": images})[0], names


@pytest.mark.parametrize(
    "arch",
    [one if one == "cnn_tapered" else pytest.param(one, marks=pytest.mark.slow) for one in SHORT],
)
@pytest.mark.parametrize(("export", "run_file"), [("tflite", run_tflite), ("onnx", run_onnx)])
def test_other_runtimes_give_equal_scores(make_config, write_dataset, tmp_path, arch, export, run_file):
    manifest = write_dataset(rows=(1, 1, 1), image_size=max(8, ARCHITECTURES[arch].min_image_size)).manifest
    config = make_config(arch=arch, arch_arguments=SHORT[arch], export=export)
    run = RunFolder(str(tmp_path / "run"))
    images, scores = write_random_export(manifest, config, run)
    given, names = run_file(run.path(f"model.{export}"), images)
    np.testing.assert_allclose(given, scores, rtol=0, atol=1e-6)
    assert names == manifest.class_names


def test_only_the_keras_model_is_written_without_being_asked(make_config, manifest, tmp_path):
    config, run = make_config(arch_arguments=NETWORK), RunFolder(str(tmp_path / "run"))
    network = build_network_for_evaluation(manifest, config)
    write_exports(run, read_variables(network.model.variables), manifest, config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.keras"]
