"""A wheel of this repository holds all that its command needs."""

import shutil
import site
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY
from trainer.record.run_folder import RunFolder, describe_run


def install_wheel(folder: Path) -> Path:
    """Build a wheel, installs it beside the dependencies of this environment, and return the path of its command."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Built in a copy: setuptools would leave a build folder in the checkout, and put what it holds into later wheels.
    for name in ("data_prep", "trainer", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source")
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    # Python does not read the .pth files in there, so the checkout of this environment stays out.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    install = [*pip, "--python", str(folder / "venv" / "bin" / "python"), "install", "--no-deps"]
    install += ["--no-compile", "--force-reinstall"]
    subprocess.run([*install, *map(str, folder.glob("*.whl"))], check=True)
    return folder / "venv" / "bin" / "training-notes"


def test_the_command_of_an_installed_wheel_writes_a_report(tmp_path, write_dataset, make_config):
    run = RunFolder(str(tmp_path / "runs" / "begun"))
    run.write_manifest(write_dataset().manifest)
    run.write_record(describe_run(make_config(), "1 node"))
    command = install_wheel(tmp_path)
    finished = subprocess.run([command, "notes", "runs"], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [str(tmp_path / "runs" / name) for name in ("NOTES.md", "report.html")]
    assert "begun" in (tmp_path / "runs" / "report.html").read_text()
