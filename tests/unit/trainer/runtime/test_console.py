import datetime
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from tests.conftest import REPOSITORY
from trainer.runtime import console
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import EpochFinished, RunStarted, StageProgressed, StudyTrialEnded


class Noon(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 28, 12)


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
    monkeypatch.setattr(console, "datetime", Noon)
    with pytest.raises(SystemExit), console.exit_codes(), console.show_events() as show:
        show(StudyTrialEnded("trial-0001", "306 of 310"))
    assert sys.stderr.getvalue() == "12:00:00 trial-0001 306 of 310\nstopped by SIGTERM; the same command continues\n"


def test_a_long_line_is_not_wrapped(capsys):
    with pytest.raises(SystemExit), console.exit_codes():
        raise InputError("long " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_added_to_an_error_ends_its_line(capsys, handlers):
    failed = JobError("the disk is full; make room, and the same command continues")
    failed.add_note("with --run-name first")
    with pytest.raises(SystemExit), console.exit_codes():
        raise failed

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupted:
            interrupted.add_note("with --run-name first")
            raise

    with pytest.raises(SystemExit), console.exit_codes():
        work()
    assert capsys.readouterr().err.splitlines() == [
        "failed: the disk is full; make room, and the same command continues, with --run-name first",
        "stopped by SIGINT; the same command continues, with --run-name first",
    ]


def test_another_error_is_left_as_it_is():
    with pytest.raises(ZeroDivisionError), console.exit_codes():
        raise ZeroDivisionError


def test_success_ends_nothing(capsys):
    before = signal.getsignal(signal.SIGINT)
    with console.exit_codes():
        pass
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) == before


def test_a_job_log_has_plain_lines_of_events_with_the_time_and_nothing_of_quick_progress(capsys, monkeypatch):
    monkeypatch.setattr(console, "datetime", Noon)
    started = RunStarted(20, 2, 10, 3, 60, 2, 0)
    with console.show_events() as show:
        for done in range(100):
            show(StageProgressed("decode [1]", done, 100))
        show(started)
    assert capsys.readouterr().err == f"12:00:00 {started}\n"


def test_a_job_log_reports_slow_progress(capsys, monkeypatch):
    monkeypatch.setattr(console, "_PLAIN_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(console, "datetime", Noon)
    with console.show_events() as show:
        show(StageProgressed("training", 50, 100, "epoch 2 of 4, loss 0.1234"))
    assert capsys.readouterr().err == "12:00:00 training: 50 of 100, epoch 2 of 4, loss 0.1234\n"


def test_a_terminal_of_80_columns_shows_the_whole_run_in_one_bar_and_an_epoch_in_one_line(monkeypatch):
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=80, color_system=None, emoji=False)
    monkeypatch.setattr(console, "stderr", terminal)
    row = {"epoch": 100.0, "loss": 0.1234, "accuracy": 0.9, "val_loss": 0.2345, "val_accuracy": 0.8}
    row |= {"learning_rate": 0.001, "images_per_second": 123.4, "epoch_seconds": 123.4, "stage": "decay"}
    started = RunStarted(64, 1, 64, 22, 1442, 91, 0)
    with console.show_events() as show:
        show(StageProgressed("training", 1000, 10_000, "epoch 10 of at most 120, loss 0.1234"))
        show(EpochFinished({**row, "augmentation": "rotation+zoom"}, 120))
        show(started)
        time.sleep(0.2)
    lines = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]", screen.getvalue())]
    assert max(map(len, lines)) <= 80
    (epoch,) = {line.strip() for line in lines if line.startswith("epoch")}
    assert epoch == "epoch 100/120  loss 0.1234  acc 0.9000  val 0.2345 / 0.8000  123 s  decay"
    (bar,) = {re.sub(r"[^!-~]+", " ", line).strip() for line in lines if line.startswith("training")}
    assert re.fullmatch(r"training 1000/10000 -:--:-- epoch 10 of at most 120, loss 0.1234", bar)
    assert " ".join(" ".join(lines).split()).count(str(started)) == 1


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
