"""Fonts for names in any script: which fonts of this machine a picture uses, and which characters none of them has."""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import matplotlib
from matplotlib import font_manager

# Matplotlib's own font, which has a box for every character.
_PLACEHOLDER = "Last Resort"


@contextlib.contextmanager
def fonts_for(text: str) -> Iterator[str]:
    """Use fonts that have the characters of a text, and yield the characters that no font of this machine has.

    Both the labels and the file of a picture must be made within the context. Matplotlib's warning for each missing
    glyph and picture is suppressed: `trainer.runtime.events.GlyphsMissing` reports them once.
    """
    families, missing = _find_families(text)
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": families}):
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        yield missing


def find_font_file(text: str) -> str:
    """Return the file of the font of this machine that has the most characters of a text."""
    families, _ = _find_families(text)
    wanted = {character for character in text if character.isprintable()}
    files = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    return max(files, key=lambda file: len(_read_characters(file) & wanted))


def _find_families(text: str) -> tuple[list[str], str]:
    """Return font families for a text, configured ones first, and the characters that none of them has."""
    families = list(matplotlib.rcParams["font.family"])
    missing = {character for character in text if character.isprintable()}
    missing -= _read_characters(font_manager.findfont(font_manager.FontProperties()))
    if not missing:
        return families, ""
    found = {
        font.name: _read_characters(font.fname) & missing
        for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname))
        if font.style == "normal" and not font.name.startswith(_PLACEHOLDER)
    }
    while missing and found:
        best = max(found, key=lambda name: len(found[name] & missing))
        if not found[best] & missing:
            break
        families.append(best)
        missing -= found.pop(best)
    return families, "".join(sorted(missing))


@functools.lru_cache
def _read_characters(path: str) -> frozenset[str]:
    try:
        font = font_manager.get_font(path)
        # Fonts of colored bitmaps, such as emoji, do not have this size.
        font.set_size(10, 100)
        return frozenset(chr(code) for code in font.get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
