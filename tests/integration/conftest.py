import pytest

from trainer.cluster import connect


@pytest.fixture(scope="module")
def resources():
    with connect() as resources:
        yield resources
