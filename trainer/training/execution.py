"""How the steps of a run are executed: compiled by XLA or not, and how many in a call.

XLA makes few kernels of a step's many. On a GPU that saves trips to memory and launches, and compiling takes a while.
Where a step is short, the host takes longer to call it than the device to compute it; so several are taken in a call,
which is what `model.fit` calls ``steps_per_execution``.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.config.config import TrainConfig
from trainer.runtime import gpu
from trainer.runtime.errors import InputError
from trainer.runtime.events import OnEvent, StepCompiled, StepCompiling, StepsPerExecutionChosen, XlaWeighed
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
# From there, too: a small network's step took 3.9 ms, and 3.0 ms where 20 were taken in a call.
_REPEATED_SAVED_SHARE = 0.2
# And beginning with a second batch size of ResNet-50, which was traced for it, took a third of compiling it.
_TRACE_SECONDS_PER_OPERATION = 0.0017
# A longer step hides the call.
_SHORT_STEP_SECONDS = 0.01
# Between two calls the worker answers signals and reports its progress.
_EXECUTION_SECONDS = 0.1
# Of images in a call, which the device holds in addition, three times with those that are made ahead.
_MOST_BYTES = 32 * 2**20

Build = Callable[..., Callable[[Any, Any], Any]]


def find_obstacle(network: Network, config: TrainConfig) -> str:
    """Return why the training step of a network cannot be compiled by XLA here; empty if it can."""
    if config.synchronizes_batch_norm and find_batch_norms(network.model):
        return (
            f"BatchNorm communicates with {config.num_workers} workers, which a compiled program cannot; "
            "give --batch-norm replica"
        )
    missing = gpu.find_missing_tools() if has_gpu() else []
    return f"XLA does not find {', '.join(missing)}; {gpu.FIX}" if missing else ""


def choose_execution(
    build: Build,
    network: Network,
    config: TrainConfig,
    steps_left: int,
    agree: Callable[[float], float],
    on_event: OnEvent,
) -> "Execution":
    """Return what takes the steps of a run, as ``--xla`` and ``--steps-per-execution`` say.

    Args:
        build: returns what `trainer.training.step.compile_execution` does; takes ``use_xla`` and ``repeats``.
        network: what is trained.
        config: the config of the run.
        steps_left: steps until the end of the run.
        agree: returns the largest of all workers' values.
        on_event: called before and after the step is compiled, and with why it is not.

    Raises:
        InputError: it is to be compiled, and cannot.
    """
    obstacle = find_obstacle(network, config) if config.xla != "off" else ""
    if config.xla == "on" and obstacle:
        raise InputError(f"--xla on: {obstacle}, or --xla off")
    if has_gpu() and config.xla == "auto" and obstacle:
        on_event(XlaWeighed(obstacle=obstacle))
    weighs_xla = has_gpu() and config.xla == "auto" and not obstacle
    if weighs_xla or (has_gpu() and not config.steps_per_execution):
        return ExecutionInTrial(build, config, weighs_xla, steps_left, agree, on_event)
    return Execution(build, config.xla == "on", config.steps_per_execution or 1, on_event)


class Execution:
    """Takes training steps, some in each call.

    It is called with the batches of these steps, and returns a row for each (`compile_execution`).
    """

    def __init__(self, build: Build, use_xla: bool, steps: int, on_event: OnEvent) -> None:
        self._build, self._on_event = build, on_event
        self._begin(use_xla, steps)

    def _begin(self, use_xla: bool, steps: int) -> None:
        self.steps = steps
        """How many the next call should take, at most."""
        self._uses_xla = use_xla
        self._function: Any = self._build(use_xla=use_xla, repeats=steps > 1)
        self._is_announced = not use_xla

    def __call__(self, images: Any, labels: Any) -> Any:
        """Take the steps; report when they are compiled, which is in the first call, and how long that took."""
        if self._is_announced:
            return self._function(images, labels)
        self._is_announced = True
        self._on_event(StepCompiling())
        started = time.perf_counter()
        stats = self._function(images, labels)
        np.asarray(stats)  # wait for the GPU
        self._on_event(StepCompiled(time.perf_counter() - started))
        return stats


class ExecutionInTrial(Execution):
    """Takes one step in each call at first, and times them.

    Then it is compiled by XLA, and takes several in a call, if what is left of the run repays that.
    """

    def __init__(
        self,
        build: Build,
        config: TrainConfig,
        weighs_xla: bool,
        steps_left: int,
        agree: Callable[[float], float],
        on_event: OnEvent,
    ) -> None:
        super().__init__(build, config.xla == "on", 1, on_event)
        self._given_steps, self._weighs_xla = config.steps_per_execution, weighs_xla
        self._steps_left, self._agree = steps_left, agree
        self._taken, self._started = 0, 0.0

    def __call__(self, images: Any, labels: Any) -> Any:
        """Take the steps."""
        stats = super().__call__(images, labels)
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
        steps_left, operations = self._steps_left - self._taken, self._count_operations()
        use_xla = self._uses_xla
        if self._weighs_xla:
            weighed = weigh_xla(steps_left, seconds_per_step, operations)
            self._on_event(weighed)
            use_xla = weighed.is_worthwhile
        build_seconds = operations * (_SECONDS_PER_OPERATION if use_xla else _TRACE_SECONDS_PER_OPERATION)
        saved_seconds = steps_left * seconds_per_step * _REPEATED_SAVED_SHARE
        is_new = use_xla != self._uses_xla
        steps = self._given_steps
        if not steps:
            # A function that is built anyway repeats for nothing.
            repays = is_new or saved_seconds > build_seconds
            steps = count_steps(seconds_per_step, int(np.prod(images.shape[1:]))) if repays else 1
            if steps > 1:
                self._on_event(StepsPerExecutionChosen(steps, seconds_per_step))
        if is_new or steps > 1:
            self._begin(use_xla, steps)

    def _count_operations(self) -> int:
        graph = self._function.get_concrete_function().graph.as_graph_def()
        return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)


def count_steps(seconds_per_step: float, bytes_per_step: int) -> int:
    """Return how many steps a call should take on a GPU.

    Args:
        seconds_per_step: of steps that are taken one in a call.
        bytes_per_step: of the images of a step.
    """
    if seconds_per_step > _SHORT_STEP_SECONDS:
        return 1
    return max(1, min(int(_EXECUTION_SECONDS / seconds_per_step), _MOST_BYTES // bytes_per_step))


def next_number(after: int, every: int, first: int = 0) -> int:
    """Return the least number beyond another one that is ``first`` and a multiple of ``every``."""
    return after + every - (after - first) % every


def weigh_xla(steps_left: int, seconds_per_step: float, operations: int) -> XlaWeighed:
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
