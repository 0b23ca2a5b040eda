"""Self-contained HTML pages: templates with escaping, and embedded pictures."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

# A page of a hundred runs with pictures stays below ten megabytes.
_PICTURE_WIDTH, _PICTURE_QUALITY = 640, 55
_WIDE = 1100


@dataclass(frozen=True)
class Table:
    """A table of text."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """One section of a page."""

    title: str
    lines: list[str]
    table: Table | None = None
    command: str = ""
    picture: str = ""
    """Name of one of the pictures of the page."""


def render_page(template: str, **values: Any) -> str:
    """Render a template as the HTML text of a page.

    Args:
        template: name of a file in ``trainer/runtime/templates``.
        values: all values that the template uses.
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
    """Render a page of sections as HTML text.

    Args:
        title: title of the page.
        subtitle: the line below the title.
        sections: the sections, in order.
        pictures: content of the picture files, by the names that the sections use.
    """
    addresses = {name: to_data_uri(content, _WIDE) for name, content in pictures.items()}
    return render_page("sections.html.jinja", title=title, subtitle=subtitle, sections=sections, pictures=addresses)


def to_data_uri(picture: bytes, width: int = _PICTURE_WIDTH) -> str:
    """Return a picture of any format, reduced in size, as a data URI for an ``img`` element.

    Args:
        picture: content of the picture file.
        width: maximum width in pixels.
    """
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((width, 4 * width))
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=_PICTURE_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"
