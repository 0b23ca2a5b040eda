import numpy as np
import pytest
import tf_keras as keras

from trainer.record.checkpoint import read_variables
from trainer.record.run_folder import RunFolder
from trainer.training.export import build_export, write_exports
from trainer.training.scaling import build_scaling
from trainer.training.step import build_network_for_evaluation

SIZE = 22
NETWORK = {"first_filters": 3, "later_filters": [4], "dense_units": 8}


@pytest.fixture
def manifest(write_dataset):
    return write_dataset(rows=(6, 1, 1), image_size=SIZE).manifest


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 1), np.uint8)


def expected_scores(network, manifest, config, images: np.ndarray) -> np.ndarray:
    scaled = build_scaling(manifest, config)(images.astype(np.float32))
    logits = network.model(scaled, training=False).numpy().astype(np.float64)
    if config.arch == "cnn_sigmoid":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("arch", "precision"), [("cnn_softmax", "float32"), ("cnn_sigmoid", "mixed_bfloat16")])
def test_an_export_scores_raw_pixels_as_the_network_does(make_config, manifest, images, arch, precision):
    config = make_config(arch=arch, precision=precision, arch_arguments=NETWORK)
    network = build_network_for_evaluation(manifest, config)
    try:
        expected = expected_scores(network, manifest, config, images)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    exported = build_export(read_variables(network.model.variables), manifest, config)
    scores = exported(images).numpy()
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5 if precision == "float32" else 0.03)
    assert exported.name == arch


def test_a_keras_model_is_always_written(make_config, manifest, images, tmp_path):
    config, run = make_config(arch_arguments=NETWORK), RunFolder(str(tmp_path / "run"))
    network = build_network_for_evaluation(manifest, config)
    write_exports(run, read_variables(network.model.variables), manifest, config)
    loaded = keras.models.load_model(run.path("model.keras"), compile=False)
    np.testing.assert_allclose(loaded(images), expected_scores(network, manifest, config, images), atol=1e-5)
    assert not (tmp_path / "run" / "saved_model").exists()
