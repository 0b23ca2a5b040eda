import json

import pytest

from trainer.workers import backend
from trainer.workers.backend import TensorFlowConfig, tolerate_silence


@pytest.fixture
def patience(monkeypatch) -> list:
    """Collect the heartbeat settings that TensorFlow receives."""
    told = []
    monkeypatch.setattr(backend, "set_heartbeat_timeout", lambda *arguments: told.append(arguments))
    return told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_learns_the_addresses_of_all_and_its_rank(monkeypatch, rank):
    monkeypatch.setenv("TF_CONFIG", "")
    backend._set_tf_config(["a:1", "b:2"], rank)
    assert json.loads(backend.os.environ["TF_CONFIG"]) == {
        "cluster": {"worker": ["a:1", "b:2"]},
        "task": {"type": "worker", "index": rank},
    }


def test_several_workers_wait_longer_for_each_other_than_ray_does(monkeypatch, patience):
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:2", "c:3"]}}))
    tolerate_silence()
    ((num_workers, milliseconds),) = patience
    assert num_workers == 3
    assert milliseconds > 10 * 60 * 1000  # RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S


@pytest.mark.parametrize("tf_config", [None, json.dumps({"cluster": {"worker": ["a:1"]}})])
def test_one_worker_waits_for_nobody(monkeypatch, patience, tf_config):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if tf_config:
        monkeypatch.setenv("TF_CONFIG", tf_config)
    tolerate_silence()
    assert patience == []


def test_ray_train_is_given_this_backend():
    assert TensorFlowConfig().backend_cls is backend._TensorFlowBackend
