"""Names in scripts that the usual font lacks."""

import io
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from trainer.runtime.fonts import fonts_for

# Cuneiform: no machine has a font for it by chance.
ANCIENT, OTHER = "\U00012000", "\U00012001"


@pytest.fixture
def ancient_font(tmp_path, monkeypatch) -> str:
    """A font of this machine, which has one sign: a full block."""
    pen = TTGlyphPen(None)
    for place, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if place else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "sign"])
    builder.setupCharacterMap({ord(ANCIENT): "sign"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "sign": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "sign": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Ancient", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "ancient.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "ancient.ttf")
    return "Ancient"


def draw(text: str) -> tuple[np.ndarray, str]:
    """Return the pixels of a picture of a text, and what is missing; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fonts_for(text) as missing:
            figure, content = Figure(figsize=(1, 1)), io.BytesIO()
            figure.text(0.2, 0.2, text, fontsize=30, parse_math=False)
            figure.savefig(content, format="png", dpi=100)
    return np.asarray(Image.open(content).convert("L")), missing


def test_a_font_that_has_the_characters_is_taken(ancient_font):
    pixels, missing = draw(ANCIENT)
    assert missing == ""
    # 30 points are 42 pixels: the block, and not the outline of a box.
    assert (pixels[40:75, 25:55] == 0).all()


def test_what_no_font_has_is_reported_and_is_no_warning(ancient_font):
    _, missing = draw(f"{OTHER} of {ANCIENT}")
    assert missing == OTHER


def test_names_that_the_usual_font_has_change_nothing():
    assert draw("épée, Ж,\tß")[1] == ""
