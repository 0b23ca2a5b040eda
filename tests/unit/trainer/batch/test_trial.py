"""Training steps of a trial of batch sizes, on one replica in this process."""

import math
import time

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from trainer.batch.job import TrialJob
from trainer.batch.search import Known, Probe, Search
from trainer.batch.trial import _Bench, _named_memory_errors, _start_smaller
from trainer.runtime.events import LossesMeasured, SizeMeasured, SizeStarted
from trainer.training.dataset import open_split

BOTH = ("float32", "mixed_bfloat16")


@pytest.fixture
def make_bench(write_dataset, make_config):
    """Return a function that makes a bench for a tiny network on 16 images."""
    written = write_dataset(rows=(16, 1, 1), image_size=22)
    config = make_config(
        dataset=written.uri, arch_arguments={"first_filters": 3, "later_filters": [4], "dense_units": 8}
    )
    split = open_split(written.uri, written.manifest, "train")

    def make() -> _Bench:
        job = TrialJob(config, written.manifest, Search("auto", BOTH, 4, 16, 100.0, 1000), Known(), None)
        return _Bench(job, split, rank=0, num_workers=1)

    yield make
    keras.mixed_precision.set_global_policy("float32")


def measure(bench: _Bench, size: int, *precisions: str, compare_losses: bool = False) -> list:
    return list(bench.measure(Probe(size, precisions), compare_losses=compare_losses))


def test_precisions_are_measured_by_turns_after_the_losses_of_their_first_steps(make_bench, monkeypatch):
    monkeypatch.setattr("trainer.batch.trial._HOPELESS", math.inf)
    bench = make_bench()
    # The network whose size decided where to start.
    bench.build("float32")
    events = measure(bench, 4, *BOTH, compare_losses=True)
    kinds = [SizeStarted, LossesMeasured]
    assert [type(one) for one in events] == [*kinds, *kinds, SizeMeasured, SizeMeasured]
    losses = {one.precision: one.losses for one in events if isinstance(one, LossesMeasured)}
    assert len(set(losses["float32"])) == len(losses["float32"]) == 8
    assert losses["mixed_bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    again = measure(make_bench(), 4, "float32", compare_losses=True)[1]
    assert again.losses == pytest.approx(losses["float32"], rel=1e-5)
    # Once is enough.
    assert [type(one) for one in measure(bench, 8, *BOTH, compare_losses=True)][:2] == [SizeStarted, SizeStarted]


@pytest.mark.parametrize(("slow", "given_up"), [((1,), False), ((1, 2), True)])
def test_a_precision_is_given_up_after_two_slow_steps_not_after_one(make_bench, monkeypatch, slow, given_up):
    monkeypatch.setattr("trainer.batch.trial._HOPELESS", 20)
    bench = make_bench()
    make_batch = bench._batch

    def make_late(size: int, number: int):
        if number in slow and "mixed_bfloat16" in bench._networks:
            time.sleep(2)
        return make_batch(size, number)

    monkeypatch.setattr(bench, "_batch", make_late)
    _, _, _, losses, *measured = measure(bench, 4, *BOTH, compare_losses=True)
    assert len(losses.losses) == (3 if given_up else 8)
    # What is given up is reported at once, the others after their turns.
    assert [one.precision for one in measured] == [*(reversed(BOTH) if given_up else BOTH)]


def test_a_size_is_measured_with_real_and_with_synthetic_input(make_bench):
    started, measured = measure(make_bench(), 16, "float32")
    assert started == SizeStarted("float32", 16)
    assert (measured.size, measured.num_replicas, measured.precision) == (16, 1, "float32")
    assert min(measured.seconds_per_step, measured.synthetic_seconds_per_step, measured.peak_memory_gib) > 0
    assert measured.seconds_spread >= 0
    # Of a second or more.
    assert measured.seconds > 1
    assert measured.images_per_second == pytest.approx(16 / measured.seconds_per_step)


def test_what_the_first_step_on_a_gpu_takes_to_try_kernels_does_not_count(make_bench, monkeypatch):
    bench = make_bench()
    steps = bench.build("float32").network.optimizer.iterations
    resets: list[int] = []
    monkeypatch.setattr("trainer.batch.trial.has_gpu", lambda: True)
    monkeypatch.setattr("trainer.batch.trial.reset_peak_memory", lambda: resets.append(int(steps.numpy())))
    measure(bench, 4, "float32")
    assert resets == [0, 1]


def test_no_program_is_compiled_by_xla_for_a_size_that_is_only_measured(make_bench):
    bench = make_bench()
    measure(bench, 4, "float32")
    (step,) = bench.build("float32").steps.values()
    graph = step.get_concrete_function(*bench._batch(4, 0)).graph.as_graph_def()
    assert [one.signature.name for one in graph.library.function if one.attr["_XlaMustCompile"].b] == []
    assert not bench.build("float32").network.optimizer.jit_compile


def test_the_limit_is_the_least_of_what_is_given_and_what_the_allocator_takes(make_bench, monkeypatch):
    bench = make_bench()
    bench.build("float32")
    assert bench.agree_on_limit(8.0) == 8.0
    monkeypatch.setattr("trainer.batch.trial.allocator_limit_gib", lambda: 6.0)
    assert (bench.agree_on_limit(8.0), bench.agree_on_limit(4.0)) == (6.0, 4.0)


def test_an_error_of_tensorflow_for_want_of_memory_is_one_of_memory():
    with pytest.raises(MemoryError, match="batch 8 per replica: Dst tensor is not"), _named_memory_errors(8):
        raise tf.errors.InternalError(None, None, "Dst tensor is not initialized.")
    with pytest.raises(tf.errors.InternalError, match="ptxas"), _named_memory_errors(8):
        raise tf.errors.InternalError(None, None, "ptxas exited")


def test_memory_is_exact_only_where_nothing_else_was_in_the_process(make_bench, monkeypatch):
    monkeypatch.setattr("trainer.batch.trial.has_gpu", lambda: False)
    bench = make_bench()
    assert [measure(bench, size, "float32")[-1].alone for size in (4, 8, 4)] == [True, True, False]
    alone = {size: bench.can_measure(Probe(size, ("float32",), alone=True)) for size in (8, 16)}
    assert alone == {8: False, 16: True}
    assert bench.can_measure(Probe(8, ("float32",)))
    assert not bench.can_measure(Probe(16, ("mixed_bfloat16",), alone=True))
    assert not measure(bench, 16, "mixed_bfloat16")[-1].alone
    assert not bench.can_measure(Probe(32, ("float32",), alone=True))


def test_memory_counts_a_second_gradient_and_the_copies_that_a_checkpoint_holds(make_bench):
    bench = make_bench()
    network = bench.build("float32").network
    gradient, arrays, files = bench._hold_what_training_holds("float32")
    assert [one.shape for one in gradient] == [variable.shape for variable in network.model.trainable_variables]
    for copied, written, variables in zip(
        arrays, files, (network.model.variables, network.optimizer_variables), strict=True
    ):
        size = sum(np.asarray(variable).nbytes for variable in variables)
        assert sum(array.nbytes for array in copied.values()) == size
        assert len(written) >= size


@pytest.mark.parametrize(
    ("goal", "image_gib", "first"), [("auto", 0.01, 32), ("max", 0.5, 8), ("auto", 100.0, 1), ("given", 0.5, 32)]
)
def test_the_first_size_is_halved_where_the_outputs_of_the_layers_fill_half_of_the_memory(goal, image_gib, first):
    assert _start_smaller(Search(goal, BOTH, 32, 64, 100.0, 1000), image_gib, 10.0).start == first
