"""What stands in the way of a cluster on this machine before one is started; started ones are in tests/integration."""

import os
from types import SimpleNamespace

import pytest

from trainer.runtime import cluster
from trainer.runtime.cluster import connect, read_machine
from trainer.runtime.errors import InputError, JobError


def test_a_folder_with_too_long_a_name_for_sockets_is_refused_with_what_fits(monkeypatch, tmp_path):
    folder = tmp_path / ("scratch" * 10)
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with pytest.raises(InputError, match="too long for the names of the sockets") as refused:
        connect().__enter__()
    assert str(refused.value).startswith(f"{folder} is ")
    assert "set RAY_TMPDIR to a folder with at most" in str(refused.value)
    most = int(str(refused.value).rpartition("at most ")[2].split()[0])
    assert 20 < most < 40
    assert list(folder.iterdir()) == []
    # One process makes no such socket.
    with connect(one_process=True) as resources:
        assert resources.folder.startswith(str(folder))


def test_a_folder_that_is_none_is_refused_with_its_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="missing: No such file or directory; set RAY_TMPDIR"):
        connect().__enter__()


def test_logs_of_a_failed_job_are_kept_and_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(JobError, match=f"out of memory; logs are in {tmp_path}/ray-"), connect(one_process=True):
        raise JobError("out of memory")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("visible", "num_gpus"), [("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-4f1,GPU-77a", 2)])
def test_gpus_that_cuda_does_not_show_are_not_counted(monkeypatch, visible, num_gpus):
    machine = SimpleNamespace(num_cpus=8, num_gpus=2, memory=2**30, resources={"accelerator_type:H100": 1})
    monkeypatch.setattr(cluster.compat, "measure_machine", lambda num_cpus: machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(cluster, "read_total_gib", lambda: None)
    found = read_machine()
    assert (found.num_gpus, found.devices) == (num_gpus, "H100" if num_gpus else "8 cores")
    # One kind of card has several sizes, and each its own batch sizes.
    monkeypatch.setattr(cluster, "read_total_gib", lambda: 79.6)
    assert read_machine().devices == ("H100 with 80 GiB" if num_gpus else "8 cores")


def test_a_container_with_half_a_core_has_one(monkeypatch):
    # What Ray makes of a limit of 0.5 cores.
    monkeypatch.setattr(cluster.compat, "count_cores", lambda: 0)
    assert read_machine().num_cpus == 1


@pytest.mark.parametrize(("decided", "sent"), [(None, "1"), ("0", None)])
def test_ray_train_lists_runs_of_a_cluster_unless_the_user_has_decided(monkeypatch, decided, sent):
    tracking = "RAY_TRAIN_ENABLE_STATE_TRACKING"
    if decided is None:
        monkeypatch.delenv(tracking, raising=False)
    else:
        monkeypatch.setenv(tracking, decided)
    started = []
    monkeypatch.setattr("trainer.runtime.cluster.find_cluster", lambda: "head:6379")
    monkeypatch.setattr("trainer.runtime.cluster.read_resources", lambda: os.environ[tracking])
    monkeypatch.setattr("ray.init", lambda **options: started.append(options["runtime_env"]["env_vars"]))
    with connect(wait_seconds=None) as seen:
        assert seen == (decided or "1")
    # Ray would refuse what the runtime environment of the job may have already.
    assert started[0].get(tracking) == sent
    assert os.environ.get(tracking) == decided
