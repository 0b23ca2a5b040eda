"""Pieces of the text of notes, cards and messages: Markdown tables, counts and fingerprints."""

from collections.abc import Iterable, Sequence

# A table or a picture with an entry per class shows up to this many classes; of more it shows the extremes.
MOST_CLASSES = 50

_DIGEST_DIGITS = 12


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table; bars and line breaks in cells are escaped."""
    lines = [_format_row(header), "|" + "---|" * len(header)]
    return lines + [_format_row(row) for row in rows]


def _format_row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"


def format_count(number: float, noun: str) -> str:
    """Return a number and what it counts, such as ``1 run``, ``2 runs`` or ``2 classes``."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "sh", "tch")) else "s"
    return f"{number:g} {noun}{ending}" if isinstance(number, float) else f"{number} {noun}{ending}"


def shorten_digest(digest: str) -> str:
    """Shorten a checksum or fingerprint for display; records keep all of its digits."""
    return digest[:_DIGEST_DIGITS]
