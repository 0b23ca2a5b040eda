"""The commands and the Python of the README and the guide, run one after the other as written, on a few images."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, write_stripes

pytestmark = pytest.mark.slow

DOCUMENTS = (REPOSITORY / "README.md", REPOSITORY / "docs" / "guide.md")
# Installing and checking are .ci/run; the cluster is in test_submit.py and test_rehearsal.py. What is quoted is a note.
ELSEWHERE = r"python3 -m venv|export |ray |ssh |scp |images/"
# As typed, the recipe's epochs and the test of the maps are minutes of work.
SHORTER = {"train.py": " --epochs 1", "explain.py": " --tested-images 8 --count 2"}
# Published weights are downloaded; those of a run take the same road from there.
REPLACED = {
    "--arch resnet50 --dataset prepared": "--arch cnn_tapered --dataset prepared",
    "--init-from keras:resnet50": "--init-from runs/first",
}


def find_blocks(language: str) -> list[str]:
    """The documents' code blocks in a language, in order."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for path in DOCUMENTS for block in pattern.findall(path.read_text())]


def find_commands() -> list[str]:
    """Every command of the documents' code blocks once, in order, without its comment."""
    lines = [line.partition(" #")[0].strip() for block in find_blocks("sh") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not re.match(ELSEWHERE, line)))


@pytest.fixture(scope="module")
def folder(bucket, tmp_path_factory) -> Path:
    """Images, and the jobs with a study of two short trials."""
    folder = tmp_path_factory.mktemp("checkout")
    write_stripes(folder / "images", images_per_class=60)
    shutil.copytree(REPOSITORY / "jobs", folder / "jobs")
    study = folder / "jobs" / "schedule" / "study.toml"
    study.write_text(study.read_text().replace("trials = 16 ", "trials = 2 ").replace("steps = 300 ", "steps = 3 "))
    return folder


@pytest.mark.parametrize("command", find_commands())
def test_a_command_does_what_is_said_of_it(command, folder, bucket):
    for written, instead in {"s3://bucket": bucket, **REPLACED}.items():
        command = command.replace(written, instead)
    job, options = re.fullmatch(r"python jobs/(\w+\.py)(.*)", command).groups()
    # Some write what they print into a file.
    finished = subprocess.run(
        f"{shlex.quote(sys.executable)} jobs/{job}{options}{SHORTER.get(job, '')}",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("block", find_blocks("python"), ids=["trains", "loads"])
def test_python_does_what_is_said_of_it(block, folder):
    # The images and the model that it speaks of; a script, as somebody would save it.
    shutil.copy(folder / "runs" / "first" / "model.keras", folder)
    script = folder / "typed.py"
    script.write_text(f"import numpy\n\nimages = numpy.zeros((1, 96, 96, 1))\n{block.replace('epochs=3', 'epochs=1')}")
    finished = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
