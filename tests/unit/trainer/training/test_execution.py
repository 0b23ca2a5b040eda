"""XLA and several steps in a call, on CPUs: both compute the same there, and XLA more slowly."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tests.conftest import TINY_NETWORKS, free_port
from trainer.architectures import ARCHITECTURES
from trainer.record.checkpoint import assign_variables, read_variables
from trainer.runtime.errors import InputError
from trainer.runtime.events import StepCompiled, StepCompiling, StepsPerExecutionChosen, XlaWeighed
from trainer.training import execution as execution_module
from trainer.training.execution import choose_execution, count_steps, find_obstacle, weigh_xla
from trainer.training.network import Network, build_network
from trainer.training.step import (
    STEP_GRAD_NOISE,
    STEP_GRAD_NORM,
    STEP_LOSS,
    compile_execution,
    compile_train_step,
)

ROWS = 6
SMALL = {"first_filters": 3, "later_filters": [4], "dense_units": 8, "batch_norm": True, "dropout": 0.3}
EVERYTHING = {
    "augment_rotation": 10.0,
    "augment_mixup": 0.2,
    "augment_cutmix": 1.0,
    "clip_norm": 1.0,
    "ema_momentum": 0.5,
}


def image_size_of(arch: str) -> int:
    return max(16, ARCHITECTURES[arch].min_image_size)


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.mixed_precision.set_global_policy("float32")


@pytest.fixture
def configure(make_config, write_dataset):
    """Return a function that makes the manifest and the config of a run."""

    def configure(arch: str, **values):
        manifest = write_dataset(rows=(ROWS, 1, 1), image_size=image_size_of(arch)).manifest
        base = {"arch_arguments": TINY_NETWORKS[arch], "optimizer": "adamw", "base_learning_rate": 0.01}
        options = {"arch": arch, "global_batch_size": ROWS, "schedule": "constant", **base, **values}
        return manifest, make_config(**options)

    return configure


@pytest.fixture
def build(configure):
    """Return a function that builds a network, and a function that compiles its step."""

    def build(arch: str, **values):
        manifest, config = configure(arch, **values)
        network = build_network(manifest, config, steps_per_epoch=10)
        return config, network, lambda use_xla=False: compile_train_step(network, manifest, config, use_xla=use_xla)

    return build


def draw_batch(arch: str, seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    size = image_size_of(arch)
    images = np.random.default_rng(seed).integers(0, 256, (ROWS, size, size, 1), np.uint8)
    return tf.constant(images), tf.constant([0, 1, 2, 0, 1, 2], tf.int32)


def train(network: Network, step, arch: str, steps: int) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    stats = np.stack([step(*draw_batch(arch, seed)).numpy() for seed in range(steps)])
    return stats, [read_variables(one) for one in (network.model.variables, network.optimizer_variables)]


def assert_same(build, arch: str, precision: str, **values) -> None:
    tolerance = 2e-3 if precision == "float32" else 0.1
    trained = []
    for use_xla in (False, True):
        _, network, compile_step = build(arch, precision=precision, **EVERYTHING, **values)
        trained.append(train(network, compile_step(use_xla), arch, 2))
    (stats, (weights, _)), (compiled_stats, (compiled_weights, _)) = trained
    np.testing.assert_allclose(compiled_stats[:, STEP_LOSS], stats[:, STEP_LOSS], rtol=tolerance)
    # What overflows in float16 is inf or nan by the order of operations; the step is skipped for either.
    norms, compiled_norms = (np.where(np.isnan(one), np.inf, one)[:, STEP_GRAD_NORM] for one in (stats, compiled_stats))
    np.testing.assert_allclose(compiled_norms, norms, rtol=tolerance)
    # Adam's first steps are as long for a gradient of rounding noise as for any other.
    for name, array in weights.items():
        differences = np.abs(compiled_weights[name] - array)
        assert np.median(differences) <= tolerance * max(np.abs(array).max(), 0.01), name


def test_a_compiled_step_computes_the_same(build):
    assert_same(build, "cnn_softmax", "float32", arch_arguments=SMALL)


# What one of two workers computes without XLA, with it, and with all steps in one call, as JSON.
WORKER = """
import json, sys
import numpy as np, tensorflow as tf
from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig
from trainer.training.batch_norm import compile_estimate
from trainer.training.network import build_network
from trainer.training.step import compile_eval_step, compile_execution

rank, manifest = int(sys.argv[1]), Manifest.model_validate_json(sys.argv[2])
config = TrainConfig.model_validate_json(sys.argv[3])
rows = slice(rank * config.per_replica_batch_size, (rank + 1) * config.per_replica_batch_size)
size = manifest.image_size
answers = []
batches = np.random.default_rng(0).integers(0, 256, (3, config.global_batch_size, size, size, 1), np.uint8)
images, labels = batches[-1], np.arange(config.global_batch_size, dtype=np.int32) % 3
for use_xla, in_call in ((False, 1), (True, 1), (False, 3)):
    network = build_network(manifest, config, steps_per_epoch=10)
    execute = compile_execution(network, manifest, config, use_xla=use_xla, repeats=in_call > 1)
    of_steps = [tf.constant(batches[:, rows]), tf.constant(np.tile(labels[rows], (3, 1)))]
    stats = [row for start in range(0, 3, in_call)
             for row in execute(*(one[start : start + in_call] for one in of_steps)).numpy().tolist()]
    if estimate := compile_estimate(network, manifest, config):
        estimate(tf.constant(images[rows]), 0)
    outcomes = compile_eval_step(network, manifest, config)(tf.constant(images), tf.constant(labels)).numpy()
    weights = np.concatenate([one.numpy().ravel() for one in network.model.trainable_variables])
    answers.append({"stats": stats, "outcomes": outcomes.tolist(), "weights": weights.tolist()})
print(json.dumps(answers))
"""


def train_two_workers(config, manifest) -> list[list[dict[str, np.ndarray]]]:
    """Return what `WORKER` prints, by rank."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    processes = []
    for rank in range(2):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        command = [sys.executable, "-c", WORKER, str(rank), manifest.model_dump_json(), config.model_dump_json()]
        environment = {**os.environ, "TF_CONFIG": json.dumps(cluster)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    answers = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors.decode()[-2000:]
            answers.append([{name: np.array(one) for name, one in answer.items()} for answer in json.loads(output)])
    finally:
        for process in processes:
            process.kill()
    return answers


def assert_same_with_two_workers(configure, arch: str, **values) -> None:
    # The 94 layers of inception_v3 that normalize amplify rounding: where they do over three images, it changes the
    # gradient by a fifth. Adam's first steps are as long for rounding noise as for any other gradient, and lead apart.
    is_deepest = arch == "inception_v3"
    values = {"global_batch_size": 128 if is_deepest else 16, **EVERYTHING, **values}
    manifest, config = configure(arch, num_workers=2, batch_norm="replica", **values)
    first, second = train_two_workers(config, manifest)
    # The noise is a difference of squares.
    tolerance, of_noise, rounding = (2e-3, 2e-3, 1e-5) if config.precision == "float32" else (0.1, 0.2, 0.05)
    if is_deepest:
        tolerance, of_noise, rounding = 4 * tolerance, 4 * of_noise, 4 * rounding
    plain, compiled, in_one_call = first
    for one, other in zip(first, second, strict=True):
        for name in ("stats", "weights"):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        # Both validate alike, though each has normalized its own images; TensorFlow rounds by where the arrays lie.
        if is_deepest:
            assert np.median(np.abs(one["outcomes"] - other["outcomes"]), axis=0).max() <= rounding
        else:
            np.testing.assert_allclose(one["outcomes"], other["outcomes"], rtol=rounding, atol=rounding)
    for name in ("stats", "outcomes", "weights"):
        np.testing.assert_array_equal(in_one_call[name], plain[name], err_msg=name)
    stats, compiled_stats = (one["stats"][: 1 if is_deepest else None] for one in (plain, compiled))
    np.testing.assert_allclose(compiled_stats[:, :STEP_GRAD_NOISE], stats[:, :STEP_GRAD_NOISE], rtol=tolerance)
    np.testing.assert_allclose(compiled_stats[:, STEP_GRAD_NOISE], stats[:, STEP_GRAD_NOISE], rtol=of_noise)
    if not is_deepest:
        assert np.median(np.abs(compiled["weights"] - plain["weights"])) <= tolerance * 0.01


@pytest.mark.slow
def test_two_workers_compute_the_same(configure):
    assert_same_with_two_workers(configure, "cnn_softmax", arch_arguments=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("arch", TINY_NETWORKS)
def test_two_workers_compute_the_same_with_every_network(configure, arch, precision):
    assert_same_with_two_workers(configure, arch, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("arch", TINY_NETWORKS)
def test_every_network_computes_the_same(build, arch, precision):
    assert_same(build, arch, precision)


def test_training_continues_from_a_state_as_if_it_had_not_stopped(build):
    _, network, compile_step = build("cnn_softmax", arch_arguments=SMALL, **EVERYTHING)
    step, parts = compile_step(use_xla=True), (network.model.variables, network.optimizer_variables)
    _, state = train(network, step, "cnn_softmax", 2)
    stats, whole = train(network, step, "cnn_softmax", 2)
    for variables, arrays in zip(parts, state, strict=True):
        assign_variables(variables, arrays)
    resumed_stats, resumed = train(network, step, "cnn_softmax", 2)
    np.testing.assert_array_equal(resumed_stats, stats)
    for before, after in zip(whole, resumed, strict=True):
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("precision", "use_xla"),
    [
        ("float32", False),
        pytest.param("mixed_bfloat16", False, marks=pytest.mark.slow),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", True, marks=pytest.mark.slow),
    ],
)
def test_several_steps_in_a_call_compute_what_single_ones_do(configure, precision, use_xla):
    values = {"arch_arguments": SMALL, "precision": precision, **EVERYTHING}
    manifest, config = configure("cnn_softmax", **values)
    images, labels = (
        tf.stack(one) for one in zip(*(draw_batch("cnn_softmax", seed) for seed in range(5)), strict=True)
    )
    trained = []
    for calls in ([1, 1, 1, 1, 1], [1, 3, 1]):
        network = build_network(manifest, config, steps_per_epoch=10)
        execute = compile_execution(network, manifest, config, use_xla=use_xla, repeats=max(calls) > 1)
        ends = np.cumsum(calls)
        stats = [
            execute(images[end - steps : end], labels[end - steps : end])
            for end, steps in zip(ends, calls, strict=True)
        ]
        states = [read_variables(one) for one in (network.model.variables, network.optimizer_variables)]
        trained.append((np.concatenate(stats), states))
    (single, of_single), (several, of_several) = trained
    np.testing.assert_array_equal(several, single)
    for before, after in zip(of_single, of_several, strict=True):
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_no_image_goes_through_the_host_between_the_steps_of_a_call(configure):
    manifest, config = configure("cnn_softmax")
    network = build_network(manifest, config, steps_per_epoch=10)
    graph = compile_execution(network, manifest, config, repeats=True).get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    # A GPU has these for float32 and int32, and not for uint8.
    lists = [node for node in nodes if "element_dtype" in node.attr]
    assert lists
    assert {tf.as_dtype(node.attr["element_dtype"].type) for node in lists} <= {tf.float32, tf.int32}


def build_sum(use_xla: bool, repeats: bool):
    """A step that is compiled in no time; of a batch of one it returns its double."""
    signature = [tf.TensorSpec([None, 1])] * 2
    return tf.function(lambda images, labels: images * 2, input_signature=signature, jit_compile=use_xla)


BATCH = tf.zeros([1, 1]), tf.zeros([1, 1])


def choose(build, events: list, **values):
    config, network, _ = build("cnn_softmax", **values)
    return choose_execution(build_sum, network, config, 1000, lambda value: value, events.append)


def test_a_line_says_when_the_step_is_compiled_and_how_long_it_took(build):
    events: list = []
    execution = choose(build, events, xla="on")
    for _ in range(2):
        execution(*BATCH)
    assert events == [StepCompiling(), StepCompiled(events[1].seconds)]
    assert events[1].seconds > 0


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_nothing_is_compiled_or_repeated_on_cpus_that_is_not_asked_for(build, choice):
    events: list = []
    execution = choose(build, events, xla=choice)
    execution(*BATCH)
    assert (events, execution.steps) == ([], 1)


def test_a_call_takes_the_steps_that_are_asked_for(build):
    assert choose(build, [], steps_per_execution=7).steps == 7


@pytest.mark.parametrize(
    ("saved", "compile_seconds", "is_worthwhile", "text"),
    [
        (95.0, 55.0, True, "save about 95 s of the 5000 steps left, and take about 55 s to compile: on"),
        (54.0, 55.0, False, "save about 54 s of the 5000 steps left, and take about 55 s to compile: off"),
    ],
)
def test_it_is_compiled_where_that_saves_more_than_it_takes(saved, compile_seconds, is_worthwhile, text):
    weighed = XlaWeighed(5000, saved, compile_seconds)
    assert weighed.is_worthwhile is is_worthwhile
    assert text in str(weighed)


def test_what_is_saved_grows_with_the_steps_left_and_what_it_takes_with_the_step():
    short, long, large = weigh_xla(100, 0.1, 3000), weigh_xla(1000, 0.1, 3000), weigh_xla(100, 0.1, 6000)
    assert (long.saved_seconds, long.compile_seconds) == (10 * short.saved_seconds, short.compile_seconds)
    assert (large.saved_seconds, large.compile_seconds) == (short.saved_seconds, 2 * short.compile_seconds)


@pytest.mark.parametrize(
    ("seconds", "image_bytes", "steps"),
    [
        # A tenth of a second, and 32 MiB.
        (0.001, 1000, 100),
        (0.004, 1000, 25),
        (0.001, 2**20, 32),
        (0.001, 2**26, 1),
        (0.011, 1000, 1),
        (1.0, 1000, 1),
    ],
)
def test_a_call_takes_so_many_steps_that_signals_and_memory_do_not_suffer(seconds, image_bytes, steps):
    assert count_steps(seconds, image_bytes) == steps


@pytest.mark.parametrize(
    ("values", "seconds", "steps_left", "compiles", "steps"),
    [
        # The slowest worker's time counts.
        ({}, 60.0, 1000, True, 1),
        ({}, 0.004, 100_000, True, 25),
        # Nothing is left that would repay building the step again.
        ({}, 0.004, 21, False, 1),
        ({"xla": "off"}, 0.004, 100_000, False, 25),
        ({"xla": "on"}, 0.004, 100_000, True, 25),
        ({"steps_per_execution": 3}, 0.0, 1000, False, 3),
        ({"steps_per_execution": 3}, 60.0, 1000, True, 3),
        ({"steps_per_execution": 1}, 0.004, 100_000, True, 1),
    ],
)
def test_the_first_steps_on_a_gpu_are_timed_and_decide(
    build, monkeypatch, values, seconds, steps_left, compiles, steps
):
    monkeypatch.setattr(execution_module, "has_gpu", lambda: True)
    monkeypatch.setattr(execution_module.gpu, "find_missing_tools", list)
    config, network, _ = build("cnn_softmax", **values)
    events: list = []
    timed: list[float] = []

    def agree(own: float) -> float:
        timed.append(own)
        return seconds

    execution = choose_execution(build_sum, network, config, steps_left, agree, events.append)
    for _ in range(execution_module._UNTIMED_STEPS + execution_module._TIMED_STEPS):
        assert execution.steps == 1
        execution(*BATCH)
    for _ in range(2):
        assert execution.steps == steps
        stats = execution(tf.ones([steps, 1]), tf.zeros([steps, 1]))
        np.testing.assert_array_equal(stats, 2 * np.ones([steps, 1]))
    assert len(timed) == 1
    assert timed[0] > 0
    kinds = [type(one) for one in events]
    assert kinds.count(XlaWeighed) == ("xla" not in values)
    assert (StepCompiled in kinds) is compiles
    assert kinds.count(StepsPerExecutionChosen) == (steps > 1 and "steps_per_execution" not in values)


def test_the_log_says_how_many_steps_a_call_takes():
    text = str(StepsPerExecutionChosen(25, 0.0039))
    assert text == "a training step takes 3.9 ms: 25 in each call from here on"


def test_batch_norm_over_several_workers_is_no_part_of_a_program(build):
    config, network, _ = build("cnn_softmax", arch_arguments=SMALL)
    two = config.model_copy(update={"num_workers": 2, "batch_norm": "global", "xla": "on"})
    with pytest.raises(InputError, match=r"--xla on: BatchNorm .* 2 workers.* --batch-norm replica, or --xla off"):
        choose_execution(build_sum, network, two, 1000, float, lambda event: None)
    assert find_obstacle(network, two.model_copy(update={"batch_norm": "replica"})) == ""
    _, plain, _ = build("cnn_softmax")
    assert find_obstacle(plain, two) == ""


def test_what_xla_does_not_find_is_named(build, monkeypatch):
    config, network, _ = build("cnn_softmax")
    monkeypatch.setattr(execution_module, "has_gpu", lambda: True)
    monkeypatch.setattr(execution_module.gpu, "find_missing_tools", lambda: ["ptxas"])
    events: list = []
    choose_execution(build_sum, network, config, 1000, float, events.append)(*BATCH)
    (weighed,) = events
    assert str(weighed).startswith("the training step is not compiled by XLA: XLA does not find ptxas; install")
