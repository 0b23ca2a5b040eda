"""How benchmarks print: medians with their spread, side by side, where they were measured, and the marks."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 170
# A row of a Markdown table is one line.
_MARKDOWN_WIDTH = 10_000


@dataclass(frozen=True)
class Mark:
    """What a measurement is to reach."""

    what: str
    value: float
    limit: float
    at_least: bool = True
    """Otherwise at most."""

    @property
    def is_reached(self) -> bool:
        """Whether it does."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        side, verdict = "at least" if self.at_least else "at most", "reached" if self.is_reached else "missed"
        return f"{self.what}: {self.value:.3g}, mark {side} {self.limit:g}: {verdict}"


def format_spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median with the lowest and the highest value."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio_of(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the ratio of the medians."""
    return statistics.median(values) / statistics.median(baseline)


def format_ratio(values: Sequence[float], baseline: Sequence[float], digits: int = 2) -> str:
    """Return the ratio of the medians in text."""
    return f"{ratio_of(values, baseline):.{digits}f}"


def report(
    tables: Table | Sequence[Table],
    records: Any = None,
    marks: Sequence[Mark] = (),
    *,
    as_json: bool = False,
    as_markdown: bool = False,
) -> None:
    """Print one or more tables with what they are to reach, or what was measured as JSON.

    Args:
        tables: not cut where there is no terminal.
        records: what JSON can hold.
        marks: of the project, by these tables.
        as_json: print records and marks instead.
        as_markdown: print the tables in Markdown.
    """
    where = describe_machine()
    if as_json:
        print(json.dumps({**where, "marks": [asdict(mark) for mark in marks], "records": records}))
        return
    width = _MARKDOWN_WIDTH if as_markdown else None if sys.stdout.isatty() else _PLAIN_WIDTH
    console = Console(width=width, highlight=False)
    for table in [tables] if isinstance(tables, Table) else tables:
        for column in table.columns:
            # Cells that are too wide take more lines and lose nothing.
            column.overflow = "fold"
        if as_markdown:
            table.box = box.MARKDOWN
        console.print(table)
    for mark in marks:
        console.print(str(mark), markup=False)
    console.print(", ".join(where.values()), markup=False)


def describe_machine() -> dict[str, str]:
    """Return date, commit and machine of a measurement."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    processors = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    kind = processors[0].partition(":")[2].strip() if processors else platform.machine()
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": f"commit {commit or 'unknown'}",
        "machine": f"{len(os.sched_getaffinity(0))} cores of {kind}",
    }
