"""HTML pages that need nothing from outside: templates that escape what they are given, pictures inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

# A hundred runs with pictures stay below ten megabytes.
_PICTURE_WIDTH, _PICTURE_QUALITY = 640, 55
_WIDE = 1100


@dataclass(frozen=True)
class Table:
    """Rows of text."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    title: str
    lines: list[str]
    table: Table | None = None
    command: str = ""
    picture: str = ""
    """Name of a picture of the page."""


def render_page(template: str, **values: Any) -> str:
    """Returns a page as HTML text.

    Args:
        template: name of a file in ``trainer/runtime/templates``.
        values: that it needs, all of them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer.runtime"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def render_sections(title: str, subtitle: str, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Returns a page of sections as HTML text.

    Args:
        title: of the page.
        subtitle: one line below it.
        sections: in their order.
        pictures: content of picture files, by the name that sections use.
    """
    addresses = {name: to_data_uri(content, _WIDE) for name, content in pictures.items()}
    return render_page("sections.html.jinja", title=title, subtitle=subtitle, sections=sections, pictures=addresses)


def to_data_uri(picture: bytes, width: int = _PICTURE_WIDTH) -> str:
    """Returns a picture of any format, made small, as the address of an ``img`` element.

    Args:
        picture: content of its file.
        width: that it has at most, in pixels.
    """
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((width, 4 * width))
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=_PICTURE_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"
