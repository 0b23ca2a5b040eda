"""The model of a distributed run: its arithmetic, and the figures that others have published."""

import math
from dataclasses import replace

import pytest

from trainer.plan import Machines, Workload, all_reduce_seconds, find_advice, predict, predict_up_to

ALEXNET = Workload(
    image_seconds=0.001,
    per_replica_batch_size=64,
    parameters=58_304_586,
    rows=100_000,
    epochs=10,
    image_bytes=62_500,
    checkpoint_bytes=700_000_000,
    worker_gib=5.0,
)
# Sergeev & Del Balso 2018: 128 servers of four P100 at 25 Gbit/s, PCIe inside. Rates of one P100 at a batch of 64: the
# benchmarks that TensorFlow published in 2017 (ResNet-101 lies between their ResNet-50, 219/s, and ResNet-152, 92/s).
PASCAL = Machines(workers_per_node=4, link_gbit=25, local_gbit=80)


def workload(rate: float, parameters: int) -> Workload:
    return Workload(1 / rate, 64, parameters, 1_281_167, 90, 150_528, 0, 0.0)


@pytest.mark.parametrize(
    ("rate", "parameters", "machines", "workers", "published"),
    [
        (130, 44_549_160, PASCAL, 512, 0.90),
        (154, 138_357_544, PASCAL, 512, 0.68),
        (2375, 25_636_712, Machines(workers_per_node=8, local_gbit=2400), 8, 7.3 / 8),
    ],
)
def test_published_efficiencies_are_met_within_six_points(rate, parameters, machines, workers, published):
    assert predict(workload(rate, parameters), machines, workers).efficiency == pytest.approx(published, abs=0.06)


def test_one_worker_is_what_was_measured():
    one = predict(ALEXNET, Machines(), 1)
    assert (one.efficiency, one.step_seconds, one.images_per_second) == (1, 0.064, 1000)
    assert one.hours == pytest.approx(1562 * 10 * 0.064 / 3600)


def test_a_ring_sends_twice_the_gradients():
    seconds = all_reduce_seconds(250_000_000, Machines(workers_per_node=1, link_gbit=8), 1000)
    # 1 GB over 1 GB/s, twice, and 1,998 hops.
    assert seconds == pytest.approx(2 * 0.999 + 1998 * 20e-6)


def test_each_node_reads_the_dataset_and_an_epoch_writes_a_checkpoint():
    four_nodes = predict(ALEXNET, Machines(workers_per_node=2, node_price=3.0), 8)
    assert four_nodes.read_gib == pytest.approx(4 * 100_000 * 62_500 / 2**30)
    assert four_nodes.written_gib == pytest.approx(7e9 / 2**30)
    assert four_nodes.cost == pytest.approx(four_nodes.hours * 12)


def test_more_workers_are_faster_and_less_efficient():
    predictions = predict_up_to(ALEXNET, Machines(), 24)
    assert [one.workers for one in predictions] == [1, 2, 4, 8, 16, 24]
    rates = [one.images_per_second for one in predictions]
    assert rates == sorted(rates)
    assert all(one.efficiency <= 1 for one in predictions)


def test_too_few_steps_and_a_slow_link_are_said():
    slow = Machines(workers_per_node=1, link_gbit=10)
    (few, link) = find_advice(ALEXNET, slow, predict_up_to(ALEXNET, slow, 512))
    assert few == "an epoch has only 3 steps: 156 workers would be enough for 100000 images"
    assert "the all-reduce of 222 MiB takes 393 ms per step" in link
    assert find_advice(ALEXNET, Machines(), predict_up_to(ALEXNET, Machines(), 8)) == []


@pytest.mark.parametrize(
    ("noise_scale", "workers", "steps"),
    [
        # 1,000 steps at a batch of 64; 1 + scale / batch is 2 there.
        (64.0, 1, 1000),
        (64.0, 2, 750),
        (math.inf, 4, 250),
        (0.0, 8, 1000),
    ],
)
def test_a_larger_batch_takes_fewer_steps_to_the_result_as_far_as_the_noise_scale_reaches(noise_scale, workers, steps):
    measured = replace(ALEXNET, noise_scale=noise_scale, steps=1000, global_batch_size=64)
    predicted = predict(measured, Machines(), workers)
    assert predicted.hours == pytest.approx(steps * predicted.step_seconds / 3600)
