"""Private names of Ray and Keras: what this program relies on holds in the installed version."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from ray._private import worker

from trainer.runtime import compat


def test_ray_prints_nothing_about_workers_while_it_is_muted(capfd):
    def print_as_the_listener_does(message: str) -> None:
        worker.print_to_stdstream({"lines": [message], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    with compat.mute_worker_messages():
        print_as_the_listener_does("A worker died during a run.")
    print_as_the_listener_does("A worker died during a preparation.")
    out, err = capfd.readouterr()
    assert "during a preparation" in out
    assert "during a run" not in out + err


def test_the_memory_of_a_group_is_counted_without_the_cache_of_files(tmp_path):
    stat, usage = tmp_path / "memory.stat", tmp_path / "memory.current"
    stat.write_text("anon 500\ninactive_file 300\nactive_file 200\n")
    usage.write_text("1100\n")
    assert compat.used_memory_of_group(str(stat), str(usage), "inactive_file", "active_file") == 600
    stat.write_text("anon 500\n")
    assert compat.used_memory_of_group(str(stat), str(usage), "inactive_file", "active_file") is None


def test_the_memory_of_a_device_is_what_tensorflow_may_take_of_it():
    # What TensorFlow says of a CPU, whose memory it does not ask for.
    assert compat.memory_of_device("CPU") == 256 * 2**20
    with pytest.raises(RuntimeError, match="TensorFlow has no ABACUS"):
        compat.memory_of_device("ABACUS")


def test_a_dropout_layer_calls_what_replaces_it():
    layer = keras.layers.Dropout(0.25)
    compat.replace_dropout(layer, lambda inputs, rate, noise_shape=None: inputs * rate)
    np.testing.assert_array_equal(layer(tf.ones(3), training=True), [0.25] * 3)
    np.testing.assert_array_equal(layer(tf.ones(3), training=False), [1] * 3)


def test_the_variable_of_the_loss_scale_is_the_loss_scale():
    optimizer = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.SGD())
    compat.loss_scale_variable(optimizer).assign(1024)
    assert float(optimizer.loss_scale) == 1024


def test_functions_have_numbers_that_do_not_depend_on_those_before():
    def number_after(others: int) -> int:
        for _ in range(others):
            tf.function(lambda value: value - 1).get_concrete_function(tf.constant(1.0))
        compat.number_functions_alike()
        traced = tf.function(lambda value: value + 1).get_concrete_function(tf.constant(1.0))
        return int(traced.name.decode().rpartition("_")[2]) % 100_000

    assert number_after(1) == number_after(3) == number_after(0)
