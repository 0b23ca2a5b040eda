"""The notes' own script and this project's defaults in the same seconds: how many validation images each gets right.

The script (`benchmarks.notes_script`) trains for a number of epochs. Then jobs/train.py trains the same network on the
same dataset, with nothing but the options given. Both are commands; all seconds are since the shell started them, so
starting, and the search for a batch, count. Each network, dataset and seed is a turn of both. On a machine that other
work shares, `--clock cpu` counts the seconds of its cores instead, of all processes of a command together.

- last: the script after its last epoch. best: after its best. product then: the best of the epochs whose checkpoints
  were written when the script's last epoch ended. final: the best of all its epochs, with the seconds of the command.
- Best is the best on one fixed, random half of the validation images, by this project's own rule (`rank_epoch`), and
  correct answers are counted on the other half; then the halves change places. So each image counts once, and none
  counts for an epoch that it chose: without that a curve that jumps would win by jumping.
- p: the exact test of McNemar, product against last and against best. Of several seeds there is the mean difference,
  with an interval that adds the variance between images to the one between seeds.
- seconds to last: when all validation images together first had the accuracy of the script's last epoch.

RESULTS keeps a JSON file for each run, named by all that it depends on: a command given again goes on where it was
interrupted and trains nothing twice; and the run folders without checkpoints. A run that fails leaves no row. So rows
can be gathered one at a time, and a last command that names all of them trains nothing and prints the table.

`python -m benchmarks development_sets` prepares the datasets. --options is a command line of jobs/train.py for a row
beside, or instead of, the defaults: --options "" --options "--augment-rotation 0". Marks: no row is significantly worse
than last or best; more than half are better than both; seconds to last at most the script's.

Run: python -m benchmarks accuracy RESULTS DATASET ... [--arch cnn_tapered] [--seed 0] [--epochs 24] [--options ""]
"""

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import pyarrow.parquet as pq
import typer
from rich.table import Table

from benchmarks.curve import Curve, find_difference, format_correct, is_correct
from benchmarks.table import Mark, report
from trainer.notes.comparison import compare_predictions
from trainer.record.checkpoint import Checkpoint
from trainer.record.run_folder import RunFolder
from trainer.runtime.markdown import format_count
from trainer.training.dataset import load_manifest, open_split

SCRIPT, PRODUCT = "script", "product"
# What each side runs: a change elsewhere does not ask for its runs again.
CODE = {
    SCRIPT: ("benchmarks/notes_script.py", "trainer/architectures"),
    PRODUCT: ("jobs", "trainer", "data_prep"),
}
# Shorter than any epoch; the run deletes the predictions of an epoch after the next one.
POLL_SECONDS = 0.05
SIGNIFICANCE = 0.05
DEFAULTS = "defaults"
COUNTED = ("script last", "script best", "product then", "final")
CPU_SECONDS = "cpu_seconds.txt"

Clock = Literal["wall", "cpu"]


class RunFailedError(Exception):
    """A run leaves no row; the message says where to look."""


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    curve: Curve
    """Its seconds are those of the clock that was asked for."""
    whole_seconds: float
    """Duration of the command, by that clock."""
    ending: str
    """completed, diverged, or stopped."""


def find_code(side: str) -> str:
    """Return the commit that last changed what a side runs, with a hash of what is not committed."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments, "--", *CODE[side]], check=True, capture_output=True).stdout

    commit, changes = git("log", "-1", "--format=%h").decode().strip(), git("diff", "HEAD")
    return f"{commit}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def run_once(
    results: Path, side: str, dataset: str, arch: str, seed: int, options: dict[str, Any], clock: Clock
) -> Run | None:
    """Run one side unless RESULTS has that run; None if it fails.

    Args:
        results: the folder of all results.
        side: script or product.
        dataset: folder of the prepared dataset.
        arch: name of the network.
        seed: of the run.
        options: all else that the run depends on.
        clock: whose seconds the curve has.
    """
    manifest = load_manifest(dataset)
    key = {"dataset": Path(dataset).name, "arch": arch, "seed": seed, "side": side, **options}
    key |= {"code": find_code(side), "fingerprint": manifest.fingerprint}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    place = results / f"{key['dataset']}-{arch}-{seed}-{side}-{digest}"
    record = place.with_suffix(".json")
    if not record.exists():
        print(f"{place.name}: {key}", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            found = (run_script if side == SCRIPT else run_product)(place, dataset, arch, seed, **options)
        except RunFailedError as error:
            # The others go on.
            print(f"{place.name} failed: {error}", file=sys.stderr, flush=True)
            return None
        # The load shows whether other work took part of the seconds.
        circumstances = {"load": os.getloadavg()[0], "labels": open_split(dataset, manifest, "val").labels.tolist()}
        temporary = place / "record.json"
        temporary.write_text(json.dumps(key | circumstances | found))
        temporary.replace(record)
    run = read_run(json.loads(record.read_text()), clock)
    print(f"{place.name}: {format_correct(run.curve.best)}, {run.whole_seconds:.0f} s", file=sys.stderr, flush=True)
    return run


def read_run(found: dict[str, Any], clock: Clock = "wall") -> Run:
    """Return what JSON keeps of a run."""
    shape = len(found["seconds"]), len(found["labels"])
    of_clock = "seconds" if clock == "wall" else "cpu_seconds"
    labels, seconds = np.array(found["labels"], np.int64), np.array(found[of_clock], np.float64)
    predicted, losses = (np.array(found[name]).reshape(shape) for name in ("predicted", "losses"))
    return Run(Curve(labels, seconds, predicted, losses), found[f"whole_{of_clock}"], found["ending"])


def run_script(place: Path, dataset: str, arch: str, seed: int, epochs: int) -> dict[str, Any]:
    """Run the notes' script, and return what JSON keeps of it."""
    output = place / "predictions.json"
    command = [sys.executable, "-m", "benchmarks.notes_script", dataset, arch, str(epochs), str(seed), str(output)]
    began = time.time()
    with (place / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    whole_seconds = time.time() - began
    if code := os.waitstatus_to_exitcode(status):
        raise RunFailedError(f"exit code {code}, {place}/log.txt")
    found: dict[str, Any] = json.loads(output.read_text())
    output.unlink()
    seconds = [ended - began for ended in found.pop("ended")]
    of_command = {"whole_seconds": whole_seconds, "whole_cpu_seconds": usage.ru_utime + usage.ru_stime}
    return found | of_command | {"seconds": seconds, "ending": "completed"}


def run_product(
    place: Path, dataset: str, arch: str, seed: int, arguments: str, stop_after: dict[Clock, float]
) -> dict[str, Any]:
    """Run jobs/train.py, and return what JSON keeps of it. A run that diverges is a row, too."""
    command = [sys.executable, "jobs/train.py", "--arch", arch, "--dataset", dataset, "--seed", str(seed)]
    # In a storage of its own: no run profits from the measurements of an earlier one.
    command += ["--storage", str(place), "--run-name", "run", *shlex.split(arguments)]
    run, kept = RunFolder(str(place / "run")), place / "kept"
    began, cpu_seconds, is_stopped = time.time(), 0.0, False
    with (place / "log.txt").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                cpu_seconds = max(cpu_seconds, measure_cpu_seconds(process.pid))
                keep_predictions(Path(run.checkpoints), kept, cpu_seconds)
                taken = {"wall": time.time() - began, "cpu": cpu_seconds}
                if not is_stopped and any(taken[clock] > seconds for clock, seconds in stop_after.items()):
                    process.terminate()
                    is_stopped = True
        finally:
            if process.poll() is None:
                process.terminate()
    of_command = {"whole_seconds": time.time() - began, "whole_cpu_seconds": cpu_seconds}
    keep_predictions(Path(run.checkpoints), kept, cpu_seconds)
    ending = run.read_ending()
    status = "stopped" if is_stopped and process.returncode else ending.status if ending else "failed"
    if process.returncode and status not in ("stopped", "diverged"):
        raise RunFailedError(f"{status}, exit code {process.returncode}, {place}/log.txt")
    found = read_kept(kept, began)
    if len(found["seconds"]) < (epochs := len(run.read_metrics())):
        raise RunFailedError(f"{kept} holds the predictions of {len(found['seconds'])} of {epochs} epochs")
    for one in (kept, Path(run.checkpoints)):
        shutil.rmtree(one, ignore_errors=True)
    Path(run.path("model.keras")).unlink(missing_ok=True)
    return found | of_command | {"ending": status}


def measure_cpu_seconds(pid: int) -> float:
    """Return what a process and all that it started have taken of the machine's cores; 0 once it is gone."""
    seconds = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds += sum(one.cpu_times()[:4])  # its own, and of those of its children that have ended
    return seconds


def keep_predictions(checkpoints: Path, kept: Path, cpu_seconds: float) -> None:
    """Link the predictions of each checkpoint, then its record: the run deletes all but its best and its last.

    ``cpu_seconds``, which the run has taken so far, is kept beside them.
    """
    for commit in checkpoints.glob("*/checkpoint.json"):
        folder = kept / commit.parent.name
        if (folder / commit.name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CPU_SECONDS).write_text(str(cpu_seconds))
        for name in ("predictions.parquet", commit.name):
            try:
                os.link(commit.parent / name, folder / name)
            except FileNotFoundError:
                # Within an epoch nothing is predicted; or it was deleted just now.
                break
            except FileExistsError:
                continue


def read_kept(kept: Path, began: float) -> dict[str, Any]:
    """Return when the checkpoint of each epoch was written, and its predictions."""
    found: dict[int, Path] = {}
    for commit in sorted(kept.glob("*/checkpoint.json")):
        found[Checkpoint.parse(commit.read_bytes(), str(commit)).epoch] = commit
    commits = [found[epoch] for epoch in sorted(found)]
    tables = [pq.read_table(commit.parent / "predictions.parquet") for commit in commits]
    return {
        "seconds": [commit.stat().st_mtime - began for commit in commits],
        "cpu_seconds": [float((commit.parent / CPU_SECONDS).read_text()) for commit in commits],
        "predicted": [table["predicted"].to_pylist() for table in tables],
        "losses": [table["loss"].to_pylist() for table in tables],
    }


@dataclass(frozen=True)
class Turn:
    """The script and the product by some options on one dataset, network and seed."""

    dataset: str
    arch: str
    options: str
    seed: int
    script: Run
    product: Run

    @property
    def at_equal_seconds(self) -> Curve:
        """What the product had when the script's last epoch ended."""
        return self.product.curve.until(self.script.curve.seconds[-1])

    @property
    def p_values(self) -> tuple[float, float]:
        """Of the product against the script's last and its best epoch."""
        product, script = self.at_equal_seconds.best, self.script.curve
        last, best = (compare_predictions(product, one).p_value for one in (script.last, script.best))
        return last, best

    @property
    def advantages(self) -> tuple[int, int]:
        """How many more answers of the product are correct than of the script's last and its best epoch."""
        product, script = self.at_equal_seconds.best, self.script.curve
        correct, last, best = (int(is_correct(one).sum()) for one in (product, script.last, script.best))
        return correct - last, correct - best

    @property
    def seconds_to_last(self) -> tuple[float, float]:
        """When the script and the product reached the accuracy of the script's last epoch."""
        accuracy = float(is_correct(self.script.curve.last).mean())
        script, product = (run.curve.seconds_to(accuracy) for run in (self.script, self.product))
        return script, product


def make_table(turns: list[Turn]) -> Table:
    """Return a row for each turn."""
    table = Table("set", "network", "options", "seed", "script last", "script best", "s", "product then")
    for name in ("p last", "p best", "final", "s", "epochs then, final", "s to last: script, product"):
        table.add_column(name)
    for column in table.columns:
        # An interval stays on one line.
        column.min_width = len("[0.123-0.456]") if column.header in COUNTED else None
    for turn in turns:
        script, product, then = turn.script, turn.product, turn.at_equal_seconds
        table.add_row(
            *(turn.dataset, turn.arch, turn.options or DEFAULTS, str(turn.seed)),
            *(format_correct(script.curve.last), format_correct(script.curve.best)),
            *(f"{script.curve.seconds[-1]:.0f}", format_correct(then.best)),
            *(f"{p:.2g}" for p in turn.p_values),
            "stopped" if product.ending == "stopped" else format_correct(product.curve.best),
            *(f"{product.whole_seconds:.0f}", f"{len(then.seconds)}, {len(product.curve.seconds)}"),
            ", ".join(f"{seconds:.0f}" for seconds in turn.seconds_to_last),
        )
    return table


def make_summary(turns: list[Turn]) -> Table:
    """Return a row for each dataset, network and options, over all seeds."""
    table = Table("set", "network", "options", "seeds", "script last", "script best", "product then", "final")
    for name in ("product - last, points [95%]", "product - best, points [95%]"):
        table.add_column(name)
    for (dataset, arch, options), group in itertools.groupby(sorted(turns, key=_configuration), _configuration):
        of_seeds = list(group)
        last, best, then, final = (
            np.stack([is_correct(one) for one in tables])
            for tables in zip(
                *(
                    (
                        turn.script.curve.last,
                        turn.script.curve.best,
                        turn.at_equal_seconds.best,
                        turn.product.curve.best,
                    )
                    for turn in of_seeds
                ),
                strict=True,
            )
        )
        differences = (find_difference(then, one) for one in (last, best))
        table.add_row(
            *(dataset, arch, options or DEFAULTS, str(len(of_seeds))),
            *(f"{correct.mean():.4f}" for correct in (last, best, then)),
            f"{final.mean():.4f}" if all(turn.product.ending != "stopped" for turn in of_seeds) else "stopped",
            *(f"{100 * mean:+.1f} [{100 * low:+.1f} to {100 * high:+.1f}]" for mean, low, high in differences),
        )
    return table


def _configuration(turn: Turn) -> tuple[str, str, str]:
    return turn.dataset, turn.arch, turn.options


def find_marks(turns: list[Turn]) -> list[Mark]:
    """Return the targets of the defaults, and of other options, against the script."""
    return [
        mark
        for options in dict.fromkeys(turn.options for turn in turns)
        for mark in _find_marks_of(options, [turn for turn in turns if turn.options == options])
    ]


def _find_marks_of(options: str, turns: list[Turn]) -> list[Mark]:
    worse = sum(
        any(p < SIGNIFICANCE and more < 0 for p, more in zip(turn.p_values, turn.advantages, strict=True))
        for turn in turns
    )
    better = sum(min(turn.advantages) > 0 for turn in turns)
    ratios = [product / script for script, product in (turn.seconds_to_last for turn in turns)]
    name = f"{options or DEFAULTS}, {format_count(len(turns), 'row')}"
    return [
        Mark(f"{name}: significantly worse than the script's last or best epoch", worse, 0, at_least=False),
        Mark(f"{name}: better than both", better, len(turns) // 2 + 1),
        Mark(f"{name}: seconds to the script's last accuracy, to its own, median", median(ratios), 1, at_least=False),
        Mark(f"{name}: the same, largest", max(ratios), 1, at_least=False),
    ]


def main(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder that keeps every run.")],
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET...", help="Prepared.")],
    arch: Annotated[list[str], typer.Option()] = ["cnn_tapered"],  # noqa: B006
    seed: Annotated[list[int], typer.Option()] = [0],  # noqa: B006
    options: Annotated[list[str], typer.Option(help="Of jobs/train.py, in one argument.")] = [""],  # noqa: B006
    epochs: Annotated[int, typer.Option(min=1, help="Of the script.")] = 24,
    stop_after: Annotated[
        float, typer.Option(min=0, help="Stop this project after so many times the script's seconds; 0: never.")
    ] = 0,
    clock: Annotated[
        Clock, typer.Option(help="Seconds to compare at: of the clock, or of the machine's cores.")
    ] = "wall",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables for a document.")] = False,
) -> None:
    turns = []
    for a_seed, dataset, name in itertools.product(seed, datasets, arch):
        script = run_once(results, SCRIPT, dataset, name, a_seed, {"epochs": epochs}, clock)
        if script is None:
            continue
        limit = {clock: stop_after * float(script.curve.seconds[-1])} if stop_after else {}
        for arguments in options:
            of_product = {"arguments": arguments, "stop_after": limit}
            product = run_once(results, PRODUCT, dataset, name, a_seed, of_product, clock)
            if product is not None:
                turns.append(Turn(Path(dataset).name, name, arguments, a_seed, script, product))
    if not turns:
        raise typer.Exit(1)
    report([make_table(turns), make_summary(turns)], marks=find_marks(turns), as_markdown=markdown)


if __name__ == "__main__":
    typer.run(main)
