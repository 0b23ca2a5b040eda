"""What the doctor says of nodes that are well, and of each thing that can be wrong."""

from dataclasses import replace

import pytest

from trainer.doctor import NodeReport, check_node, check_packages

VERSIONS = {"ray": "2.60.0", "tf_keras": "2.21.0"}
WELL = NodeReport(
    python="3.11.7", packages=VERSIONS, keras="tf_keras", gpus=2, free_gib={"/tmp": 40.0}, storage_error=""
)


def test_this_machine_is_well():
    assert [one.mend for one in check_packages()] == ["", "", ""]


def test_a_node_that_is_well_is_one_line():
    (line,) = check_node("a", WELL, VERSIONS, 2)
    assert str(line) == (
        "ok     node a: Python 3.11.7, tf.keras is tf_keras, 2 GPUs, 40 GiB of disk, storage can be written"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"packages": {**VERSIONS, "ray": "2.59.0"}}, "wrong  node a, versions: {'ray': '2.59.0'}, the driver has"),
        ({"keras": "keras"}, "wrong  node a, tf.keras: keras; set TF_USE_LEGACY_KERAS=1"),
        ({"gpus": 0}, "wrong  node a, gpus: TensorFlow sees 0 of 2; pip install -e '.[gpu]'"),
        ({"free_gib": {"/tmp": 0.5, "/data": 9.0}}, "wrong  node a, disk: /tmp has 0.5 GiB; make room"),
        ({"storage_error": "no s3:PutObject"}, "wrong  node a, storage: cannot be used; no s3:PutObject"),
    ],
)
def test_what_is_wrong_is_one_line_with_what_to_do(change, expected):
    (line,) = check_node("a", replace(WELL, **change), VERSIONS, 2)
    assert str(line).startswith(expected)
