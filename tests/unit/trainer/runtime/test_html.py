import base64
import io

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from trainer.runtime.html import Section, Table, render_page, render_sections, to_data_uri


def png(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def size_of(uri: str) -> tuple[int, int]:
    head, _, content = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).size


def test_a_picture_is_embedded_no_wider_than_asked():
    assert size_of(to_data_uri(png(1000, 500), width=100)) == (100, 50)
    assert size_of(to_data_uri(png(30, 20), width=100)) == (30, 20)
    assert size_of(to_data_uri(png(10, 5000), width=100)) == (1, 400)


def test_a_page_of_sections_has_all_that_they_say():
    sections = [
        Section("Which is better?", ["SGD, by 3 of 400"], Table(("optimizer", "correct"), [("sgd", "300")])),
        Section("How was it run?", [], command="python jobs/sweep.py study.toml", picture="curves"),
    ]
    page = render_sections("SGD or AdamW?", "16 trials", sections, {"curves": png(20, 10)})
    for text in ("SGD or AdamW?", "16 trials", "Which is better?", "SGD, by 3 of 400", "optimizer", "300"):
        assert text in page
    assert "python jobs/sweep.py study.toml" in page
    assert page.count('src="data:image/webp;base64,') == 1
    assert "http" not in page


def test_what_users_write_is_text():
    page = render_sections("<script>alert(1)</script>", "", [Section("a & b", ["<b>"])], {})
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError):
        render_page("sections.html.jinja", title="no sections")
