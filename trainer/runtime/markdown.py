"""Pieces of the text of notes, cards and messages: Markdown tables, counts, losses and fingerprints."""

from collections.abc import Iterable, Sequence

# A table or a picture with an entry per class shows up to this many classes; of more it shows the extremes.
MOST_CLASSES = 50

_DIGEST_DIGITS = 12
_LONGEST_NAME = 24
# A run that diverges reaches 1e27, which takes a line of its own.
_LARGEST_LOSS = 1e5


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


def format_loss(loss: float, digits: int = 4) -> str:
    """Return a loss with some decimals, or with as many digits if it is so large that its unit is no information."""
    return f"{loss:.{digits}f}" if abs(loss) < _LARGEST_LOSS else f"{loss:.{digits}g}"


def shorten_name(name: str) -> str:
    """Return a name without line breaks and, if it is long, without its middle: names often differ at their ends."""
    name = " ".join(name.split())
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[:half]}…{name[1 - half :]}"


def shorten_digest(digest: str) -> str:
    """Shorten a checksum or fingerprint for display; records keep all of its digits."""
    return digest[:_DIGEST_DIGITS]
