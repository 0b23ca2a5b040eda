"""Output and exit codes of every job: progress on stderr, results on stdout.

On a terminal there are progress bars, and lines are wrapped at its width; in a notebook there is a bar above the lines;
piped or in a job log there are plain lines with the time of day and without control characters.
"""

import contextlib
import html
import io
import sys
import time
from collections.abc import Iterator
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import EpochFinished, Event, OnEvent, StageProgressed, TasksFinished
from trainer.runtime.signals import defer_signals, failure_reason, raise_on_signals, received_signal

# If the encoding of output is ASCII or Latin-1, as under cron, characters outside of it are escaped so that they do not
# fail a job. This runs at import, because wrong arguments are reported before a job starts. Rich then draws its tables
# in ASCII.
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")

# Without a terminal, tables are not cut to the width of one.
_PLAIN_WIDTH = 160
# Without emoji codes: the port of an address could be taken for one.
stdout = Console(soft_wrap=True, highlight=False, emoji=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

# Minimum time between two lines of a job log about the same stage.
_PLAIN_INTERVAL_SECONDS = 10.0
# The time left follows from the speed over this time: longer than an epoch's pause for validation.
_SPEED_SECONDS = 300.0
# Minimum time between two changes of the bar in a notebook: each is a message to the browser, which keeps all of them.
_NOTEBOOK_INTERVAL_SECONDS = 0.5


def print_words(line: str) -> None:
    """Print a line of words on stdout, wrapped between them on a terminal."""
    stdout.print(line, markup=False, soft_wrap=not stdout.is_terminal)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors of the context into exit codes: 2 for wrong arguments or data, 1 for a failed run.

    Each comes with one line on stderr. SIGINT and SIGTERM end the process with 130 and 143.
    """
    try:
        with raise_on_signals():
            yield
    except InputError as error:
        stderr.print(f"error: {error}", markup=False)
        sys.exit(2)
    except JobError as error:
        stderr.print(_with_notes(f"failed: {error}", error), markup=False)
        sys.exit(1)
    except KeyboardInterrupt as error:
        if reason := failure_reason():
            stderr.print(_with_notes(f"failed: {reason}", error), markup=False)
            sys.exit(1)
        number = received_signal()
        stderr.print(_with_notes(f"stopped by {number.name}; the same command continues", error), markup=False)
        sys.exit(128 + number)


def _with_notes(line: str, error: BaseException) -> str:
    return ", ".join([line, *getattr(error, "__notes__", ())])


@contextlib.contextmanager
def show_events(*, verbose: bool = False) -> Iterator[OnEvent]:
    """Yield a function that shows events: the current stage as a progress bar, all others as lines.

    Args:
        verbose: show Ray Data's statistics, too.
    """
    if stderr.is_jupyter:
        yield _uninterrupted(_notebook_lines(), verbose)
        return
    if not stderr.is_terminal:
        yield _uninterrupted(_plain_lines(), verbose)
        return
    columns = (
        *(TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[detail]}", style="dim")),
    )
    with Progress(*columns, console=stderr, transient=True, speed_estimate_period=_SPEED_SECONDS) as bars:
        bar = bars.add_task("", visible=False, detail="")

        def show(event: Event) -> None:
            if isinstance(event, StageProgressed):
                if event.stage != bars.tasks[0].description:
                    bars.reset(bar, description=event.stage, total=event.total)
                bars.update(
                    bar,
                    completed=event.done,
                    total=event.total,
                    visible=event.done < event.total,
                    detail=event.detail,
                )
            else:
                text = event.short if isinstance(event, EpochFinished) else str(event)
                bars.print(text, markup=False, soft_wrap=False)

        yield _uninterrupted(show, verbose)


def _uninterrupted(show: OnEvent, verbose: bool) -> OnEvent:
    """Defer signals while an event is shown: rich prints nothing more after an exception in the middle of a line."""

    def show_whole(event: Event) -> None:
        if isinstance(event, TasksFinished) and not verbose:
            return
        with defer_signals():
            show(event)

    return show_whole


def _notebook_lines() -> OnEvent:
    """Return a function that shows events below a notebook's cell; rich's own bars need a package in the browser."""
    from IPython.display import display

    # The bar stays above the lines, where each of its states takes the place of the one before.
    bar = display({"text/plain": ""}, raw=True, display_id=True)
    stage, last_change = "", 0.0

    def show(event: Event) -> None:
        nonlocal stage, last_change
        if not isinstance(event, StageProgressed):
            print(event.short if isinstance(event, EpochFinished) else event, flush=True)
            return
        now = time.monotonic()
        if event.stage != stage or event.done >= event.total or now - last_change >= _NOTEBOOK_INTERVAL_SECONDS:
            stage, last_change = event.stage, now
            drawn = f'<progress value="{event.done}" max="{event.total}"></progress> {html.escape(str(event))}'
            bar.update({"text/plain": str(event), "text/html": drawn}, raw=True)

    return show


def _plain_lines() -> OnEvent:
    stage, last_line = "", 0.0

    def show(event: Event) -> None:
        nonlocal stage, last_line
        if isinstance(event, StageProgressed):
            if event.stage != stage:
                stage, last_line = event.stage, time.monotonic()
            if time.monotonic() - last_line < _PLAIN_INTERVAL_SECONDS:
                return
            last_line = time.monotonic()
        stderr.print(f"{datetime.now():%H:%M:%S} {event}", markup=False)

    return show
