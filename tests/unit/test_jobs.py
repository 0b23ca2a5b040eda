import inspect
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer

from data_prep.manifest import Split
from data_prep.prepare import PrepareConfig
from data_prep.sources import SourceFormat
from jobs.prepare import print_manifest
from trainer import launch
from trainer.architectures import ARCHITECTURES
from trainer.config.request import OPTIONS
from trainer.inference import PredictionSummary
from trainer.runtime.errors import InputError

REPOSITORY = Path(__file__).parents[2]
JOBS = sorted(path.name for path in (REPOSITORY / "jobs").glob("[!_]*.py"))


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", str(REPOSITORY / "jobs" / script), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def split_stderr(finished: subprocess.CompletedProcess[str]) -> tuple[set[str], list[str]]:
    """Return the packages that were imported, and the lines that a user sees."""
    lines = finished.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    return imported, [line for line in lines if not line.startswith("import time:")]


@pytest.mark.parametrize("job", JOBS)
def test_help_answers_without_loading_what_only_work_needs(job):
    finished = run(job, "--help")
    imported, _ = split_stderr(finished)
    assert finished.returncode == 0
    assert "Usage" in finished.stdout
    assert "typer" in imported
    assert not imported & {"tensorflow", "tf_keras", "keras", "ray"}


def test_the_help_of_prepare_names_every_format_of_a_source():
    source = parameters_of("prepare.py")["source"].annotation.__metadata__[0].help
    missing = [name for name in get_args(SourceFormat) if name not in source.lower()]
    assert missing == []


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        ("train.py", ["--arch", "vgg"], f"--arch 'vgg' is unknown; choose from {', '.join(ARCHITECTURES)}"),
        ("train.py", ["--arch", "alexnet", "--dataset", "no/such"], "holds no prepared dataset"),
        ("prepare.py", ["in", "out", "--val-fraction", "0.6", "--test-fraction", "0.4"], "leave no image to train on"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_without_tensorflow(job, options, message):
    finished = run(job, *options)
    imported, lines = split_stderr(finished)
    assert finished.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert finished.stdout == ""
    assert not imported & {"tensorflow", "tf_keras", "keras"}


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        ("train.py", ["--optimizer", "lion"], "--optimizer"),
        ("train.py", ["--colour", "red"], "--colour"),
        ("train.py", ["--arch", "alexnet", "--arch-argument", "width"], "give NAME=VALUE"),
        ("prepare.py", [], "Missing argument"),
    ],
)
def test_options_that_make_no_sense_are_refused(job, options, message):
    finished = run(job, *options)
    imported, lines = split_stderr(finished)
    assert finished.returncode == 2
    (line,) = lines
    assert line.startswith("error: ")
    assert message in line
    assert not imported & {"tensorflow", "ray"}


def test_the_architectures_are_listed_without_building_them():
    finished = run("train.py", "--list-archs")
    imported, lines = split_stderr(finished)
    assert (finished.returncode, lines) == (0, [])
    assert not imported & {"tensorflow", "tf_keras", "keras", "ray"}
    for name, spec in ARCHITECTURES.items():
        (line,) = (line for line in finished.stdout.splitlines() if f" {name} " in line)
        assert f" {spec.parameters[-1]:,} " in line


@pytest.mark.parametrize(("image_size", "arch"), [(46, "cnn_tapered"), (45, "cnn_softmax"), (8, "inception_notes")])
def test_preparation_ends_with_a_command_that_trains_on_the_dataset(write_dataset, capsys, image_size, arch):
    written = write_dataset(image_size=image_size)
    runpy.run_path(str(REPOSITORY / "jobs" / "prepare.py"))["print_next"]("my data", written.manifest)
    command = f"python jobs/train.py --arch {arch} --dataset 'my data'"
    assert capsys.readouterr().out == f"next: {command}\n"
    assert launch.check_dataset(arch, written.uri) == written.manifest


def parameters_of(job: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(runpy.run_path(str(REPOSITORY / "jobs" / job))["main"]).parameters)


def choices_of(annotation: object) -> set[str]:
    """Return the words that an annotation allows, within Annotated and beside None."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {choice for part in get_args(annotation) for choice in choices_of(part)}


def test_the_options_of_train_are_those_of_a_run():
    own = {
        "config",
        "dry_run",
        "list_archs",
        "storage",
        "run_name",
        "max_failures",
        "track",
        "probe_again",
        "wait",
        "profile",
        "profile_steps",
    }
    options = set(parameters_of("train.py")) - own
    one_by_one = {"arch_argument", "optimizer_argument"}
    assert options - one_by_one | {f"{name}s" for name in one_by_one} == OPTIONS.keys()


def test_the_table_of_prepare_is_short_with_a_thousand_classes(write_dataset, capsys):
    manifest = write_dataset().manifest
    splits = {name: Split(rows_per_class=[1] * 1000) for name in manifest.splits}
    names = [f"class {label}" for label in range(1000)]
    print_manifest("/prepared", manifest.model_copy(update={"class_names": names, "splits": splits}))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 40
    assert "... 980 classes between, see manifest.json" in printed
    assert "/prepared: 3000 images 5x5x1, 3 files not used (empty: 2, damaged: 1)" in printed


def test_the_options_of_prepare_are_the_fields_of_its_config():
    others = {"source", "dataset", "source_format", "dry_run", "overwrite", "append", "verbose", "wait"}
    assert set(parameters_of("prepare.py")) - others == set(PrepareConfig.model_fields)


@pytest.mark.parametrize(("job", "fields"), [("train.py", OPTIONS), ("prepare.py", PrepareConfig.model_fields)])
def test_options_that_are_words_allow_what_the_config_allows(job, fields):
    compared = 0
    for name, parameter in parameters_of(job).items():
        allowed = choices_of(parameter.annotation)
        if allowed and name in fields:
            assert allowed == choices_of(fields[name].annotation), name
            compared += 1
    assert compared


@pytest.mark.parametrize("job", ["prepare.py", "predict.py"])
def test_the_formats_of_a_source_are_those_that_are_read(job):
    assert choices_of(parameters_of(job)["source_format"].annotation) == set(get_args(SourceFormat))


def test_a_source_of_which_nothing_can_be_predicted_is_refused():
    check_summary = runpy.run_path(str(REPOSITORY / "jobs" / "predict.py"))["check_summary"]
    required = {"run": "r", "checkpoint": "c", "class_names": ["a"], "images": 5, "labelled": 0, "correct": 0}
    required |= {"parts": {}, "parts_unknown": ""}
    check_summary("in", "out", PredictionSummary(**required, rejected={"damaged": 2, "empty": 2}))
    with pytest.raises(InputError, match="none of the files of in is an image that can be read; out has the reasons"):
        check_summary("in", "out", PredictionSummary(**required, rejected={"damaged": 2, "empty": 3}))


def test_predictions_of_images_that_the_network_knows_are_reported_apart(capsys):
    print_summary = runpy.run_path(str(REPOSITORY / "jobs" / "predict.py"))["print_summary"]
    required = {"run": "r", "checkpoint": "c", "class_names": ["a"], "rejected": {}}
    parts = {"new": {"images": 3}, "val": {"images": 9, "labelled": 8, "correct": 6}}
    parts["train"] = {"images": 90, "labelled": 90, "correct": 90}
    counts = {"images": 102, "labelled": 98, "correct": 96}
    print_summary("out", PredictionSummary(**required, **counts, parts=parts, parts_unknown=""))
    assert capsys.readouterr().out.splitlines() == [
        "out: 102 of 102 images predicted",
        "new    3 images",
        "val    9 images, accuracy: 0.7500 (6 of 8, 95% interval 0.409-0.929)",
        "       the best epoch was chosen on them",
        "train  90 images, accuracy: 1.0000 (90 of 90, 95% interval 0.959-1.000)",
        "       the network was trained on them",
    ]
    print_summary("out", PredictionSummary(**required, **counts, parts={}, parts_unknown="the dataset is gone"))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "accuracy: 0.9796 (96 of 98, 95% interval 0.929-0.994)",
        "whether the network was trained on some of these images is not known: the dataset is gone",
    ]


def test_the_defaults_of_prepare_are_those_of_its_config():
    parameters = parameters_of("prepare.py")
    for name, field in PrepareConfig.model_fields.items():
        assert parameters[name].default == field.default, name


def test_every_job_is_a_subcommand_of_the_installed_command():
    commands = typer.main.get_command(runpy.run_module("jobs.__main__")["app"]).commands
    assert set(commands) == {job.removesuffix(".py").replace("_", "-") for job in JOBS}
    for job in JOBS:
        script = typer.main.get_command(runpy.run_path(str(REPOSITORY / "jobs" / job))["app"])
        of_script = {option.name for option in script.params}
        assert of_script == {option.name for option in commands[job.removesuffix(".py").replace("_", "-")].params}
