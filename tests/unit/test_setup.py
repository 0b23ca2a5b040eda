"""The Python that an installation needs: what pip says of another one, and where the supported ones are written."""

import json
import runpy
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.conftest import REPOSITORY

SUPPORTED = ["3.11", "3.12", "3.13"]
WORKFLOW = REPOSITORY / ".github" / "workflows" / "checks.yaml"


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0)])
def test_another_python_is_named_with_those_that_fit(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(REPOSITORY / "setup.py"))
    assert refused.value.code == f"training-notes needs Python 3.11 to 3.13, this is {version[0]}.{version[1]}"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"


def test_the_workflow_checks_every_supported_python():
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python-version"] == SUPPORTED


def test_the_workflow_is_one_of_github():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_development_container_has_a_supported_python_and_is_installed_as_the_documents_say():
    container = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text())
    assert container["image"].rpartition(":")[2].partition("-")[0] in SUPPORTED
    assert container["postCreateCommand"] == "make install"
