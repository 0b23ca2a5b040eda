import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import object_store, run_job, write_stripes
from trainer.runtime.cluster import WORKER_ENVIRONMENT, Resources, connect

# What a test computes itself is compared with what workers compute, to the last bit.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = WORKER_ENVIRONMENT["TF_ENABLE_ONEDNN_OPTS"]

# Of the files that take longest, in this order: begun last, one of them would run while the other core has no work.
_FIRST = ("train", "batch_size", "local_worker", "inference", "submit", "jobs", "sweep", "prepare", "hostile_images")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take longest begin first; ``--no-loadscope-reorder`` keeps this order."""
    places = {f"test_{name}.py": place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The bucket that the cluster knows, for all tests."""
    with object_store() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def cluster(bucket) -> Iterator[tuple[Resources, dict[str, str]]]:
    """The cluster of all tests, since one takes longer to start than most tests; and what a job needs to join it."""
    with connect() as resources:
        # Other jobs start clusters of their own, with tokens of their own.
        token = {name: os.environ.pop(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        yield resources, {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, **token}


@pytest.fixture(scope="session")
def resources(cluster) -> Resources:
    return cluster[0]


@pytest.fixture(scope="session")
def run_on_cluster(cluster):
    """Return a function that runs a job on the cluster of all tests."""
    return partial(run_job, **cluster[1])


@pytest.fixture(scope="session")
def stripes(resources, tmp_path_factory) -> Path:
    """A prepared dataset of 120 stripes, 32 pixels wide."""
    source = write_stripes(tmp_path_factory.mktemp("source"), images_per_class=40)
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(str(source), str(folder), PrepareConfig(image_size=32))
    return folder
