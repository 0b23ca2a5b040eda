"""The operations of a training step with one worker, so that they cannot grow in number unseen."""

from collections import Counter

import pytest
import tensorflow as tf
import tf_keras as keras

from tests.conftest import TINY_NETWORKS
from trainer.training.batch_norm import find_batch_norms, find_idle_biases
from trainer.training.network import build_network
from trainer.training.step import compile_train_step

ROWS = 2
# One residual block in each stage, to be traced in seconds: 17 convolutions, each with a bias and BatchNorm after it.
NETWORKS = {
    "resnet50": (32, {**TINY_NETWORKS["resnet50"], "blocks": [1, 1, 1, 1]}),
    "alexnet": (67, TINY_NETWORKS["alexnet"]),
}


@pytest.fixture(scope="module")
def traced():
    """Returns, by architecture, the model and the operations of a step; each is traced once."""
    return {}


@pytest.fixture(params=NETWORKS)
def network(request, traced, write_dataset, make_config):
    """The name, the model and how many operations of each type its training step executes."""
    arch = request.param
    if arch not in traced:
        size, arguments = NETWORKS[arch]
        manifest = write_dataset(rows=(ROWS, 1, 1), image_size=size).manifest
        config = make_config(
            arch=arch,
            arch_arguments=arguments,
            global_batch_size=ROWS,
            optimizer="adamw",
            clip_norm=1.0,
            augment_rotation=10.0,
            precision="mixed_bfloat16",
        )
        built = build_network(manifest, config, steps_per_epoch=10)
        step = compile_train_step(built, manifest, config)
        graph = step.get_concrete_function(tf.zeros([ROWS, size, size, 1], tf.uint8), tf.zeros([ROWS], tf.int32)).graph
        # What neither an output nor an update needs is traced, and never executed.
        needed = [one.op.name for one in graph.outputs] + [one.name for one in graph.control_outputs]
        executed = tf.compat.v1.graph_util.extract_sub_graph(graph.as_graph_def(), needed)
        nodes = [node.op for node in executed.node]
        nodes += [node.op for function in graph.as_graph_def().library.function for node in function.node_def]
        traced[arch] = built.model, Counter(nodes)
    return arch, *traced[arch]


def test_one_worker_communicates_with_nobody(network):
    _, _, nodes = network
    assert [name for name in nodes if "Collective" in name or "Nccl" in name] == []


def test_batch_norm_is_one_kernel_forward_and_one_backward(network):
    _, model, nodes = network
    layers = len(find_batch_norms(model))
    assert nodes["FusedBatchNormV3"] == nodes["FusedBatchNormGradV3"] == layers > 0
    assert nodes["SquaredDifference"] == nodes["Rsqrt"] == 0


def test_nothing_is_computed_for_biases_in_front_of_batch_norm(network):
    arch, model, nodes = network
    # AlexNet's are followed by ReLU, and have an effect.
    biases = sum(getattr(layer, "use_bias", False) for layer in model.layers)
    assert (biases, len(find_idle_biases(model))) == {"resnet50": (18, 17), "alexnet": (8, 0)}[arch]
    assert nodes["BiasAdd"] + nodes["_FusedConv2D"] == {"resnet50": 1, "alexnet": 8}[arch]
    assert nodes["BiasAddGrad"] == {"resnet50": 1, "alexnet": 8}[arch]


def test_each_convolution_is_computed_once_and_has_one_gradient_of_its_kernel(network):
    _, model, nodes = network
    layers = sum(isinstance(layer, keras.layers.Conv2D) for layer in model.layers)
    assert nodes["Conv2D"] == nodes["Conv2DBackpropFilter"] == layers
    # None for the images.
    assert nodes["Conv2DBackpropInput"] == layers - 1


def test_the_step_has_no_more_operations_than_it_had(network):
    arch, _, nodes = network
    assert sum(nodes.values()) <= {"resnet50": 3498, "alexnet": 1585}[arch]
