"""The commands of the README and the guide, run one after the other as written, on a few images."""

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
# As typed, the largest batch and the recipe's epochs are minutes of work.
SHORTER = {"train.py": " --epochs 1"}
# Published weights are downloaded; those of a run take the same road from there.
REPLACED = {
    "--arch resnet50 --dataset prepared": "--arch cnn_tapered --dataset prepared",
    "--init-from keras:resnet50": "--init-from runs/first",
}


def find_commands() -> list[str]:
    """Every command of the documents' code blocks once, in order, without its comment."""
    texts = [path.read_text() for path in DOCUMENTS]
    blocks = [one for text in texts for one in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    lines = [
        line.partition(" #")[0].strip() for language, block in blocks if language == "sh" for line in block.splitlines()
    ]
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
