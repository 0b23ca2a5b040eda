import json
import runpy
import sys
from pathlib import Path

import pytest
import typer

from benchmarks.gpu import Measured, _run_item

TIMED = {"first_seconds": 9.0, "step_seconds": [0.1, 0.2], "host_seconds": 0.01, "kernels": None, "peak_gib": 1.0}


def write_python(folder: Path, lines: str) -> str:
    """Write a program that takes the place of a Python with PyTorch."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        (f"echo '{json.dumps(TIMED)}'", Measured(**TIMED)),
        (
            f"echo '{json.dumps(TIMED)}'; echo '{json.dumps({**TIMED, 'kernels': 7})}'",
            Measured(**{**TIMED, "kernels": 7}),
        ),
        # The profiler broke after the steps had been timed.
        (f"echo '{json.dumps(TIMED)}'; echo broken >&2; exit 1", Measured(**TIMED)),
        (f"echo '{json.dumps(TIMED)}'; exec sleep 60", Measured(**TIMED)),
        ("echo a line; echo no device >&2; exit 1", "failed: no device"),
        ("printf '{\"first_seconds\"'; exit 1", "failed: no output"),
        ("exec sleep 60", "given up after 2 s"),
    ],
)
def test_what_an_item_printed_before_it_broke_counts(tmp_path, monkeypatch, lines, outcome):
    monkeypatch.setattr("benchmarks.gpu.LEAST_SECONDS", 1)
    python = write_python(tmp_path, lines)
    assert _run_item("alexnet", "torch", "float32", python, True, str(tmp_path), 2.0) == outcome


def test_an_item_for_which_no_time_is_left_is_not_started(tmp_path):
    python = write_python(tmp_path, f"touch {tmp_path}/started")
    assert _run_item("alexnet", "torch", "float32", python, True, str(tmp_path), 4.9) == "left out: no time left"
    assert not (tmp_path / "started").exists()


def test_a_benchmark_needs_the_packages_of_no_other_one(monkeypatch):
    for arguments in ["gpu", "--tiny"], []:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        module = runpy.run_module("benchmarks.__main__")
        commands = typer.main.get_command(module["app"]).commands
        assert tuple(commands) == (("gpu",) if arguments else module["NAMES"])
