"""Findings of the doctor about healthy nodes, and about each thing that can be wrong."""

from dataclasses import replace

import pytest
from ray.exceptions import GetTimeoutError, RayTaskError, WorkerCrashedError

from trainer.doctor import NodeReport, check_node, check_packages, explain_silence

VERSIONS = {"ray": "2.60.0", "tf_keras": "2.21.0"}
WELL = NodeReport(
    python="3.11.7", packages=VERSIONS, keras="tf_keras", gpus=2, free_gib={"/tmp": 40.0}, storage_error=""
)


def test_this_machine_is_well():
    assert [one.fix for one in check_packages()] == ["", "", ""]


def test_a_node_that_is_well_is_one_line():
    (line,) = check_node("a", WELL, VERSIONS, 2)
    assert str(line) == (
        "ok     node a: Python 3.11.7, tf.keras is tf_keras, 2 GPUs, 40 GiB of disk, storage can be written"
    )


def test_a_node_without_gpus_needs_no_libraries_for_them():
    (line,) = check_node("a", replace(WELL, gpus=0, missing_for_gpus=("libcudnn.so.9 (cuDNN)",)), VERSIONS, 0)
    assert line.fix == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"packages": {**VERSIONS, "ray": "2.59.0"}}, "wrong  node a, versions: {'ray': '2.59.0'}, the driver has"),
        ({"keras": "keras"}, "wrong  node a, tf.keras: keras; set TF_USE_LEGACY_KERAS=1"),
        ({"gpus": 0}, "wrong  node a, gpus: TensorFlow sees 0 of 2; pip install -e '.[gpu]'"),
        (
            {"missing_for_gpus": ("libcudnn.so.9 (cuDNN)", "ptxas")},
            "wrong  node a, CUDA: not found: libcudnn.so.9 (cuDNN), ptxas; install the driver",
        ),
        ({"free_gib": {"/tmp": 0.5, "/data": 9.0}}, "wrong  node a, disk: /tmp has 0.5 GiB; make room"),
        ({"cache_error": "set XDG_CACHE_HOME"}, "wrong  node a, cache: cannot be used; set XDG_CACHE_HOME"),
        ({"storage_error": "no s3:PutObject"}, "wrong  node a, storage: cannot be used; no s3:PutObject"),
    ],
)
def test_what_is_wrong_is_one_line_with_what_to_do(change, expected):
    (line,) = check_node("a", replace(WELL, **change), VERSIONS, 2)
    assert str(line).startswith(expected)


def raised_by_a_task(error: Exception, text: str) -> RayTaskError:
    return RayTaskError("inspect_node", f"ray::inspect_node()\n{text}", error).as_instanceof_cause()


LACKING = "ModuleNotFoundError: No module named 'trainer'"
NOT_IMPORTED = f"RuntimeError: The remote function failed to import on the worker. This may be because\n{LACKING}"


@pytest.mark.parametrize(
    ("error", "gpus", "expected"),
    [
        (GetTimeoutError(), 2, "its GPUs are in use; run this again when the job that has them ends"),
        (GetTimeoutError(), 0, "no answer within 120 s; look at Ray's logs there"),
        (raised_by_a_task(RuntimeError(), NOT_IMPORTED), 0, f"{LACKING}; install this version of the project there"),
        (raised_by_a_task(ImportError(), "ImportError: libcuda"), 0, "ImportError: libcuda; install this version of"),
        (raised_by_a_task(OSError(), "OSError: disk"), 2, "OSError: disk; look at Ray's logs there"),
        (WorkerCrashedError(), 0, "The worker died unexpectedly while executing this task."),
    ],
)
def test_a_node_that_does_not_answer_has_its_reason(error, gpus, expected):
    line = str(explain_silence("a", error, gpus))
    assert line.startswith(f"wrong  node a: {expected}")
    assert ("install" in line) == ("install" in expected)
