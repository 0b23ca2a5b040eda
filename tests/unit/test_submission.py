"""What `ray job submit --working-dir .` sends of a checkout in which the README was followed."""

import shutil
import zipfile

from ray._private.runtime_env.packaging import create_package

from tests.conftest import REPOSITORY

SENT = {
    "data_prep/decode.py",
    "jobs/train.py",
    "jobs/schedule/study.toml",
    "trainer/runtime/templates/report.html",
    "own.toml",
}
LEFT = {"images/cat/1.jpg", "prepared/train/0.parquet", "more-images/dog/trainer/2.png", "runs/first/model.keras"}
LEFT |= {".venv/bin/python", ".git/HEAD", "weights.h5", "trainer/__pycache__/loop.cpython-311.pyc", "tests/conftest.py"}


def test_code_is_sent_and_data_is_not(tmp_path):
    checkout = tmp_path / "checkout"
    for name in SENT | LEFT:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPOSITORY / name, checkout)
    create_package(str(checkout), tmp_path / "sent.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        assert {name for name in sent.namelist() if not name.endswith("/")} == SENT
