"""Run the trials of a study: every trial is a run started by `trainer.launch`, in an actor that runs one at a time.

A study that is run again continues where it stopped: ended trials are in the storage, interrupted ones continue from
their checkpoints, and the values of a trial depend neither on the job that runs it nor on the time.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer import launch
from trainer.batch.finder import measure_size
from trainer.config.config import TrainConfig
from trainer.config.options import format_command, format_value
from trainer.config.pretrained import resolve_init_from
from trainer.config.request import merge_options, parse_request
from trainer.record.run_folder import RunFolder, RunInterruption
from trainer.runtime import storage
from trainer.runtime.cluster import Resources, read_resources
from trainer.runtime.errors import BatchError, InputError, JobError
from trainer.runtime.events import EpochFinished, Event, OnEvent, StageProgressed, StudyTrialEnded
from trainer.runtime.lease import Lease, hold_lease
from trainer.runtime.markdown import format_count
from trainer.study.analysis import find_best
from trainer.study.file import Study
from trainer.study.folder import StudyFolder, Trial, sort_trials
from trainer.study.report import write_study_report
from trainer.study.search import OptunaSearch, Values, nest_values, suggest_values
from trainer.workers.groups import parse_num_workers

_POLL_SECONDS = 0.2
# While a long study runs, its report is written this often.
_SECONDS_BETWEEN_REPORTS = 60.0
# Time of a trial in addition to its steps: processes, TensorFlow, tracing, plots.
_START_SECONDS = 8.0
# Assumed if the trial itself finds its batch.
_TYPICAL_BATCH = 64
# Evaluation takes about a third of a training step per image.
_EVALUATION_SHARE = 1 / 3


@dataclass(frozen=True)
class StudyPlan:
    """The description of a study before it runs (tuning playbook, designing the next round)."""

    goal: str
    scientific: list[str]
    nuisance: list[str]
    trials: int
    trials_left: int
    trials_per_value: float
    """Number of trials for each scientific value."""
    concurrency: int
    predicted_seconds: float | None
    """Predicted duration of the remaining trials; None if unknown."""

    def __str__(self) -> str:
        lines = [
            f"goal: {self.goal}",
            f"scientific: {'; '.join(self.scientific) or 'none'}",
            f"nuisance ({format_count(len(self.nuisance), 'dimension')}): {'; '.join(self.nuisance) or 'none'}",
            f"{self.trials_left} of {format_count(self.trials, 'trial')} to run, {self.trials_per_value:g} per "
            f"scientific value, {self.concurrency} at once",
        ]
        if self.predicted_seconds is not None:
            lines.append(f"predicted: {format_count(math.ceil(self.predicted_seconds / 60), 'minute')}")
        return "\n".join(lines)


def plan_study(study: Study, folder: StudyFolder, resources: Resources) -> StudyPlan:
    """Return what running a study would do; measure a training step if no trial has completed yet.

    Raises:
        InputError: one of its trials can never run: a value is not allowed, or the cluster is too small.
    """
    launch.check_shared("--storage", folder.uri, resources)
    check_trials(study, resources)
    ended = [one for one in folder.read_trials() if one.kind == "search" and one.ended]
    left = max(0, study.trials - len(ended))
    concurrency = find_concurrency(study, resources)
    known = [one.seconds for one in ended if one.status == "completed"]
    of_trial = float(np.median(known)) if known else _predict_trial_seconds(study, resources)
    described = [(one.role, f"{one.label} {one.domain}") for one in study.parameters]
    return StudyPlan(
        goal=study.goal,
        scientific=[text for role, text in described if role == "scientific"],
        nuisance=[text for role, text in described if role == "nuisance"],
        trials=study.trials,
        trials_left=left,
        trials_per_value=study.trials / study.num_combinations,
        concurrency=concurrency,
        predicted_seconds=None if of_trial is None else of_trial * -(-left // concurrency),
    )


def check_trials(study: Study, resources: Resources) -> None:
    """Raise InputError if a trial can never run."""
    indices = range(study.trials) if study.algorithm != "tpe" else range(0)
    for index in indices:
        try:
            request = parse_request(_options(study, suggest_values(study, index)))
            launch.load_checked_manifest(request, resources)
            parse_num_workers(request.num_workers, resources)
        except InputError as error:
            raise InputError(f"trial {index}: {error}") from error


def find_concurrency(study: Study, resources: Resources) -> int:
    """Return how many trials run at once: each worker has its own GPU, or its own node.

    Raises:
        InputError: the study asks for more workers than the cluster has GPUs.
    """
    num_workers = parse_num_workers(str(study.base.get("num_workers", "auto")), resources).now
    places = resources.num_gpus or resources.num_nodes
    if study.concurrency is None:
        return max(1, places // num_workers)
    if resources.num_gpus and study.concurrency * num_workers > places:
        raise InputError(
            f"concurrency: {format_count(study.concurrency, 'trial')} at once x {format_count(num_workers, 'worker')} "
            f"need {format_count(study.concurrency * num_workers, 'GPU')}, the cluster has {places}; "
            f"give {places // num_workers} or less"
        )
    return study.concurrency


def run_study(
    study: Study,
    folder: StudyFolder,
    resources: Resources,
    *,
    characterize: int = 0,
    retry_failed: bool = False,
    max_failures: int = 3,
    on_event: OnEvent,
) -> list[Trial]:
    """Run the remaining trials of a round, write its report, and return all its trials.

    Args:
        study: the study in its file.
        folder: folder of the round.
        resources: resources of the connected cluster.
        characterize: number of other seeds with which the best trial and the incumbent are repeated.
        retry_failed: run the failed trials again.
        max_failures: how often the workers of a trial are restarted after they were lost.
        on_event: called with the progress of the trials.

    Raises:
        InputError: the round was started with another study, another job works on it, or a trial can never run.
        JobError: no trial has completed.
    """
    with hold_lease(folder.path("lease.json"), f"study {folder.uri}") as lease:
        folder.write_study(study)
        sweep = _Sweep(study, folder, lease, resources, retry_failed, max_failures, on_event)
        sweep.run(sweep.search_trials())
        if characterize:
            sweep.run(sweep.repetitions(characterize))
        return _conclude(study, folder, sweep.trials)


def conclude_study(study: Study, folder: StudyFolder) -> list[Trial]:
    """Write the report of a round without remaining trials, and return all its trials; no cluster is needed.

    Raises:
        InputError: the round was started with another study, or another job works on it.
        JobError: no trial has completed.
    """
    with hold_lease(folder.path("lease.json"), f"study {folder.uri}"):
        folder.write_study(study)
        return _conclude(study, folder, folder.read_trials())


def _conclude(study: Study, folder: StudyFolder, trials: list[Trial]) -> list[Trial]:
    write_study_report(folder, study, trials)
    if find_best(study, trials) is None:
        raise JobError(f"no trial of {folder.uri} has completed; the last one: {trials[-1].reason}")
    return trials


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; the fields are those of `Trial`."""

    status: Literal["completed", "infeasible", "stopped", "failed"]
    reason: str = ""
    objective: float | None = None
    correct: int = 0
    total: int = 0
    best_step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class _Running:
    trial: Trial
    actor: Any
    started: float
    """Monotonic clock, in seconds."""


class _Sweep:
    """The trials of a round: which have started, which are running, and how the others ended.

    `_start` and `_settle` are the only methods that change the state of a trial.
    """

    def __init__(
        self,
        study: Study,
        folder: StudyFolder,
        lease: Lease,
        resources: Resources,
        retry_failed: bool,
        max_failures: int,
        on_event: OnEvent,
    ) -> None:
        self._study, self._folder, self._lease = study, folder, lease
        self._concurrency = find_concurrency(study, resources)
        self._job_folder = resources.folder
        self._max_failures, self._on_event = max_failures, on_event
        self._known = {one.run_name: one for one in folder.read_trials()}
        self._running: dict[Any, _Running] = {}
        """Running trials by the reference to the return value of their actor."""
        if retry_failed:
            self._known |= {
                name: one.model_copy(update={"status": "running"})
                for name, one in self._known.items()
                if one.status == "failed"
            }
        self._search = self._replay() if study.algorithm == "tpe" or study.early_stopping == "asha" else None
        self._reported = time.monotonic()
        self._idle: list[Any] = []
        """Actors whose trial has completed: the next trial there saves three seconds of imports."""

    @property
    def trials(self) -> list[Trial]:
        """All trials that have started."""
        return sort_trials(self._known.values())

    def search_trials(self) -> Iterator[Trial]:
        """Yield the trials of the search that have not ended, each when it can start."""
        for index in range(self._study.trials):
            name = f"trial-{index:04d}"
            if self._has_ended(name):
                continue
            # A trial whose record cannot be read has no values.
            values = (self._known[name].values or None) if name in self._known else None
            if self._search is not None:
                values = self._search.start(index, values)
            elif values is None:
                values = suggest_values(self._study, index)
            trial = Trial(run_name=name, kind="search", index=index, values=values)
            if self._search is not None:
                # The finished epochs of an interrupted trial.
                for epoch, value in enumerate(self._read_history(trial), start=1):
                    self._search.report(index, epoch, value)
            yield trial

    def repetitions(self, count: int) -> Iterator[Trial]:
        """Yield those repetitions of the best trial and the incumbent with other seeds that have not ended."""
        best = find_best(self._study, self.trials)
        if best is None:
            return
        seed = int(self._study.base.get("seed", 0))
        for offset in range(1, count + 1):
            of_seed = {"seed": seed + offset}
            name = f"best-{best.index:04d}-seed-{offset}"
            if not self._has_ended(name):
                yield Trial(run_name=name, kind="best", index=best.index, values={**best.values, **of_seed})
            name = f"incumbent-seed-{offset}"
            # The base config without changes, if it is complete.
            if "arch" in self._study.base and not self._has_ended(name):
                yield Trial(run_name=name, kind="incumbent", index=0, values=of_seed)

    def run(self, trials: Iterator[Trial]) -> None:
        """Run trials, as many at once as fit, until all have ended."""
        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": _here()})
        try:
            while True:
                while len(self._running) < self._concurrency and (trial := next(trials, None)):
                    self._start(trial, queue)
                if not self._running:
                    return
                self._handle_events(queue)
                for reference in ray.wait(list(self._running), timeout=0)[0]:
                    self._settle(reference, _read_outcome(reference))
        finally:
            # Killing an actor also ends every process that it started.
            for actor in (*self._idle, *(one.actor for one in self._running.values())):
                ray.kill(actor)
            self._idle.clear()
            self._running.clear()
            queue.shutdown()

    def _has_ended(self, run_name: str) -> bool:
        return run_name in self._known and self._known[run_name].ended

    def _start(self, trial: Trial, queue: Queue) -> None:
        self._keep(trial)
        actor = (
            self._idle.pop()
            if self._idle
            else ray.remote(_TrialActor).options(num_cpus=0, scheduling_strategy=_here()).remote()
        )
        options = _options(self._study, trial.values)
        reference = actor.run.remote(
            options, self._study.objective, self._folder.uri, trial, self._job_folder, self._max_failures, queue
        )
        self._running[reference] = _Running(trial, actor, time.monotonic())

    def _settle(self, reference: Any, outcome: Outcome) -> None:
        """End a running trial: release its actor, report to the search, and record and report the outcome."""
        one = self._running.pop(reference)
        if outcome.status == "completed":
            self._idle.append(one.actor)
        else:
            ray.kill(one.actor)
        trial = one.trial.model_copy(update={**asdict(outcome), "seconds": time.monotonic() - one.started})
        if self._search is not None and trial.kind == "search":
            self._search.end(trial.index, trial.objective if trial.status == "completed" else None)
        self._keep(trial)
        self._on_event(StudyTrialEnded(trial.run_name, _describe_trial(trial, self._study)))
        if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
            write_study_report(self._folder, self._study, self.trials)
            self._reported = time.monotonic()

    def _handle_events(self, queue: Queue) -> None:
        """Listen to the trials for a moment, and stop those that asha would stop."""
        deadline = time.monotonic() + _POLL_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                name, event = queue.get(timeout=left)
            except Empty:
                return
            if isinstance(event, EpochFinished):
                self._stop_if_worse(name, int(event.row["epoch"]), event.row[self._study.objective])

    def _stop_if_worse(self, run_name: str, epoch: int, objective: float) -> None:
        reference = next((key for key, one in self._running.items() if one.trial.run_name == run_name), None)
        if self._search is None or reference is None:
            return
        trial = self._running[reference].trial
        if trial.kind == "search" and self._search.report(trial.index, epoch, objective):
            reason = f"worse than others after {format_count(epoch, 'epoch')}"
            self._settle(reference, Outcome("stopped", reason, objective))

    def _keep(self, trial: Trial) -> None:
        self._known[trial.run_name] = trial
        ended = sum(one.ended and one.kind == "search" for one in self._known.values())
        self._on_event(StageProgressed("trials", ended, self._study.trials))
        # If another job has taken over the study, the trials are its own.
        self._lease.check()
        self._folder.write_trial(trial)

    def _replay(self) -> OptunaSearch:
        search = OptunaSearch(self._study)
        for trial in self._known.values():
            if trial.kind == "search" and trial.ended and trial.values:
                objective = trial.objective if trial.status == "completed" else None
                search.replay(trial.index, trial.values, self._read_history(trial), objective)
        return search

    def _read_history(self, trial: Trial) -> list[float]:
        """Return the objective of a trial after each epoch so far."""
        return [row[self._study.objective] for row in self._folder.run(trial).read_metrics()]


class _TrialActor:
    """Run trials, one after another, in a process of its own on the driver's node."""

    def run(
        self,
        options: Values,
        objective: str,
        storage_uri: str,
        trial: Trial,
        job_folder: str,
        max_failures: int,
        queue: Queue,
    ) -> Outcome:
        """Run a trial, or continue it, and return how it ended."""
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        resources = read_resources(job_folder)

        def send_event(event: Event) -> None:
            queue.actor.put_nowait.remote((trial.run_name, event))

        run = StudyFolder(storage_uri).run(trial)
        try:
            # This job holds the study, so another job that still holds the run is dead.
            with launch.open_run(storage_uri, trial.run_name, options["arch"], resources, wait=True):
                # What runs outside of the study have found, so that all trials start from the same.
                memory_uri = storage.parent(storage.parent(storage_uri))
                plan = launch.plan_run(parse_request(options), run, resources, memory_uri=memory_uri)
                plan = replace(plan, command=_describe_command(options, plan.config, run))
                result = launch.launch(
                    plan, run, resources, max_failures=max_failures, remember=False, on_event=send_event
                )
        except BatchError as error:
            return Outcome("infeasible", str(error))
        except InputError as error:
            return Outcome("failed", str(error))
        except JobError as error:
            ending = run.read_ending()
            diverged = isinstance(ending, RunInterruption) and ending.status == "diverged"
            return Outcome("infeasible" if diverged else "failed", str(error))
        if result.status == "diverged":
            return Outcome("infeasible", result.reason)
        best = next(row for row in run.read_metrics() if row["epoch"] == result.best_epoch)
        return Outcome(
            "completed",
            objective=best[objective],
            correct=result.val.correct,
            total=result.val.total,
            best_step=int(best["step"]),
            steps=result.steps,
        )


def _read_outcome(reference: Any) -> Outcome:
    """Return what the actor of a trial returned; if the actor was lost, the trial has failed."""
    try:
        outcome: Outcome = ray.get(reference)
    except RayError as error:
        return Outcome("failed", str(error).strip().splitlines()[-1])
    return outcome


def _options(study: Study, values: Values) -> dict[str, Any]:
    """Return the options of a trial for `trainer.config.request`."""
    options = merge_options(study.base, nest_values(values))
    # The process of a trial has another current folder.
    for name, resolve_location in (("dataset", storage.resolve_uri), ("init_from", resolve_init_from)):
        if options.get(name):
            options[name] = resolve_location(options[name])
    return {**options, "epochs": study.epochs, "steps": study.steps}


def _describe_command(options: Values, config: TrainConfig, run: RunFolder) -> str:
    """Return the command that starts the same run."""
    settled = {name: getattr(config, name) for name in ("epochs", "global_batch_size", "precision")}
    place = {"storage": storage.parent(run.uri), "run_name": run.name}
    return format_command("train.py", {**options, **settled, **place, "steps": None})


def _describe_trial(trial: Trial, study: Study) -> str:
    """Return one line with the values and the outcome of a trial."""
    values = ", ".join(f"{name} {format_value(value)}" for name, value in trial.values.items())
    outcome = f": {trial.reason}" if trial.reason else ""
    if trial.objective is not None:
        outcome += f", {study.objective} {trial.objective:.4f}"
    if trial.total:
        outcome += f" ({trial.correct} of {trial.total})"
    return f"{trial.status}{outcome}; {values}; {trial.seconds:.0f} s"


def _predict_trial_seconds(study: Study, resources: Resources) -> float | None:
    """Estimate how long a trial takes from a few steps of the first one."""
    first = suggest_values(study.model_copy(update={"algorithm": "sobol"}), 0)
    request = parse_request(_options(study, first))
    manifest = launch.load_checked_manifest(request, resources)
    num_workers = parse_num_workers(request.num_workers, resources).now
    rows = manifest.splits["train"].rows
    batch = request.batch.given_size or min(_TYPICAL_BATCH, rows)
    precision = "float32" if request.batch.precision == "auto" else request.batch.precision
    size = max(1, batch // num_workers)
    measured = measure_size(request, manifest, num_workers, size, precision, resources)
    if measured is None:
        return None
    images = rows * study.epochs if study.epochs else batch * (study.steps or 0)
    epochs = study.epochs or -(-images // rows)
    evaluated = epochs * manifest.splits["val"].rows * _EVALUATION_SHARE
    return _START_SECONDS + (images + evaluated) / measured.images_per_second


def _here() -> NodeAffinitySchedulingStrategy:
    """Return the strategy for actors that control a study: on the driver's node, because any other may be lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
