import hashlib
from dataclasses import replace

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.architectures import build_model
from trainer.config.pretrained import PUBLISHED, locate_published
from trainer.record.checkpoint import MODEL_NAME, Position, read_variables, save_checkpoint, to_safetensors
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.training.transfer import freeze_trunk, read_initial_weights, read_weights, transfer_weights

TINY_VGG = {"filters": (4, 4, 8, 8, 8), "dense_units": 16}
TINY_RESNET = {"width": 0.125, "blocks": [1, 1, 1, 2]}


def build_vgg(num_classes=3, channels=1, image_size=32, seed=0, **arguments):
    keras.utils.set_random_seed(seed)
    return build_model("vgg16", image_size, channels, num_classes, {**TINY_VGG, **arguments})


def images(channels=1, size=32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, size, size, channels)).astype(np.float32)


def features(model, batch: np.ndarray) -> np.ndarray:
    """The input of the network's last layer."""
    return keras.Model(model.inputs, model.layers[-2].output)(batch, training=False).numpy()


@pytest.fixture
def run_of():
    """Return a function that writes a run whose best checkpoint holds a model's weights."""

    def write(model, uri: str) -> str:
        history = [{"epoch": 1.0, "val_accuracy": 0.5, "val_loss": 1.0}]
        content = to_safetensors(read_variables(model.variables))
        position = Position(epoch=1, epoch_rows=0, step=10, global_batch_size=4, history=history)
        save_checkpoint(RunFolder(uri).checkpoints, position, {MODEL_NAME: content})
        return uri

    return write


@pytest.fixture(params=["run", "safetensors", "h5", "whole_h5"])
def written(request, tmp_path, run_of):
    """Return a function that writes a model's weights in each form that is read."""

    def write(model) -> str:
        if request.param == "run":
            return run_of(model, str(tmp_path / "runs" / "first"))
        if request.param == "safetensors":
            path = str(tmp_path / "model.safetensors")
            storage.write_bytes(path, to_safetensors(read_variables(model.variables)))
            return path
        path = str(tmp_path / "weights.h5")
        (model.save_weights if request.param == "h5" else model.save)(path)
        return path

    return write


@pytest.mark.parametrize("arch", ["vgg16", "resnet18"])
def test_the_same_network_is_taken_over_whole(arch, written):
    arguments = TINY_VGG if arch == "vgg16" else TINY_RESNET
    one, other = (build_model(arch, 32, 1, 3, arguments) for _ in range(2))
    for variable in one.variables:
        variable.assign(np.random.default_rng(len(variable.name)).uniform(0.1, 0.2, variable.shape))
    transfer = transfer_weights(other, read_weights(written(one)))
    assert transfer.initialised == []
    np.testing.assert_allclose(other(images(), training=False), one(images(), training=False), rtol=1e-6)


def build_separable():
    layers = [
        keras.layers.SeparableConv2D(5, 3, name="separable"),
        keras.layers.DepthwiseConv2D(3, name="depthwise"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, name="logits"),
    ]
    return keras.Sequential([keras.Input((32, 32, 2)), *layers])


def test_separable_and_depthwise_kernels_are_taken_over(written):
    one, other = build_separable(), build_separable()
    for seed, variable in enumerate(one.variables):
        variable.assign(np.random.default_rng(seed).uniform(0.1, 0.2, variable.shape))
    transfer = transfer_weights(other, read_weights(written(one)))
    assert transfer.loaded == ["separable", "depthwise", "norm", "logits"]
    np.testing.assert_allclose(other(images(2), training=False), one(images(2), training=False), rtol=1e-6)


def test_another_number_of_classes_gets_a_new_head_on_the_same_trunk(written):
    one, other = build_vgg(num_classes=3), build_vgg(num_classes=5, seed=1)
    head = other.get_layer("logits").get_weights()
    transfer = transfer_weights(other, read_weights(written(one)))
    assert transfer.initialised == ["logits"]
    assert str(transfer) == "15 layers with weights from elsewhere, block1_conv1 to fc2; at random: logits"
    np.testing.assert_allclose(features(other, images()), features(one, images()), rtol=1e-5)
    np.testing.assert_array_equal(other.get_layer("logits").get_weights()[0], head[0])


def test_the_head_of_the_applications_is_the_head_here(tmp_path):
    original = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="predictions")])
    original.save_weights(tmp_path / "w.h5")
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="logits")])
    assert transfer_weights(network, read_weights(str(tmp_path / "w.h5"))).loaded == ["logits"]
    np.testing.assert_array_equal(network.get_weights()[0], original.get_weights()[0])


def test_an_image_size_that_changes_the_dense_layers_keeps_the_convolutions(run_of, tmp_path):
    one, other = build_vgg(image_size=32), build_vgg(image_size=64, seed=1)
    transfer = transfer_weights(other, read_weights(run_of(one, str(tmp_path / "run"))))
    assert transfer.initialised == ["fc1"]
    np.testing.assert_array_equal(
        other.get_layer("block5_conv3").get_weights()[0], one.get_layer("block5_conv3").get_weights()[0]
    )


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Returns a function that makes a model's weights those that are published as ``keras:NAME``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(model, name: str) -> None:
        # As in the files of Keras: every layer but the last in order, those of convolutions by numbers of another kind.
        path = tmp_path / "published.h5"
        with h5py.File(path, "w") as file:
            layers = {layer.name.replace("conv2d_", "convolution2d_"): layer for layer in model.layers[:-1]}
            file.attrs["layer_names"] = [name.encode() for name in layers]
            for name_of_layer, layer in layers.items():
                group = file.create_group(name_of_layer)
                group.attrs["weight_names"] = [weight.name.encode() for weight in layer.weights]
                for weight in layer.weights:
                    group[weight.name] = weight.numpy()
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], md5=digest))
        storage.write_bytes(locate_published(PUBLISHED[name], str(tmp_path)), path.read_bytes())

    return write


def test_published_weights_are_matched_by_the_order_of_layers(publish, tmp_path):
    one, other = (build_model("xception", 32, 3, 3, {"width": 0.125, "middle_blocks": 1}) for _ in range(2))
    for variable in one.variables:
        variable.assign(np.random.default_rng(len(variable.name)).uniform(0.1, 0.2, variable.shape))
    publish(one, "xception")
    transfer = transfer_weights(other, read_initial_weights("keras:xception", str(tmp_path), other))
    assert transfer.initialised == ["logits"]
    np.testing.assert_allclose(features(other, images(3)), features(one, images(3)), rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_published_weights_that_take_blue_first_are_turned_around(publish, tmp_path, channels):
    one, other = build_vgg(channels=3), build_vgg(channels=channels, seed=1)
    publish(one, "vgg16")
    transfer = transfer_weights(other, read_initial_weights("keras:vgg16", str(tmp_path), other))
    assert transfer.initialised == ["logits"]
    batch = images(channels)
    blue_first = np.flip(batch, axis=3) if channels == 3 else batch.repeat(3, axis=3)
    np.testing.assert_allclose(features(other, batch), features(one, blue_first), rtol=1e-4, atol=1e-6)


def test_gray_images_give_a_colour_trunk_the_same_answers():
    colour, gray = build_vgg(channels=3), build_vgg(channels=1, seed=1)
    transfer_weights(gray, {layer.name: layer.get_weights() for layer in colour.layers})
    np.testing.assert_allclose(gray(images()), colour(images().repeat(3, axis=3)), rtol=1e-4, atol=1e-6)


def test_a_gray_trunk_sees_the_mean_of_the_colours():
    gray, colour = build_vgg(channels=1), build_vgg(channels=3, seed=1)
    transfer_weights(colour, {layer.name: layer.get_weights() for layer in gray.layers})
    batch = images(channels=3)
    np.testing.assert_allclose(colour(batch), gray(batch.mean(axis=3, keepdims=True)), rtol=1e-4, atol=1e-6)


def test_a_frozen_trunk_stays_and_its_head_moves():
    model = build_model("resnet18", 32, 1, 3, TINY_RESNET)
    freeze_trunk(model)
    before = read_variables(model.variables)
    optimizer = keras.optimizers.SGD(1.0)
    with tf.GradientTape() as tape:
        logits = model(images(), training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1, 2, 0], logits))
    optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    )
    moved = {name for name, array in read_variables(model.variables).items() if (array != before[name]).any()}
    assert moved == {"logits/kernel:0", "logits/bias:0"}


def test_weights_of_another_family_are_refused():
    with pytest.raises(InputError, match=r"the weights have conv1.*the network has block1_conv1"):
        transfer_weights(build_vgg(), {"conv1": [np.zeros(3)]})


def test_convolutions_of_another_width_are_refused():
    wide = build_vgg(filters=(8, 8, 8, 8, 8))
    with pytest.raises(
        InputError, match=r"layer block1_conv1 has weights of shapes .*, 8\), \(8,\)\].* the same --arch"
    ):
        transfer_weights(build_vgg(), {layer.name: layer.get_weights() for layer in wide.layers})


def test_a_place_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither a run with a checkpoint nor"):
        read_weights(str(tmp_path))
    with pytest.raises(InputError, match="there is no such file"):
        read_weights(str(tmp_path / "none.h5"))
    build_vgg().save_weights(tmp_path / "new.weights.h5")
    with pytest.raises(InputError, match="has no layer names"):
        read_weights(str(tmp_path / "new.weights.h5"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("torch.safetensors", to_safetensors({"conv1.weight": np.zeros(3, np.float32)}), "conv1.weight, which is not"),
        ("cut.safetensors", b"{", "is not a safetensors file"),
        ("cut.h5", b"{", "is not an HDF5 file"),
    ],
)
def test_a_file_that_is_not_of_keras_or_damaged_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(str(tmp_path / name))
