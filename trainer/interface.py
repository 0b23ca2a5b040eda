"""The Python interface: what ``import trainer`` offers to a notebook or a script.

import trainer

trainer.prepare("images", "prepared", image_size=96)
run = trainer.train(arch="alexnet", dataset="prepared", epochs=3)
run.history.plot(x="epoch", y=["loss", "val_loss"])
"""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_prep.manifest import Manifest
from trainer.config.config import TrainConfig
from trainer.config.options import format_command
from trainer.config.request import RunRequest, merge_file, parse_request
from trainer.record.run_folder import RunFolder, RunResult, find_runs
from trainer.runtime import console, storage
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import OnEvent
from trainer.runtime.storage import resolve_uri

if TYPE_CHECKING:
    import pandas as pd

    from data_prep.sources import SourceFormat


class Run:
    """A run folder. Everything is read when it is asked for, so a run that is still trained shows how far it is."""

    def __init__(self, uri: str) -> None:
        self._folder = RunFolder(uri)

    def __repr__(self) -> str:
        result = self.result
        return f"<Run {self.uri}: {self.config.arch}, {result.val if result else self.status}>"

    @property
    def uri(self) -> str:
        """Absolute path or s3:// URI of the run folder."""
        return self._folder.uri

    @property
    def config(self) -> TrainConfig:
        """All options of the run."""
        record = self._folder.read_record()
        if record is None:
            raise InputError(f"RUN {self.uri} is not a run: it has no config.json; give a folder that a run wrote")
        return record.config

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the model's scores."""
        return self._folder.read_manifest().class_names

    @property
    def status(self) -> str:
        """How the run ended: completed, diverged, interrupted, refused or failed; "not finished" if it has not."""
        ending = self._folder.read_ending()
        return ending.status if ending else "not finished"

    @property
    def result(self) -> RunResult | None:
        """What ``result.json`` holds of a finished run, such as ``result.val.accuracy``; None for all others."""
        return self._folder.read_result()

    @property
    def history(self) -> "pd.DataFrame":
        """One row per epoch, with the columns of ``metrics.parquet``: epoch, loss, accuracy, val_loss, ..."""
        import pandas as pd

        return pd.DataFrame(self._folder.read_metrics())

    @property
    def steps(self) -> "pd.DataFrame":
        """One row per optimizer step, with the columns of ``steps.parquet``: step, loss, accuracy, ..."""
        steps = self._folder.read_steps()
        if steps is None:
            raise InputError(f"RUN {self.uri} has no steps yet: it has not finished an epoch")
        return steps.to_pandas()

    @property
    def predictions(self) -> "pd.DataFrame":
        """One row per validation image, predicted by the best checkpoint, in the order of the val split.

        The columns are those of `trainer.record.predictions` (path, label, predicted, confidence, loss, ...), and
        correct; a run that has not ended does not have all of them.
        """
        table = self._folder.read_predictions()
        if table is None:
            raise InputError(f"RUN {self.uri} has no predictions: it has no checkpoint of a whole epoch")
        frame = table.to_pandas()
        frame["correct"] = frame["label"] == frame["predicted"]
        return frame

    @property
    def note(self) -> str:
        """The note of the run, in Markdown."""
        try:
            return storage.read_bytes(self._folder.path("note.md")).decode()
        except FileNotFoundError as error:
            raise InputError(f"RUN {self.uri} has no note: it is not finished; run it again to finish it") from error

    def model(self) -> Any:
        """Return a `tf_keras.Model` with the best weights; this imports TensorFlow.

        It takes uint8 or float ``[batch, image_size, image_size, channels]`` with values 0-255, and returns float32
        scores ``[batch, num_classes]``. ``model.keras`` in the run folder is the same model for Keras 3.

        Raises:
            InputError: the run is not finished, or its best checkpoint is gone or damaged.
        """
        from trainer.training.export import load_export

        return load_export(self._folder)


def load_run(uri: str) -> Run:
    """Return the run in a folder, whether it is finished or not.

    Args:
        uri: local path or s3:// URI of a run folder, such as ``runs/first``.

    Raises:
        InputError: there is no run, or its record cannot be read.
    """
    run = Run(resolve_uri(uri))
    # Read now, so that a wrong place is an error here.
    _ = run.config
    return run


def load_runs(storage_uri: str = "runs") -> list[Run]:
    """Return all runs below a storage whose records can be read, in the order of their start.

    Args:
        storage_uri: local path or s3:// URI of the folder that runs are stored in.
    """
    runs, _ = find_runs(resolve_uri(storage_uri))
    return [Run(run.folder.uri) for run in runs]


def train(
    *,
    config: str = "",
    storage: str = "runs",
    run_name: str = "",
    wait: int = 0,
    max_failures: int = 3,
    track: Sequence[str] = (),
    probe_again: bool = False,
    profile_steps: int = 0,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Run:
    """Train as ``jobs/train.py`` does, and return the finished run. Only for the main thread.

    The same options under the same run name continue an interrupted run, and return a finished one.

    Args:
        config: TOML file, or the config.json of a run, to read options from; the others replace them.
        storage: folder or s3:// prefix in which the run is stored.
        run_name: name of the run folder. Default: architecture and time.
        wait: seconds to wait for free workers or starting nodes.
        max_failures: how often the workers are restarted after they were lost.
        track: names of trackers that metrics are sent to, too: see ``--track``.
        probe_again: measure batch sizes and try the augmentation again, also where earlier runs did.
        profile_steps: number of steps to profile; 0 for none.
        on_event: told of the progress, `trainer.runtime.events`. Default: it is shown.
        options: every option of ``python jobs/train.py --help`` by its name, such as ``arch="alexnet"``, ``epochs=3``
            or ``arch_arguments={"dropout": 0.3}``.

    Raises:
        InputError: an option or the dataset is wrong.
        JobError: the run failed or diverged.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if config:
        given = merge_file(config, given)
    with _shown(on_event) as told:
        run, result = train_request(
            parse_request(given),
            storage,
            run_name,
            wait=wait,
            max_failures=max_failures,
            trackers=track,
            probe_again=probe_again,
            profile_steps=profile_steps,
            given=given,
            on_event=told,
        )
    check_outcome(result)
    return Run(run.uri)


def fine_tune(*, init_from: str, run_name: str, head_epochs: int = 5, rate_factor: float = 0.1, **options: Any) -> Run:
    """Train the last layer of a network that starts from other weights, then all of it at a lower rate.

    The first run, ``RUN_NAME-head``, keeps random values of the last layer from spoiling what the others know. The
    second one starts from it. Only for the main thread.

    Args:
        init_from: ``keras:NAME``, a run or a weights file, as for ``--init-from``.
        run_name: name of the second run.
        head_epochs: epochs of the first run.
        rate_factor: factor on the learning rate in the second run.
        options: those of `train`, of which ``epochs`` and ``patience`` are for the second run.

    Returns:
        The second run.

    Raises:
        InputError: an option or the dataset is wrong.
        JobError: a run failed or diverged.
    """
    of_head = {name: value for name, value in options.items() if name not in ("epochs", "steps", "patience")}
    head = train(**of_head, init_from=init_from, freeze_trunk=True, epochs=head_epochs, run_name=f"{run_name}-head")
    begun = {
        # Weights of other pixels would be of no use.
        "input_scaling": head.config.input_scaling,
        "base_learning_rate": rate_factor * head.config.base_learning_rate,
    }
    return train(**{**options, **begun}, init_from=head.uri, run_name=run_name)


def train_request(
    request: RunRequest,
    storage_uri: str,
    run_name: str,
    *,
    wait: int = 0,
    max_failures: int = 3,
    trackers: Sequence[str] = (),
    probe_again: bool = False,
    profile_steps: int = 0,
    given: Mapping[str, Any] | None = None,
    on_event: OnEvent,
) -> tuple[RunFolder, RunResult]:
    """Check a request, connect to Ray or start what is needed, and train.

    Args:
        request: what is asked.
        storage_uri: where runs are stored.
        run_name: "" for one made of the architecture and the time.
        wait: seconds to wait for free workers or starting nodes.
        max_failures: how often lost workers are started again.
        trackers: where metrics go besides the run folder.
        probe_again: measure batch sizes and try the augmentation even where the storage has what earlier runs found.
        profile_steps: number of steps to profile; 0 for none.
        given: options of a request that does not come from the command line of this process, for the note.
        on_event: told of the progress.

    Raises:
        InputError: the request is wrong, or another job has the run.
        JobError: the workers failed more often than allowed.
    """
    # Here, since they load Ray, which reading a run does not need.
    from data_prep.embedded import prepare_embedded
    from trainer import launch
    from trainer.runtime.cluster import connect
    from trainer.training.tracking import check_trackers
    from trainer.workers.groups import wait_for_workers

    launch.check_request(request, storage_uri, run_name)
    check_trackers(trackers, resolve_uri(storage_uri))
    one_process = launch.needs_one_process(request, storage_uri)
    with connect(wait_seconds=None, one_process=one_process) as cluster:
        resources = wait_for_workers(request.num_workers, cluster, wait, on_event)
        with launch.open_run(storage_uri, run_name, request.arch, resources) as run, _tell_name(run, run_name):
            request = launch.choose_dataset(request, storage_uri, prepare_embedded, on_event)
            plan = launch.plan_run(request, run, resources, probe_again=probe_again, on_event=on_event)
            if given is not None:
                place = {"storage": storage_uri, "run_name": run.name}
                plan = replace(plan, command=format_command("train.py", {**given, **place}))
            elif not run_name:
                plan = replace(plan, command=shlex.join(["python", *sys.argv, "--run-name", run.name]))
            result = launch.launch(
                plan,
                run,
                resources,
                max_failures=max_failures,
                trackers=tuple(trackers),
                profile_steps=profile_steps,
                on_event=on_event,
            )
    return run, result


@contextlib.contextmanager
def _tell_name(run: RunFolder, given: str) -> Iterator[None]:
    """Add the name of a run to what interrupts it, if none was given: its command alone would start another run."""
    try:
        yield
    except (JobError, KeyboardInterrupt) as error:
        if not given:
            error.add_note(f"with --run-name {run.name}")
        raise


def check_outcome(result: RunResult) -> None:
    """Raise JobError if a run diverged."""
    if result.status == "diverged":
        raise JobError(f"{result.reason}; lower --base-learning-rate or set --clip-norm")


def prepare(
    source: str,
    dataset: str,
    *,
    source_format: "SourceFormat | None" = None,
    overwrite: bool = False,
    append: bool = False,
    wait: int = 0,
    verbose: bool = False,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Manifest:
    """Prepare a dataset as ``jobs/prepare.py`` does, and return its manifest. Only for the main thread.

    Args:
        source: folder, file or s3:// prefix of images.
        dataset: folder or s3:// prefix to write the prepared dataset to.
        source_format: format of the source. Default: detected.
        overwrite: replace the dataset if there is one.
        append: add the images of the source that the dataset does not have.
        wait: seconds to wait for a node if none has joined yet.
        verbose: show the statistics of Ray Data, too.
        on_event: told of the progress and of the statistics. Default: it is shown.
        options: the other options of ``python jobs/prepare.py --help`` by their names, such as ``image_size=96``.

    Raises:
        InputError: an option, the source or the dataset is wrong.
        JobError: the preparation failed.
    """
    from data_prep import prepare as preparation
    from trainer.runtime.cluster import connect

    config = preparation.parse_config(**options)
    preparation.check_modes(overwrite=overwrite, append=append)
    work = preparation.check_places(source, dataset, config, overwrite=overwrite, append=append)
    with contextlib.ExitStack() as stack:
        if work in ("append", "decode"):
            stack.enter_context(connect(wait_seconds=wait))
        return preparation.prepare(
            source,
            dataset,
            config,
            source_format=source_format,
            overwrite=overwrite,
            append=append,
            on_event=stack.enter_context(_shown(on_event, verbose=verbose)),
        )


@contextlib.contextmanager
def _shown(on_event: OnEvent | None, *, verbose: bool = False) -> Iterator[OnEvent]:
    if on_event is not None:
        yield on_event
        return
    with console.show_events(verbose=verbose) as show:
        yield show
