"""The pictures of the README, made from finished runs: the page of all runs, and the last run with its worst mistakes.

Nothing is measured. The report and the note are written by the code of jobs/notes.py, and a headless Chromium draws the
report; it has to be on the PATH. RUNS is only read.

Run: python -m benchmarks pictures RUNS [--output docs/pictures]
"""

import os
import shutil
import subprocess
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageChops

from trainer.runtime import console
from trainer.runtime.errors import InputError, JobError

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Of the window, in CSS pixels; the table of all runs is as wide. Empty space is cut off.
_WIDTH, _HEIGHT = 1280, 2000
# What each picture leaves out of its page.
_HIDDEN = {"report.png": ".no-element", "run.png": "body > h2, body > h2 ~ *, nav"}
_MARGIN = 12
_COLORS = 64
_MOST_BYTES = 300_000
_TIMEOUT_SECONDS = 60


def find_browser() -> str:
    """Return the path of a Chromium.

    Raises:
        InputError: there is none.
    """
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        raise InputError(
            f"no browser on the PATH (looked for {', '.join(_BROWSERS)}); install one: apt install chromium"
        )
    return found


def draw_page(browser: str, page: Path, hidden: str) -> Image.Image:
    """Return an HTML page as a picture, without the elements of a CSS selector.

    Raises:
        JobError: the browser failed or did not end.
    """
    part, picture = page.with_name("part.html"), page.with_name("part.png")
    part.write_text(page.read_text().replace("</head>", f"<style>{hidden} {{ display: none; }}</style></head>"))
    command = [
        *(browser, "--headless", "--hide-scrollbars", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"),
        *(f"--window-size={_WIDTH},{_HEIGHT}", f"--screenshot={picture}", "--virtual-time-budget=3000"),
        # Chromium refuses to run as root in its sandbox; the page is this program's own.
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        part.as_uri(),
    ]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise JobError(f"{browser} drew nothing in {_TIMEOUT_SECONDS} s; see what it says by itself") from error
    if ended.returncode or not picture.exists():
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise JobError(f"{browser} ended with {ended.returncode} and drew nothing: {last}")
    return Image.open(picture).convert("RGB")


def crop(picture: Image.Image) -> Image.Image:
    """Return a picture without the empty space around what it shows, but for a margin."""
    background = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    box = ImageChops.difference(picture, background).getbbox() or (0, 0, *picture.size)
    left, top, right, bottom = box
    return picture.crop(
        (
            max(0, left - _MARGIN),
            max(0, top - _MARGIN),
            min(picture.width, right + _MARGIN),
            min(picture.height, bottom + _MARGIN),
        )
    )


def to_png(picture: Image.Image) -> bytes:
    """Return a picture as a PNG of a few colors, which is a fraction of the size."""
    buffer = BytesIO()
    picture.quantize(_COLORS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(
    runs: Annotated[str, typer.Argument(help="Storage that holds finished runs, local or s3://.")],
    output: Annotated[Path, typer.Option(help="Folder of the pictures and the note.")] = Path("docs/pictures"),
) -> None:
    with console.exit_codes():
        from trainer.notes.note import format_note
        from trainer.notes.report import REPORT_NAME, write_notes_and_report
        from trainer.notes.run_page import PAGES_FOLDER
        from trainer.record.run_folder import RunResult, find_runs
        from trainer.runtime import storage

        browser = find_browser()
        started, _ = find_runs(storage.resolve_uri(runs))
        finished = [(run, result) for run in started if isinstance(result := run.folder.read_ending(), RunResult)]
        if not finished:
            raise InputError(f"RUNS {runs} holds no finished run; give the --storage of jobs/train.py")
        last, result = finished[-1]
        with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
            write_notes_and_report(runs, folder)
            pages = {
                "report.png": Path(folder, REPORT_NAME),
                "run.png": Path(folder, PAGES_FOLDER, f"{last.folder.name}.html"),
            }
            files = {name: to_png(crop(draw_page(browser, pages[name], hidden))) for name, hidden in _HIDDEN.items()}
        for name in ("curves.png", "confusion.png", "mistakes.png"):
            drawn = Image.open(BytesIO(storage.read_bytes(last.folder.path("plots", name))))
            files[name] = to_png(crop(drawn.convert("RGB")))
        if (size := sum(map(len, files.values()))) > _MOST_BYTES:
            raise JobError(f"the pictures have {size:,} bytes, more than {_MOST_BYTES:,}; give fewer or smaller runs")
        # Its pictures lie beside it.
        files["note.md"] = format_note(last, started, result, last.folder.path("plots")).encode()
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content)
            console.stdout.print(f"{output / name}: {len(content):,} bytes", markup=False)
