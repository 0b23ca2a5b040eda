"""The examples of jobs/schedule: what each scheduler would accept, and that each runs a command that exists."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "jobs" / "schedule"
KUBERNETES = "1.33"


def commands() -> dict[str, list[str]]:
    """The command line of each example."""
    cronjob = load("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]
    service = re.search(r"^ExecStart=(.*)$", (FOLDER / "sweep.service").read_text(), re.MULTILINE)[1]
    (action,) = (step["run"] for step in load("github-actions.yaml")["jobs"]["sweep"]["steps"][2:])
    cron = re.search(r"&& (\S+python .*) >>", (FOLDER / "crontab").read_text())[1]
    return {
        "crontab": shlex.split(cron),
        "sweep.service": shlex.split(service),
        "github-actions.yaml": shlex.split(action),
        "cronjob.yaml": cronjob,
        "rayjob.yaml": shlex.split(load("rayjob.yaml")["spec"]["entrypoint"]),
    }


def load(name: str):
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", ["crontab", "sweep.service", "github-actions.yaml", "cronjob.yaml", "rayjob.yaml"])
def test_each_runs_the_sweep_with_options_that_it_has(name):
    interpreter, script, study, *options = commands()[name]
    assert Path(interpreter).name == "python"
    assert script == "jobs/sweep.py"
    assert study.endswith("study.toml")
    known = subprocess.run([sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert all(option in known for option in options if option.startswith("--"))


def test_the_crontab_has_five_fields_and_a_command():
    (line,) = (line for line in (FOLDER / "crontab").read_text().splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"(?:(?:\*|\d+)(?:/\d+)? ){5}\S.*", line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_accepts_the_units(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("sweep.service", "sweep.timer"):
        text = (FOLDER / name).read_text().replace("%h/training-notes/.venv/bin/python", sys.executable)
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in ("sweep.service", "sweep.timer")]
    checked = subprocess.run(["systemd-analyze", "verify", "--user", *units], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_workflow_is_one_of_github():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    checked = subprocess.run([*command, str(FOLDER / "github-actions.yaml")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_kubernetes_accepts_the_cron_job():
    kubernetes_validate.validate(load("cronjob.yaml"), KUBERNETES, strict=True)


def ray_jobs() -> dict[str, dict]:
    training = yaml.safe_load((REPOSITORY / "docs" / "cluster" / "rayjob.yaml").read_text())["spec"]
    return {"sweep": load("rayjob.yaml")["spec"], "training": training}


def ray_clusters() -> dict[str, dict]:
    alone = yaml.safe_load((REPOSITORY / "docs" / "cluster" / "raycluster.yaml").read_text())["spec"]
    return {"alone": alone, **{name: job["rayClusterSpec"] for name, job in ray_jobs().items()}}


@pytest.mark.parametrize("name", ["alone", "sweep", "training"])
def test_kubernetes_accepts_the_pods_of_a_ray_cluster(name):
    cluster = ray_clusters()[name]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


# What these manifests may say by the definitions of KubeRay 1.7: the API server drops what it does not know.
RAY_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "headGroupSpec"}
RAY_CLUSTER |= {"workerGroupSpecs"}
AUTOSCALER = {"idleTimeoutSeconds", "env", "envFrom", "resources", "upscalingMode", "version", "image"}
HEAD_GROUP = {"rayStartParams", "template", "serviceType"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
RAY_JOB = {
    *("entrypoint", "runtimeEnvYAML", "submissionMode", "rayClusterSpec", "submitterPodTemplate", "backoffLimit"),
    *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "suspend"),
}


@pytest.mark.parametrize("name", ["alone", "sweep", "training"])
def test_kuberay_knows_every_field_of_a_ray_cluster(name):
    cluster = ray_clusters()[name]
    assert cluster.keys() <= RAY_CLUSTER
    assert cluster.get("autoscalerOptions", {}).keys() <= AUTOSCALER
    assert cluster["headGroupSpec"].keys() <= HEAD_GROUP
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= WORKER_GROUP


@pytest.mark.parametrize("name", ["sweep", "training"])
def test_kuberay_knows_every_field_of_the_job(name):
    assert ray_jobs()[name].keys() <= RAY_JOB


def test_the_autoscaler_has_the_token_of_the_cluster():
    cluster = ray_clusters()["alone"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert cluster["autoscalerOptions"]["env"] == head["env"]


@pytest.mark.parametrize("name", ["alone", "sweep", "training"])
def test_a_ray_cluster_runs_the_version_that_is_installed(name):
    assert ray_clusters()[name]["rayVersion"] == version("ray")
