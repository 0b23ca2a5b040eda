"""Several raylets on this machine: a lost node, fewer workers than at the start, and a cluster that is in use."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster

from data_prep.manifest import MANIFEST_NAME
from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import run_job, write_stripes
from trainer import launch
from trainer.config.request import parse_request
from trainer.record.run_folder import RunFolder, RunResult
from trainer.runtime import storage
from trainer.runtime.cluster import Resources, connect
from trainer.runtime.errors import InputError
from trainer.runtime.events import EpochFinished, Event, OnEvent, StageProgressed, WorkersAwaited, ignore_event
from trainer.workers.groups import wait_for_workers

NETWORK = {"first_filters": 8, "later_filters": [8], "dense_units": 32}


@pytest.fixture(scope="module")
def nodes(bucket, tmp_path_factory) -> Iterator[Cluster]:
    """A head without work and three nodes of one CPU; what they start finds the bucket."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def resources(nodes) -> Iterator[Resources]:
    with connect() as resources:
        yield resources


def kill_worker_node(nodes: Cluster) -> None:
    """Kill the raylet of a node that works, and all that runs there, with SIGKILL."""
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)


def test_preparing_survives_a_node(nodes, resources, bucket, tmp_path):
    source = write_stripes(tmp_path / "source", images_per_class=400)
    config = PrepareConfig(image_size=32)
    killed_at: list[StageProgressed] = []

    def kill_while_decoding(event: Event) -> None:
        if isinstance(event, StageProgressed) and event.stage == "decode" and 0 < event.done < event.total:
            if not killed_at:
                kill_worker_node(nodes)
            killed_at.append(event)

    prepare(str(source), f"{bucket}/lost-node", config, on_event=kill_while_decoding)
    assert killed_at
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    prepare(str(source), f"{bucket}/whole", config)
    lost, whole = (storage.read_bytes(f"{bucket}/{name}/{MANIFEST_NAME}") for name in ("lost-node", "whole"))
    assert lost == whole


@pytest.fixture
def train(nodes, resources, bucket, tmp_path):
    """Return a function that trains 60 epochs on the nodes, one of which is killed after the first."""
    folder = f"{bucket}/{tmp_path.name}"
    prepare(
        str(write_stripes(tmp_path / "source", images_per_class=40)), f"{folder}/images", PrepareConfig(image_size=32)
    )

    def train(num_workers: str, on_event: OnEvent = ignore_event) -> tuple[RunFolder, RunResult]:
        options = {
            "arch": "cnn_softmax",
            "arch_arguments": NETWORK,
            "recipe": "modern",
            "dataset": f"{folder}/images",
            "num_workers": num_workers,
            "global_batch_size": "12",
            "precision": "float32",
            "epochs": 60,
        }

        def watch(event):
            if isinstance(event, EpochFinished) and (event.row["epoch"], event.row["attempt"]) == (1, 1):
                kill_worker_node(nodes)
            on_event(event)

        with launch.open_run(f"{folder}/runs", "run", "cnn_softmax", resources) as run:
            plan = launch.plan_run(parse_request(options), run, resources)
            return run, launch.launch(plan, run, resources, on_event=watch)

    return train


def test_training_says_that_it_waits_for_a_node_in_place_of_a_lost_one(nodes, train):
    waited = []

    def replace_node(event: Event) -> None:
        if isinstance(event, WorkersAwaited):
            if not waited:
                nodes.add_node(num_cpus=1)
            waited.append(event.least)

    run, result = train("3", replace_node)
    assert set(waited) == {3}
    assert (result.status, result.attempts, len(result.weights_crc32)) == ("completed", 2, 3)
    assert {row["num_workers"] for row in run.read_metrics()} == {3}


def test_training_goes_on_with_the_nodes_that_are_left(nodes, train):
    run, result = train("1:3")
    assert (result.status, result.attempts, len(result.weights_crc32)) == ("completed", 2, 2)
    rows = run.read_metrics()
    assert [row["epoch"] for row in rows] == list(range(1, 61))
    assert (rows[0]["num_workers"], rows[-1]["num_workers"]) == (3, 2)
    assert {row["global_batch_size"] for row in rows} == {12}


def test_a_job_waits_for_the_first_node_of_a_cluster_that_grows(bucket, tmp_path):
    source = write_stripes(tmp_path / "source", images_per_class=10)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    command = ["prepare.py", str(source), f"{bucket}/{tmp_path.name}", "--image-size", "32"]
    refused = run_job(*command, RAY_ADDRESS=cluster.address)
    assert (refused.returncode, "--wait SECONDS if the cluster scales automatically" in refused.stderr) == (2, True)
    with ThreadPoolExecutor(1) as jobs:
        prepared = jobs.submit(run_job, *command, "--wait", "90", RAY_ADDRESS=cluster.address)
        time.sleep(15)
        assert not prepared.done()
        cluster.add_node(num_cpus=1)
        assert prepared.result().returncode == 0, prepared.result().stderr
    cluster.shutdown()


def test_a_cluster_in_use_is_waited_for(nodes, resources):
    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> int:
            return os.getpid()

    # Two nodes, whatever the tests before this one have left.
    while ray.cluster_resources()["CPU"] > 2:
        if len(nodes.worker_nodes) > 2:
            kill_worker_node(nodes)
        time.sleep(0.1)
    holders = [Holder.remote() for _ in range(2)]
    ray.get([holder.ready.remote() for holder in holders])
    while ray.available_resources().get("CPU"):
        time.sleep(0.1)
    with pytest.raises(InputError, match=r"--num-workers 2 needs 1 CPU, 0 of 2 are free; .* --wait SECONDS"):
        wait_for_workers("2", resources, 0, print)
    threading.Timer(3.0, ray.kill, [holders[0]]).start()
    started, events = time.monotonic(), []
    assert wait_for_workers("2", resources, 60, events.append).num_cpus == 2
    assert time.monotonic() - started > 2
    assert str(events[0].stage) == "waiting for free workers"
