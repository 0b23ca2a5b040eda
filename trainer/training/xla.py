"""When the training step is compiled by XLA: never, from the first step on, or from where that pays.

XLA makes few kernels of a step's many. On a GPU that saves trips to memory and launches, and compiling takes a while.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.config.config import TrainConfig
from trainer.runtime import gpu
from trainer.runtime.errors import InputError
from trainer.runtime.events import OnEvent, StepCompiled, StepCompiling, XlaWeighed
from trainer.training.batch_norm import find_batch_norms
from trainer.training.devices import has_gpu
from trainer.training.network import Network

# The first steps trace and choose kernels; those after them are timed.
_UNTIMED_STEPS = 4
_TIMED_STEPS = 16
# Both from one H200 (docs/performance.md): what a compiled step saves of the others' time, from 45% of ResNet-50's at
# batch 256 to 78% of a small network's, and what compiling ResNet-50's takes, for each of its operations.
_SAVED_SHARE = 0.45
_SECONDS_PER_OPERATION = 0.005

Step = Callable[[Any, Any], Any]


def find_obstacle(network: Network, config: TrainConfig) -> str:
    """Return why the training step of a network cannot be compiled by XLA here; empty if it can."""
    if config.synchronizes_batch_norm and find_batch_norms(network.model):
        return (
            f"BatchNorm communicates with {config.num_workers} workers, which a compiled program cannot; "
            "give --batch-norm replica"
        )
    missing = gpu.find_missing_tools() if has_gpu() else []
    return f"XLA does not find {', '.join(missing)}; {gpu.FIX}" if missing else ""


def choose_step(
    build_step: Callable[..., Step],
    network: Network,
    config: TrainConfig,
    steps_left: int,
    agree: Callable[[float], float],
    on_event: OnEvent,
) -> Step:
    """Return a training step that is compiled by XLA as ``--xla`` says.

    Args:
        build_step: returns the step, a `tf.function`; takes ``use_xla``.
        network: what it trains.
        config: the config of the run.
        steps_left: steps until the end of the run.
        agree: returns the largest of all workers' values.
        on_event: called before and after the step is compiled, and with why it is not.

    Raises:
        InputError: it is to be compiled, and cannot.
    """
    obstacle = find_obstacle(network, config) if config.xla != "off" else ""
    if config.xla == "on":
        if obstacle:
            raise InputError(f"--xla on: {obstacle}, or --xla off")
        return announce_compilation(build_step(use_xla=True), on_event)
    plain = build_step(use_xla=False)
    if config.xla == "off" or not has_gpu():
        return plain
    if obstacle:
        on_event(XlaWeighed(obstacle=obstacle))
        return plain
    return StepInTrial(plain, lambda: build_step(use_xla=True), steps_left, agree, on_event)


def announce_compilation(step: Step, on_event: OnEvent) -> Step:
    """Return a step that reports when it is compiled, which is when it is first called, and how long that took."""
    is_compiled = False

    def announced(images: Any, labels: Any) -> Any:
        nonlocal is_compiled
        if is_compiled:
            return step(images, labels)
        is_compiled = True
        on_event(StepCompiling())
        started = time.perf_counter()
        stats = step(images, labels)
        np.asarray(stats)  # wait for the GPU
        on_event(StepCompiled(time.perf_counter() - started))
        return stats

    return announced


class StepInTrial:
    """A training step that times its first calls, and is compiled by XLA if what is left of the run repays that."""

    def __init__(
        self,
        plain: Any,
        build_compiled: Callable[[], Step],
        steps_left: int,
        agree: Callable[[float], float],
        on_event: OnEvent,
    ) -> None:
        self._step: Any = plain
        self._build_compiled, self._steps_left, self._agree, self._on_event = (
            build_compiled,
            steps_left,
            agree,
            on_event,
        )
        self._taken, self._started = 0, 0.0

    def __call__(self, images: Any, labels: Any) -> Any:
        """Take one step."""
        stats = self._step(images, labels)
        self._taken += 1
        if self._taken == _UNTIMED_STEPS:
            np.asarray(stats)
            self._started = time.perf_counter()
        elif self._taken == _UNTIMED_STEPS + _TIMED_STEPS:
            np.asarray(stats)
            # All workers decide by the same number.
            self._decide(self._agree((time.perf_counter() - self._started) / _TIMED_STEPS), images, labels)
        return stats

    def _decide(self, seconds_per_step: float, images: Any, labels: Any) -> None:
        operations = len(self._step.get_concrete_function(images, labels).graph.as_graph_def().node)
        weighed = weigh(self._steps_left - self._taken, seconds_per_step, operations)
        self._on_event(weighed)
        if weighed.is_worthwhile:
            self._step = announce_compilation(self._build_compiled(), self._on_event)


def weigh(steps_left: int, seconds_per_step: float, operations: int) -> XlaWeighed:
    """Estimate what compiling a step saves until the end of a run, and what it takes.

    Args:
        steps_left: steps until then.
        seconds_per_step: of the step that is not compiled.
        operations: that it consists of.
    """
    return XlaWeighed(
        steps=steps_left,
        saved_seconds=steps_left * seconds_per_step * _SAVED_SHARE,
        compile_seconds=operations * _SECONDS_PER_OPERATION,
    )
