"""Markdown tables."""

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a table; a bar or a line break in a cell cannot break it."""
    lines = [_format_row(header), "|" + "---|" * len(header)]
    return lines + [_format_row(row) for row in rows]


def _format_row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"
