"""How benchmarks print: medians with their spread, side by side."""

import statistics
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 170


def format_spread(values: Sequence[float], digits: int = 0) -> str:
    """Returns the median with the lowest and the highest value."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def format_ratio(values: Sequence[float], baseline: Sequence[float], digits: int = 2) -> str:
    """Returns the ratio of the medians."""
    return f"{statistics.median(values) / statistics.median(baseline):.{digits}f}"


def print_table(table: Table) -> None:
    """Prints a table that is not cut where there is no terminal."""
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(table)
