import math
import time

import pytest

from trainer.runtime import gauges
from trainer.runtime.gauges import serve_metrics


@pytest.fixture
def exported(monkeypatch):
    """What Ray would export, in the order of time; test_submit.py reads the real gauges from a node."""
    exported = []

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self._name, self._tag_keys = name, tag_keys

        def set(self, value, tags):
            assert set(tags) == set(self._tag_keys)
            exported.append((self._name, *tags.values(), value))

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    return exported


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)


def test_each_metric_of_each_run_is_a_gauge(cluster, exported):
    with serve_metrics("first") as serve_first, serve_metrics("second") as serve_second:
        serve_first({"epoch": 1, "loss": 0.5, "stage": "plain"})
        serve_second({"loss": 0.7})
    assert exported == [
        ("training_notes_epoch", "first", 1),
        ("training_notes_loss", "first", 0.5),
        ("training_notes_loss", "second", 0.7),
    ]


def test_what_is_no_finite_number_is_not_served_any_more(cluster, exported):
    with serve_metrics("first") as serve:
        serve({"loss": 0.5, "noise_scale": 90.0})
        exported.clear()
        # The loss of a candidate that diverged, and a noise scale that could not be measured.
        serve({"loss": math.inf, "noise_scale": math.nan, "epoch": 2})
    assert exported == [("training_notes_epoch", "first", 2)]


def test_a_metric_is_set_again_until_the_run_ends(cluster, exported, monkeypatch):
    monkeypatch.setattr(gauges, "_AGAIN_SECONDS", 0.01)
    with serve_metrics("first") as serve:
        serve({"loss": 0.5})
        while len(exported) < 4:
            time.sleep(0.01)
    assert set(exported) == {("training_notes_loss", "first", 0.5)}
    time.sleep(0.05)
    count = len(exported)
    time.sleep(0.05)
    assert len(exported) == count


def test_without_a_cluster_nothing_is_served(exported):
    with serve_metrics("first") as serve:
        serve({"loss": 0.5})
    assert exported == []
