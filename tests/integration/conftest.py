import os

import pytest

from trainer.runtime.cluster import WORKER_ENVIRONMENT, connect

# What a test computes itself is compared with what workers compute, to the last bit.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = WORKER_ENVIRONMENT["TF_ENABLE_ONEDNN_OPTS"]


@pytest.fixture(scope="module")
def resources():
    with connect() as resources:
        yield resources
