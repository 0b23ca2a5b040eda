import importlib.util
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from trainer.config.batch_table import BatchChoice
from trainer.config.request import parse_request, read_options
from trainer.launch import (
    RunPlan,
    check_dataset,
    check_request,
    choose_dataset,
    embedded_dataset,
    launch,
    load_checked_manifest,
    open_run,
    plan_run,
)
from trainer.record.augmentation_choice import AugmentationChoice, write_choice
from trainer.record.run_folder import RunFolder, describe_run
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import ignore_event
from trainer.training.job import WorkerResult
from trainer.workers.groups import WorkerCount, parse_num_workers

PAST = Path(__file__).parents[1] / "past_records"
ONE_MACHINE = Resources(num_nodes=1, num_cpus=4, num_gpus=0, free_gpus=0, devices="4 cores", node_memory_gib=16)
FOUR_GPUS = Resources(num_nodes=1, num_cpus=16, num_gpus=4, free_gpus=4, devices="L4", node_memory_gib=64)
# Nothing to measure.
SETTLED = {"global_batch_size": "4", "precision": "float32"}


@pytest.fixture
def dataset(write_dataset) -> str:
    return write_dataset(rows=(100, 10, 0), image_size=24, rows_per_shard=100).uri


@pytest.fixture
def options(dataset) -> dict:
    """What `jobs/train.py` gives: None is what the command line leaves open."""
    return {"arch": "cnn_softmax", "dataset": dataset, "seed": 0, "epochs": None, "optimizer": None}


@pytest.fixture
def check(options):
    """Return a function that makes a request and looks at its dataset and its workers."""

    def check(resources=ONE_MACHINE, **given) -> WorkerCount:
        request = parse_request({**options, **given})
        load_checked_manifest(request, resources)
        return parse_num_workers(request.num_workers, resources)

    return check


@pytest.fixture
def plan(options, tmp_path):
    """Return a function that plans a run whose batch and precision are given."""

    def plan(run=None, on_event=ignore_event, **given) -> RunPlan:
        run = run or RunFolder(str(tmp_path / "runs" / "new"))
        return plan_run(parse_request({**options, **SETTLED, **given}), run, ONE_MACHINE, on_event=on_event)

    return plan


def test_the_embedded_dataset_is_prepared_for_a_request_without_one(options, tmp_path):
    def prepare(*arguments) -> str:
        prepared.append(arguments)
        return arguments[0]

    prepared, events = [], []
    given = parse_request(options)
    assert choose_dataset(given, str(tmp_path), prepare, ignore_event) is given
    chosen = choose_dataset(parse_request({**options, "dataset": ""}), str(tmp_path), prepare, events.append)
    place = embedded_dataset("cnn_softmax", str(tmp_path))
    assert (chosen.dataset, prepared) == (place[0], [(*place, events.append)])
    assert [str(event) for event in events] == [
        f"no --dataset: training on the embedded 5,000 MNIST digits, in {place[0]}"
    ]


def test_a_dataset_that_fits_gives_its_manifest(dataset):
    assert check_dataset("cnn_softmax", dataset).image_size == 24


def test_images_too_small_for_the_architecture_are_refused_with_the_size_it_needs(dataset):
    with pytest.raises(InputError, match=r"alexnet needs images of 67x67 pixels or more, .* 24x24.*--image-size 67"):
        check_dataset("alexnet", dataset)


def test_a_dataset_without_validation_images_is_refused(write_dataset):
    message = r"no val images: its largest class has \d, and --val-fraction was 0.15; .* or a larger --val-fraction$"
    with pytest.raises(InputError, match=message):
        check_dataset("inception_notes", write_dataset(rows=(7, 0, 0)).uri)


def test_one_image_a_class_is_too_few_whatever_the_fraction(write_dataset):
    with pytest.raises(InputError, match=r"its largest class has 1, .*; prepare it again with more images$"):
        check_dataset("inception_notes", write_dataset(rows=(1, 0, 0)).uri)


def test_the_embedded_dataset_is_as_small_as_the_architecture_allows(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, image_size = embedded_dataset("alexnet", "runs")
    assert image_size == 67
    assert folder == str(tmp_path / "training-notes" / "datasets" / "mnist-5000-67")
    assert embedded_dataset("cnn_softmax", "runs")[1] == 28


def test_the_embedded_dataset_of_a_bucket_is_in_the_bucket():
    assert embedded_dataset("vgg19", "s3://b/runs/") == ("s3://b/runs/datasets/mnist-5000-32", 32)


def open_and_close(*arguments) -> RunFolder:
    with open_run(*arguments) as run:
        return run


def test_a_run_has_the_name_it_was_given(tmp_path):
    run = open_and_close(str(tmp_path / "runs"), "first_1.2-a", "alexnet", ONE_MACHINE)
    assert (run.uri, run.name) == (str(tmp_path / "runs" / "first_1.2-a"), "first_1.2-a")
    assert storage.find_files(run.uri) == {}


def test_a_run_without_a_name_is_called_after_its_architecture(tmp_path):
    assert open_and_close(str(tmp_path), "", "alexnet", ONE_MACHINE).name.startswith("alexnet-2")


def test_a_run_is_open_once_at_a_time(tmp_path):
    with open_run(str(tmp_path), "first", "alexnet", ONE_MACHINE):
        open_and_close(str(tmp_path), "second", "alexnet", ONE_MACHINE)
        with pytest.raises(InputError, match="run first is in use by process"):
            open_and_close(str(tmp_path), "first", "alexnet", ONE_MACHINE)
    open_and_close(str(tmp_path), "first", "alexnet", ONE_MACHINE)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "with space", "-x", "ä"])
def test_a_run_name_that_is_no_plain_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"--run-name .*: use letters, digits"):
        open_and_close(str(tmp_path), name, "alexnet", ONE_MACHINE)


def test_several_nodes_need_a_storage_and_a_dataset_that_they_share(check, tmp_path):
    two_nodes = replace(FOUR_GPUS, num_nodes=2)
    with pytest.raises(InputError, match=r"--storage .* is a local path and the cluster has 2 nodes.*s3://bucket/pref"):
        open_and_close(str(tmp_path), "first", "alexnet", two_nodes)
    with pytest.raises(InputError, match=r"--dataset .* is a local path and the cluster has 2 nodes"):
        check(two_nodes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arch": "vgg"}, "--arch 'vgg' is unknown"),
        ({"recipe": "old"}, "--recipe 'old' is unknown"),
        ({"epochs": 0}, "--epochs 0: "),
        ({"seed": -1}, "--seed -1: "),
        ({"global_batch_size": "many"}, "--global-batch-size many: "),
        ({"global_batch_size": "101"}, "--global-batch-size 101 is more than the 100 train images"),
        ({"arch_arguments": {"depth": 1}}, "--arch-argument 'depth' is unknown"),
        ({"arch": "alexnet"}, "--arch alexnet needs images of 67x67"),
        ({"dataset": "nowhere"}, "nowhere holds no prepared dataset"),
    ],
)
def test_what_is_wrong_whatever_the_cluster_is_refused_without_one(options, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        check_request(parse_request({**options, **given}), str(tmp_path))


def test_a_run_name_and_a_storage_are_looked_at_without_a_cluster(options, tmp_path):
    request = parse_request(options)
    check_request(request, str(tmp_path / "runs"), "first")
    with pytest.raises(InputError, match="--run-name 'a b'"):
        check_request(request, str(tmp_path), "a b")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give a path that can be read and written"):
        check_request(request, str(tmp_path / "file"))


def test_what_the_command_line_leaves_open_the_recipe_says(plan):
    planned = plan()
    config = planned.config
    assert (config.optimizer, config.epochs, config.weight_decay) == ("adamw", 80, 0.01)
    assert plan(global_batch_size="50").config.epochs == 1000  # two steps each
    assert config.dataset_fingerprint == planned.manifest.fingerprint
    assert plan(recipe="notes").config.optimizer == "adam"


def test_a_run_is_continued_with_the_batch_that_it_began_with(plan, options, tmp_path):
    request = parse_request(options)
    begun = BatchChoice(
        request=request.batch, global_batch_size=8, precision="mixed_bfloat16", limit="rows", explanation="as measured"
    )
    run = RunFolder(str(tmp_path / "runs" / "begun"))
    run.write_record(describe_run(plan().config, "1 node", begun))
    continued = plan_run(request, run, ONE_MACHINE)
    assert (continued.config.global_batch_size, continued.config.precision) == (8, "mixed_bfloat16")
    assert continued.batch == begun


def test_the_trials_of_a_study_start_from_what_was_found_outside_of_it(plan, options, tmp_path):
    request = parse_request({**options, **SETTLED})
    run, config = RunFolder(str(tmp_path / "study" / "trials" / "one")), plan().config
    for storage_uri, augmentation in ((storage.parent(run.uri), "flip"), (str(tmp_path), "rotation+zoom")):
        choice = AugmentationChoice(augmentation=augmentation, figures="", run="before", chosen=datetime.now(UTC))
        write_choice(storage_uri, config, choice)
    assert plan_run(request, run, ONE_MACHINE, memory_uri=str(tmp_path)).config.known_augmentation == "rotation+zoom"
    assert plan_run(request, run, ONE_MACHINE).config.known_augmentation == "flip"


def test_a_run_is_continued_whose_optimizer_arguments_were_options_of_their_own(options, tmp_path):
    options = {**options, "global_batch_size": 16, "precision": "float32"}
    given = parse_request({**options, "optimizer": "sgd", "optimizer_arguments": {"nesterov": False}})
    run = RunFolder(str(tmp_path / "runs" / "begun"))
    begun = plan_run(given, run, ONE_MACHINE)
    run.write_record(describe_run(begun.config, "1 node", begun.batch))
    record = json.loads(storage.read_bytes(run.path("config.json")))
    del record["config"]["optimizer_arguments"]
    record["config"] |= {"nesterov": False, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "tuned_batch_size": 64}
    # It was scaled linearly.
    record["config"]["base_learning_rate"] *= 256**0.5 / 16**0.5
    storage.write_bytes(run.path("config.json"), json.dumps({**record, "format": 1}).encode())
    assert plan_run(given, run, ONE_MACHINE).config == begun.config
    assert plan_run(parse_request(read_options(run.path("config.json"))), run, ONE_MACHINE).config == begun.config
    with pytest.raises(InputError, match=r"optimizer_arguments: \{'nesterov': False\} -> \{'nesterov': True\}"):
        plan_run(parse_request({**options, "optimizer": "sgd"}), run, ONE_MACHINE)


@pytest.mark.parametrize(
    ("resources", "num_workers", "expected"),
    [
        (ONE_MACHINE, "auto", 1),
        (FOUR_GPUS, "auto", 4),
        (FOUR_GPUS, "2", 2),
        (ONE_MACHINE, "2", 2),
        (FOUR_GPUS, "2:8", 4),
        (FOUR_GPUS, "1:3", 3),
        (ONE_MACHINE, "1:3", 3),
    ],
)
def test_there_is_one_worker_a_gpu_unless_asked_otherwise(check, resources, num_workers, expected):
    assert check(resources, num_workers=num_workers).now == expected


@pytest.mark.parametrize("num_workers", ["0", "-1", "two", "1.5", "", "3:2", "0:2", ":2", "2:"])
def test_a_number_of_workers_that_is_none_is_refused(check, num_workers):
    with pytest.raises(InputError, match=r"--num-workers .*: give a number from 1, MIN:MAX such as 2:8, or auto"):
        check(num_workers=num_workers)


def test_more_workers_than_gpus_are_refused(check):
    with pytest.raises(
        InputError, match="--num-workers 5 needs 5 GPUs, the cluster has 4; give 4 or less, or auto, or --wait"
    ):
        check(FOUR_GPUS, num_workers="5")


def test_a_batch_larger_than_the_train_split_is_refused(check):
    with pytest.raises(
        InputError, match=r"--global-batch-size 101 is more than the 100 train images of .*; give 100 or less"
    ):
        check(global_batch_size="101")
    check(global_batch_size="100")


def test_a_test_split_without_images_cannot_be_evaluated(check):
    with pytest.raises(InputError, match=r"--evaluate-test: .* has no test images"):
        check(evaluate_test=True)


def test_an_export_whose_package_is_missing_is_refused_with_how_to_install_it(check, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--export onnx .* pip install -e '.\[onnx\]'"):
        check(export="onnx")


@pytest.fixture
def finished(plan, tmp_path, make_result):
    planned, run = plan(), RunFolder(str(tmp_path / "runs" / "first"))
    run.write_record(describe_run(planned.config, "1 node"))
    run.write_ending(make_result())
    return run, planned


@pytest.fixture
def begun(plan, tmp_path) -> RunFolder:
    """A run whose workers have started once."""
    planned, run = plan(), RunFolder(str(tmp_path / "runs" / "first"))
    run.write_manifest(planned.manifest)
    run.write_record(describe_run(planned.config, "1 node"))
    run.start_attempt()
    return run


def test_a_finished_run_is_not_started_again(finished, make_result):
    run, planned = finished
    events = []
    assert launch(planned, run, ONE_MACHINE, on_event=events.append) == make_result()
    assert events == []


def test_a_used_name_with_another_dataset_is_refused_before_anything_is_measured(finished, plan, write_dataset):
    run, _ = finished
    write_dataset(rows=(3, 3, 0), image_size=24)
    with pytest.raises(
        InputError, match=r"run first .* another config \(dataset_fingerprint: .*; choose another --run"
    ):
        plan(run, global_batch_size="max", precision="auto")


def test_a_used_name_with_another_config_is_refused_with_the_differences(finished, plan):
    run, _ = finished
    with pytest.raises(InputError, match=r"run first .* another config \(epochs: 80 -> 3; .*choose another --run-name"):
        launch(plan(run, epochs=3), run, ONE_MACHINE)


def test_more_epochs_train_a_finished_run_on(finished, plan, monkeypatch):
    def fail(*arguments, **options):
        raise JobError("stopped")

    monkeypatch.setattr("trainer.launch.run_workers", fail)
    run, planned = finished
    run.start_attempt()
    with pytest.raises(JobError, match="stopped"):
        launch(plan(run, epochs=100), run, ONE_MACHINE)
    # The attempt that finished it was not lost.
    assert "workers lost" not in [one.kind for one in run.read_incidents()]
    config = run.read_record().config
    assert (config.epochs, config.patience) == (100, 0)
    assert config.model_copy(update={"epochs": 80, "patience": 4}) == planned.config
    assert run.read_ending().status == "failed"


def test_a_cosine_that_has_come_down_is_not_trained_on(plan, tmp_path, make_result):
    planned, run = plan(schedule="cosine", epochs=5), RunFolder(str(tmp_path / "runs" / "first"))
    run.write_record(describe_run(planned.config, "1 node"))
    run.write_ending(make_result())
    with pytest.raises(InputError, match=r"epochs: 5 -> 9"):
        plan(run, schedule="cosine", epochs=9)


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("no layer fits"), "refused"), (JobError("2 workers found no room"), "failed")]
)
def test_a_run_whose_workers_end_early_says_why(plan, tmp_path, monkeypatch, error, status):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("trainer.launch.run_workers", fail)
    run = RunFolder(str(tmp_path / "runs" / "first"))
    with pytest.raises(type(error)):
        launch(plan(run), run, ONE_MACHINE)
    ending = run.read_ending()
    assert (ending.status, ending.reason) == (status, str(error))


def test_a_run_that_diverges_in_its_first_epoch_says_so(plan, tmp_path, monkeypatch):
    reason = "the loss or its gradient became nan or inf in one of the steps 1 to 10"
    diverged = WorkerResult(reason, 1, 9, "", (0,), np.zeros((0, 22, 22, 1), np.uint8))
    monkeypatch.setattr("trainer.launch.run_workers", lambda *arguments, **options: diverged)
    run = RunFolder(str(tmp_path / "runs" / "first"))
    with pytest.raises(JobError, match=r"run first diverged in its first epoch: the loss .* steps 1 to 10; lower "):
        launch(plan(run), run, ONE_MACHINE)
    ending = run.read_ending()
    assert (ending.status, ending.reason) == ("diverged", reason)


def test_a_refused_run_begins_again_with_another_option(plan, tmp_path, monkeypatch):
    run = RunFolder(str(tmp_path / "runs" / "first"))
    run.write_record(describe_run(plan(run).config, "1 node"))
    run.start_attempt()
    run.write_interruption("refused", "no layer fits")
    monkeypatch.setattr("trainer.launch.run_workers", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch(plan(run, epochs=3), run, ONE_MACHINE)
    assert [one.what for one in run.read_incidents()] == ["its job ended as refused: no layer fits"]
    assert run.read_record().config.epochs == 3
    assert run.read_ending() is None


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (None, "its job ended without a message: it was killed, or its machine was lost"),
        (("interrupted", "SIGTERM"), "its job was interrupted by SIGTERM"),
        (("failed", "2 workers found no room"), "its job ended as failed: 2 workers found no room"),
    ],
)
def test_how_the_attempt_of_an_earlier_job_ended_is_recorded_once(plan, begun, monkeypatch, ending, reason):
    if ending:
        begun.write_interruption(*ending)
    monkeypatch.setattr("trainer.launch.run_workers", lambda *arguments, **options: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            launch(plan(begun), begun, ONE_MACHINE)
    assert [(one.attempt, one.what) for one in begun.read_incidents()] == [(1, reason)]


@pytest.mark.parametrize("content", ["", '{"status": "completed", "val": {"loss"', "[]", '{"status": "unheard of"}'])
def test_a_damaged_result_is_kept_aside_and_the_run_goes_on(plan, begun, tmp_path, monkeypatch, content):
    run, events = begun, []
    Path(run.path("result.json")).write_text(content)
    monkeypatch.setattr("trainer.launch.run_workers", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch(plan(run, on_event=events.append), run, ONE_MACHINE)
    assert re.search(rf"result.json cannot be read: .*; kept as {run.path('damaged', 'result.json')}; ", str(events[0]))
    assert Path(run.path("damaged", "result.json")).read_text() == content
    assert [one.what for one in run.read_incidents()] == [f"its job ended as failed: {events[0]}"]
    assert run.read_ending() is None


def test_a_damaged_config_is_replaced_by_its_copy(plan, begun):
    record, events = begun.read_record(), []
    Path(begun.path("config.json")).write_text("{")
    assert plan(begun, on_event=events.append).config == record.config
    assert begun.read_record() == record
    assert [str(one) for one in events] == [one.what for one in begun.read_incidents()]
    assert re.search(
        r"config.json cannot be read: .*; kept as .*; its copy in attempts/ takes its place$", str(events[0])
    )
    assert Path(begun.path("damaged", "config.json")).read_text() == "{"


def test_a_damaged_config_without_a_copy_stops_the_run_with_what_to_do(plan, begun):
    Path(begun.path("config.json")).write_text("{")
    Path(begun.path("attempts", "0001.json")).write_bytes((PAST / "a9db2b2" / "attempt.json").read_bytes())
    before = {name: Path(begun.path(name)).read_bytes() for name in storage.find_files(begun.uri)}
    with pytest.raises(
        InputError, match=r"config.json cannot be read: .*; no copy .* from a backup, or .* --run-name$"
    ):
        plan(begun)
    assert {name: Path(begun.path(name)).read_bytes() for name in storage.find_files(begun.uri)} == before


def test_a_damaged_config_of_a_run_that_never_started_is_written_again(plan, tmp_path):
    run = RunFolder(str(tmp_path / "runs" / "first"))
    run.write(b"{", "config.json")
    plan(run)
    assert run.read_record() is None
    assert [one.kind for one in run.read_incidents()] == ["files damaged"]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_damaged_manifest_is_replaced_by_that_of_the_dataset(plan, begun, dataset, content):
    manifest = Path(begun.path("dataset.json"))
    manifest.unlink()
    if content:
        manifest.write_text(content)
    plan(begun)
    assert begun.read_manifest() == check_dataset("cnn_softmax", dataset)
    assert [one.kind for one in begun.read_incidents()] == ["files damaged"]


@pytest.mark.parametrize("name", ["result.json", "config.json", "dataset.json"])
def test_a_record_of_a_newer_version_is_not_damaged(plan, begun, name):
    newer = '{"format": 99, "val": 1}'
    Path(begun.path(name)).write_text(newer)
    with pytest.raises(InputError, match=rf"{name} cannot be read: it is of format 99: update this program"):
        plan(begun)
    assert Path(begun.path(name)).read_text() == newer
