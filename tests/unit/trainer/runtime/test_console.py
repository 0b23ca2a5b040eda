import io
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from trainer.runtime import console
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import RunStarted, StageProgressed, StudyTrialEnded


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            InputError("--arch 'vgg' is unknown; choose from [a, b]"),
            2,
            "error: --arch 'vgg' is unknown; choose from [a, b]",
        ),
        (JobError("run first: out of memory"), 1, "failed: run first: out of memory"),
    ],
)
def test_an_error_ends_the_job_with_its_code_and_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as ended, console.exit_codes():
        raise error
    assert ended.value.code == code
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert captured.out == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_with_its_code_and_further_ones_do_not_cut_that_short(capsys, handlers, number, code):
    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            console.stderr.print("ended in order")

    with pytest.raises(SystemExit) as ended, console.exit_codes():
        work()
    assert ended.value.code == code
    said = f"ended in order\nstopped by {number.name}; the same command continues\n"
    assert capsys.readouterr().err == said
    # What is left to do is Python's own ending.
    assert [signal.getsignal(one) for one in handlers] == [signal.SIG_IGN, signal.SIG_IGN]


def test_a_signal_in_the_middle_of_a_line_waits_for_its_end(monkeypatch, handlers):
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            signal.raise_signal(signal.SIGTERM)
            return written

    monkeypatch.setattr("sys.stderr", Interrupted())
    with pytest.raises(SystemExit), console.exit_codes(), console.show_events() as show:
        show(StudyTrialEnded("trial-0001", "306 of 310"))
    assert sys.stderr.getvalue() == "trial-0001 306 of 310\nstopped by SIGTERM; the same command continues\n"


def test_a_long_line_is_not_wrapped(capsys):
    with pytest.raises(SystemExit), console.exit_codes():
        raise InputError("long " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_another_error_is_left_as_it_is():
    with pytest.raises(ZeroDivisionError), console.exit_codes():
        raise ZeroDivisionError


def test_success_ends_nothing(capsys):
    before = signal.getsignal(signal.SIGINT)
    with console.exit_codes():
        pass
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) == before


def test_a_job_log_has_plain_lines_of_events_and_nothing_of_quick_progress(capsys):
    started = RunStarted(20, 2, 10, 3, 60, 2, 0)
    with console.show_events() as show:
        for done in range(100):
            show(StageProgressed("decode [1]", done, 100))
        show(started)
    assert capsys.readouterr().err == f"{started}\n"


def test_a_job_log_reports_slow_progress(capsys, monkeypatch):
    monkeypatch.setattr(console, "_PLAIN_INTERVAL_SECONDS", 0.0)
    with console.show_events() as show:
        show(StageProgressed("decode", 0, 100))
        show(StageProgressed("decode", 50, 100))
    assert capsys.readouterr().err == "decode: 50 of 100\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_in_any_script_are_shown_where_output_is_declared_narrow(encoding):
    script = (
        "from rich.table import Table; from trainer.runtime import console;"
        "table = Table('class'); table.add_row('猫');"
        "console.stdout.print(table); console.stderr.print('γάτα'); print('猫')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(rb"\u732b") == 2
    assert rb"\u03b3\u03ac\u03c4\u03b1" in process.stderr
