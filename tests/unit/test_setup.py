"""The error of an installation with an unsupported Python, for any version of pip."""

import runpy
import sys
import tomllib

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0)])
def test_another_python_is_named_with_those_that_fit(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(REPOSITORY / "setup.py"))
    assert refused.value.code == f"training-notes needs Python 3.11 to 3.13, this is {version[0]}.{version[1]}"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
