"""Predict a run on more workers from a measured run: time, efficiency, traffic and cost.

The model (docs/performance.md derives and checks it): the time of a step is the computation for the images of a
replica, an additional share for the slowest of several workers, and the part of the all-reduce that the backward pass
does not hide. The all-reduce is a ring within a node and a ring over the nodes (Patarasuk & Yuan 2009): each sends
2 (n - 1) / n of the gradients.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from trainer.config.config import BatchRequest
from trainer.inference import read_finished_run
from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_count

# Both fitted to three published figures: Horovod's ResNet-101 and VGG-16 on 512 GPUs, NVIDIA's ResNet-50 on eight.
HIDDEN_SHARE = 0.6
"""Share of the all-reduce that the backward pass hides."""
STRAGGLER_SHARE = 0.06
"""Share of the computation that is added if there is more than one worker."""
_BACKWARD_SHARE = 2 / 3
_HOP_SECONDS = 20e-6
_GRADIENT_BYTES = 4
# `trainer.batch.finder` leaves as much.
_LEAST_STEPS = BatchRequest().min_steps_per_epoch


@dataclass(frozen=True)
class Workload:
    """What is trained, and what it took one worker, as measured."""

    image_seconds: float
    """Time of the forward and backward pass of one image on one worker."""
    per_replica_batch_size: int
    parameters: int
    rows: int
    """Number of images in the train split."""
    epochs: int
    image_bytes: int
    checkpoint_bytes: int
    worker_gib: float
    """Peak memory of a worker."""
    noise_scale: float | None = None
    """Gradient noise scale in images; None if unknown: then every number of workers takes the same epochs."""
    steps: int = 0
    """Number of optimizer steps to the result, at ``global_batch_size``."""
    global_batch_size: int = 0


@dataclass(frozen=True)
class Machines:
    """The machines to predict for."""

    workers_per_node: int = 8
    link_gbit: float = 25.0
    """Bandwidth between two nodes, in Gbit/s in each direction."""
    local_gbit: float = 600.0
    """Bandwidth between two workers of a node, in Gbit/s in each direction."""
    node_price: float = 0.0
    """Price of one node per hour, in any currency."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one number of workers."""

    workers: int
    nodes: int
    global_batch_size: int
    steps_per_epoch: int
    step_seconds: float
    images_per_second: float
    efficiency: float
    """Speed as a fraction of ``workers`` times the speed of one worker."""
    hours: float
    """Time to the same result by the noise scale, if it is known; otherwise for the same epochs."""
    read_gib: float
    """Read from the storage: each node reads the dataset once."""
    written_gib: float
    """Written to the storage: one checkpoint per epoch."""
    cost: float


def read_workload(uri: str) -> Workload:
    """Return the workload of a finished run, as measured.

    Raises:
        InputError: the run is not finished.
    """
    run, config, result = read_finished_run(uri)
    manifest, history = run.read_manifest(), run.read_metrics()
    rate = float(np.median([row["images_per_second"] / row["num_workers"] for row in history]))
    sizes = storage.find_files(storage.join(run.checkpoints, result.best_checkpoint))
    if not sizes:
        raise InputError(f"RUN {uri} has no checkpoint any more; train it again")
    return Workload(
        image_seconds=1 / rate,
        per_replica_batch_size=config.per_replica_batch_size,
        parameters=result.parameters,
        rows=manifest.splits["train"].rows,
        epochs=config.epochs,
        image_bytes=manifest.image_size**2 * manifest.channels,
        checkpoint_bytes=sum(sizes.values()),
        worker_gib=max(row["peak_memory_gib"] for row in history),
        noise_scale=result.noise_scale,
        steps=result.steps,
        global_batch_size=config.global_batch_size,
    )


def predict(workload: Workload, machines: Machines, workers: int) -> Prediction:
    """Return the prediction for a number of workers."""
    nodes = math.ceil(workers / machines.workers_per_node)
    compute = workload.image_seconds * workload.per_replica_batch_size
    step = compute
    if workers > 1:
        all_reduce = all_reduce_seconds(workload.parameters, machines, workers)
        hidden = min(HIDDEN_SHARE * all_reduce, _BACKWARD_SHARE * compute)
        step = compute * (1 + STRAGGLER_SHARE) + all_reduce - hidden
    batch = workload.per_replica_batch_size * workers
    steps = max(1, workload.rows // batch)
    hours = _count_steps(workload, batch, steps) * step / 3600
    return Prediction(
        workers=workers,
        nodes=nodes,
        global_batch_size=batch,
        steps_per_epoch=steps,
        step_seconds=step,
        images_per_second=batch / step,
        efficiency=compute / step,
        hours=hours,
        read_gib=nodes * workload.rows * workload.image_bytes / 2**30,
        written_gib=workload.epochs * workload.checkpoint_bytes / 2**30,
        cost=hours * nodes * machines.node_price,
    )


def _count_steps(workload: Workload, batch: int, steps_per_epoch: int) -> float:
    """Return the optimizer steps to the same result: a larger batch takes fewer (McCandlish et al. 2018)."""
    scale = workload.noise_scale
    if scale is None:
        return steps_per_epoch * workload.epochs
    if math.isinf(scale):
        return workload.steps * workload.global_batch_size / batch
    return workload.steps * (1 + scale / batch) / (1 + scale / workload.global_batch_size)


def all_reduce_seconds(parameters: int, machines: Machines, workers: int) -> float:
    """Return how long it takes to add up the float32 gradients of all workers, without anything that hides it."""
    gradients = parameters * _GRADIENT_BYTES
    local = min(workers, machines.workers_per_node)
    nodes = math.ceil(workers / machines.workers_per_node)
    seconds = 0.0
    for members, gbit in ((local, machines.local_gbit), (nodes, machines.link_gbit)):
        hops = 2 * (members - 1)
        seconds += hops / members * gradients / (gbit * 1e9 / 8) + hops * _HOP_SECONDS
    return seconds


def predict_up_to(workload: Workload, machines: Machines, workers: int) -> list[Prediction]:
    """Return the predictions for 1, 2, 4, ... workers and for the requested number."""
    numbers = [2**power for power in range(workers.bit_length()) if 2**power < workers]
    return [predict(workload, machines, number) for number in (*numbers, workers)]


def find_advice(workload: Workload, machines: Machines, predictions: list[Prediction]) -> list[str]:
    """Return advice about the largest number of workers, one line each."""
    last = predictions[-1]
    advice = []
    if last.steps_per_epoch < _LEAST_STEPS:
        fewer = workload.rows // (_LEAST_STEPS * workload.per_replica_batch_size)
        advice.append(
            f"an epoch has only {format_count(last.steps_per_epoch, 'step')}: {format_count(max(1, fewer), 'worker')} "
            f"would be enough for {format_count(workload.rows, 'image')}"
        )
    twice = replace(workload, per_replica_batch_size=2 * workload.per_replica_batch_size)
    doubled = predict(twice, machines, last.workers)
    if last.efficiency < 0.8 and doubled.efficiency > last.efficiency + 0.05:
        advice.append(
            f"the all-reduce of {workload.parameters * _GRADIENT_BYTES / 2**20:.0f} MiB takes "
            f"{all_reduce_seconds(workload.parameters, machines, last.workers) * 1000:.0f} ms per step; twice the "
            f"batch per worker would raise the efficiency from {last.efficiency:.0%} to {doubled.efficiency:.0%}"
        )
    return advice
