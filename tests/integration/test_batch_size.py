"""Batch sizes found by real trials on real workers, one of which is killed."""

import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from data_prep.manifest import Manifest
from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import write_stripes
from trainer import launch
from trainer.batch import finder
from trainer.batch.finder import choose_batch
from trainer.config.batch_table import ASSUMED_NOISE_SCALE, BatchChoice
from trainer.config.request import RunRequest, parse_request
from trainer.record.run_folder import RunFolder
from trainer.runtime import storage
from trainer.runtime.cluster import read_machine
from trainer.runtime.errors import InputError
from trainer.runtime.events import EpochFinished, SizeMeasured
from trainer.training.batches import make_batch
from trainer.training.dataset import epoch_order, load_manifest, open_split
from trainer.training.network import build_network
from trainer.training.noise import compile_noise
from trainer.training.stages import plan_epoch

NETWORK = {"first_filters": 8, "later_filters": [8], "dense_units": 32}
SMALL = [word for name, value in NETWORK.items() for word in ("--arch-argument", f"{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def work(resources, tmp_path_factory) -> Path:
    """A folder with a prepared dataset of 98 train images."""
    folder = tmp_path_factory.mktemp("work")
    source = write_stripes(folder / "source", images_per_class=47)
    prepare(str(source), str(folder / "dataset"), PrepareConfig(image_size=32))
    return folder


@pytest.fixture(scope="module")
def run(run_on_cluster, work):
    """Return a function that runs a job on the cluster, in the folder."""
    return partial(run_on_cluster, cwd=work)


@pytest.fixture(scope="module")
def trained(run):
    """A run of two workers without options for batch and precision."""
    # One epoch: a second one, beside other work on this machine, may contradict what was measured.
    options = ["--arch", "cnn_softmax", *SMALL, "--dataset", "dataset", "--num-workers", "2", "--epochs", "1"]
    finished = run("train.py", *options, "--run-name", "first")
    assert finished.returncode == 0, finished.stderr
    return finished, options


def measured_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line[8:].startswith(" batch ")]


def test_a_run_finds_its_batch_and_precision_and_says_why(trained, work):
    finished, _ = trained
    batch = RunFolder(str(work / "runs" / "first")).read_record().batch
    assert set(batch.table.measurements) == {"float32"}
    # 98 images over two workers in at least ten steps: 4 each, or 2. The run is too short to measure bfloat16.
    assert batch.global_batch_size in (2, 4, 8)
    assert {one.size for one in batch.table.rows} <= {1, 2, 4}
    assert batch.table.trials == 1
    assert (batch.precision, batch.noise_scale) == (batch.table.precision, ASSUMED_NOISE_SCALE)
    assert len(measured_lines(finished.stderr)) >= 1
    assert batch.explanation in finished.stderr
    assert f"tuned at a batch of 64, this run uses {batch.global_batch_size}" in finished.stderr
    assert "2 replicas x" in finished.stderr


def test_the_note_has_the_table_and_a_picture(trained, work):
    note = (work / "runs" / "first" / "note.md").read_text()
    assert "| precision | batch | images/s |" in note
    assert re.search(r"\| float32 \| 2 x \d \|", note)
    assert (work / "runs" / "first" / "plots" / "batch_sizes.png").exists()


def test_the_next_run_of_the_same_kind_measures_nothing(trained, work, resources):
    request, _ = ask(work, resources, num_workers="2", epochs=1, precision="auto", seed=1)
    events = []
    with launch.open_run(str(work / "runs"), "second", request.arch, resources) as second:
        plan = launch.plan_run(request, second, resources, on_event=events.append)
    assert not any(isinstance(event, SizeMeasured) for event in events)
    assert plan.batch.table == RunFolder(str(work / "runs" / "first")).read_record().batch.table


@pytest.mark.slow
def test_the_table_of_a_job_has_every_size_and_serves_the_next_run(trained, run, work):
    _, options = trained
    printed = run("batch_size.py", *options[: options.index("--epochs")], "--json")
    assert printed.returncode == 0, printed.stderr
    choice = json.loads(printed.stdout)
    of_run = RunFolder(str(work / "runs" / "first")).read_record().batch
    # Beside the sizes that the run measured; an emulated precision has one size.
    measured = choice["table"]["measurements"]
    assert {one["size"] for one in measured["float32"]} >= {one.size for one in of_run.table.rows} | {4}
    assert set(measured) == {"float32", "mixed_bfloat16"}
    assert choice["table_name"] == of_run.table_name


def test_the_noise_that_two_workers_measure_is_that_of_two_halves_of_the_batch(trained, work):
    run, manifest = RunFolder(str(work / "runs" / "first")), load_manifest(str(work / "dataset"))
    config = run.read_record().config.model_copy(update={"num_workers": 1})
    train = open_split(str(work / "dataset"), manifest, "train")
    first_rows = epoch_order(train, config.seed, 1)[: config.global_batch_size]
    steps = len(train) // config.global_batch_size
    network = build_network(manifest, config, steps)
    network.start_epoch(plan_epoch([], config, steps), config, 0, steps)
    measure = compile_noise(network, manifest, config)
    noises = run.read_steps()["grad_noise"].to_numpy()
    assert noises[0] == pytest.approx(float(measure(*make_batch(train, first_rows))), rel=1e-3)
    assert np.isfinite(noises).all()
    assert np.isfinite(pq.read_table(run.path("metrics.parquet"))["noise_scale"].to_numpy()).all()


def search(work: Path, resources, storage_uri, num_workers: int = 1, **options) -> BatchChoice:
    """Choose the batch of a run, while its trials are killed."""
    request, manifest = ask(work, resources, **options)
    return choose_batch(request, manifest, num_workers, str(storage_uri), resources, on_event=kill_trial_workers)


def ask_options(work: Path) -> dict:
    return {
        "arch": "cnn_softmax",
        "arch_arguments": NETWORK,
        "dataset": str(work / "dataset"),
        "precision": "float32",
    }


def ask(work: Path, resources, **options) -> tuple[RunRequest, Manifest]:
    request = parse_request({**ask_options(work), **options})
    return request, launch.load_checked_manifest(request, resources)


def kill_trial_workers(event) -> None:
    """Kill the training workers of this test's cluster, as the kernel does when memory runs out."""
    if not isinstance(event, SizeMeasured):
        return
    cache = f"XDG_CACHE_HOME={os.environ['XDG_CACHE_HOME']}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = cache in (process / "environ").read_bytes().split(b"\0")
            # The name of Ray Train's, or of a process of this machine alone.
            if ours and re.search(b"RayTrainWorker|spawn_main", (process / "cmdline").read_bytes()):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


# That a worker of a group has died is found in test_train.py, too.
@pytest.mark.parametrize(("num_workers", "steps"), [(1, 10), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_a_killed_trial_counts_as_out_of_memory_and_the_search_goes_on(
    work, resources, tmp_path, monkeypatch, num_workers, steps
):
    monkeypatch.setattr(finder, "_FIRST_ON_CPU", 8 * num_workers)
    choice = search(work, resources, tmp_path, num_workers, min_steps_per_epoch=steps, global_batch_size="max")
    # 98 images in so many steps leave 9 for each worker: 8 was measured, 9 was killed.
    assert choice.table.failed == {"float32": 9}
    assert (choice.global_batch_size, choice.limit) == (8 * num_workers, "memory")
    assert storage.find_files(storage.join(str(tmp_path), "batch_sizes"))


def test_workers_that_die_after_their_last_size_cost_nothing(work, resources, tmp_path):
    # 98 images in 98 steps leave one, which is all that is tried.
    choice = search(work, resources, tmp_path, min_steps_per_epoch=98)
    assert choice.table.failed == {}
    assert (choice.global_batch_size, choice.limit) == (1, "rows")


def test_the_process_that_measured_goes_on_to_train(work, tmp_path):
    """On a machine without a cluster."""
    request = parse_request({**ask_options(work), "epochs": 2, "global_batch_size": "auto"})
    pids = []

    def watch(event) -> None:
        if isinstance(event, SizeMeasured | EpochFinished):
            pids.append([one.pid for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())])

    folder = tmp_path / "job"
    folder.mkdir()
    alone = read_machine(str(folder))
    with launch.open_run(str(tmp_path / "runs"), "alone", request.arch, alone) as run:
        plan = launch.plan_run(request, run, alone, on_event=watch)
        result = launch.launch(plan, run, alone, on_event=watch)
    (pid,) = {one for found in pids for one in found}
    assert len(pids) >= 3
    assert not psutil.pid_exists(pid)
    assert result.status == "completed"


def test_a_batch_that_needs_more_than_the_limit_is_refused_with_the_arithmetic(work, resources, tmp_path):
    with pytest.raises(InputError, match=r"--global-batch-size 98: no such batch fits into 0.10 GiB .*98 ran out of"):
        search(work, resources, tmp_path, global_batch_size="98", precision="auto", memory_limit_gib=0.1)
