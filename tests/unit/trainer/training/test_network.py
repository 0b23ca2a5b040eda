import numpy as np
import pytest
import tensorflow as tf

from trainer.record.checkpoint import read_variables
from trainer.runtime.errors import InputError
from trainer.training import network
from trainer.training.network import build_network, choose_communication

NETWORK = {"first_filters": 3, "later_filters": [4], "dense_units": 8}


@pytest.fixture
def manifest(write_dataset):
    return write_dataset(rows=(6, 1, 1), image_size=22).manifest


def test_the_same_seed_gives_the_same_network_and_another_seed_another(make_config, manifest):
    networks = [build_network(manifest, make_config(seed=seed, arch_arguments=NETWORK), 10) for seed in (1, 1, 2)]
    first, again, other = (read_variables(network.model.variables) for network in networks)
    kernel = next(name for name in first if "kernel" in name)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[kernel], other[kernel])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_shrinks_kernels_and_nothing_else(make_config, manifest, optimizer):
    with_batch_norm = {"arch": "alexnet", "arch_arguments": {"width": 0.05, "dense_units": 8}}
    constant = {"schedule": "constant", "warmup_epochs": 0, "base_learning_rate": 0.01}
    config = make_config(**with_batch_norm, **constant, optimizer=optimizer, weight_decay=0.5)
    built = build_network(manifest.model_copy(update={"image_size": 67}), config, steps_per_epoch=10)
    variables = built.model.trainable_variables

    @tf.function
    def apply_no_gradients():
        pairs = [(tf.zeros_like(variable), variable) for variable in variables]
        built.strategy.run(lambda: built.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True))

    with built.strategy.scope():
        for variable in variables:
            variable.assign(tf.ones_like(variable))
    apply_no_gradients()
    kinds = {variable.name.rpartition("/")[2] for variable in variables}
    assert kinds == {"kernel:0", "bias:0", "gamma:0", "beta:0"}
    for variable in variables:
        expected = 1 - config.peak_learning_rate * 0.5 if "kernel" in variable.name else 1
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6, err_msg=variable.name)


@pytest.mark.parametrize(
    ("all_reduce", "on_gpu", "expected"),
    [("auto", True, "NCCL"), ("auto", False, "AUTO"), ("ring", True, "RING"), ("nccl", True, "NCCL")],
)
def test_gpus_communicate_by_nccl_unless_it_is_chosen_otherwise(monkeypatch, all_reduce, on_gpu, expected):
    monkeypatch.setattr(network, "has_gpu", lambda: on_gpu)
    assert choose_communication(all_reduce).implementation.value == expected


def test_nccl_is_refused_without_gpus(monkeypatch):
    monkeypatch.setattr(network, "has_gpu", lambda: False)
    with pytest.raises(InputError, match="--all-reduce nccl needs workers with GPUs; give auto or ring"):
        choose_communication("nccl")
