"""Self-contained HTML pages: templates with escaping, embedded pictures, and links between pages."""

import base64
import functools
import io
import json
import os
import posixpath
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from PIL import Image

from trainer.runtime import storage
from trainer.runtime.errors import InputError
from trainer.runtime.markdown import format_loss, shorten_name

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

# A page of a hundred runs with pictures stays below ten megabytes.
_PICTURE_WIDTH, _PICTURE_QUALITY = 640, 55
_WIDE = 1100


@dataclass(frozen=True)
class Table:
    """A table of text."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    links: Mapping[str, str] = field(default_factory=dict)
    """Where the first cells of rows lead, by their text."""


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
    return _load_environment().get_template(template).render(values)


@functools.cache
def _load_environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer.runtime"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = _read_asset
    environment.filters |= {"loss": format_loss, "short": shorten_name}
    return environment


@functools.cache
def _read_asset(name: str) -> "Markup":
    """Return a script, a style or a license of ``trainer/runtime/templates`` as it is."""
    from markupsafe import Markup

    return Markup(resources.files("trainer.runtime").joinpath("templates", name).read_text())


def to_script_json(value: Any) -> "Markup":
    """Return JSON for a ``script`` element, which it cannot close."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def link(folder: str, uri: str) -> str:
    """Return the address of a file for a page in a folder: relative where it is, so that both can move together.

    Args:
        folder: URI of the folder of the page.
        uri: URI of the file.
    """
    if storage.is_local(folder) and storage.is_local(uri):
        return urllib.parse.quote(os.path.relpath(uri, folder))
    start, end = (urllib.parse.urlsplit(one) for one in (folder, uri))
    if (start.scheme, start.netloc) != (end.scheme, end.netloc):
        return uri
    return urllib.parse.quote(posixpath.relpath(end.path, start.path))


def find_links(folder: str, places: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the names and addresses of those files that exist, for a page in a folder.

    Args:
        folder: URI of the folder of the page.
        places: URIs of the files by name.
    """
    return [(name, link(folder, uri)) for name, uri in places.items() if _exists(uri)]


def _exists(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except InputError:
        return False  # a dataset may be in a bucket that is gone


def render_sections(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    pictures: Mapping[str, bytes],
    drawings: Mapping[str, str] | None = None,
    links: Sequence[tuple[str, str]] = (),
) -> str:
    """Render a page of sections as HTML text.

    Args:
        title: title of the page.
        subtitle: the line below the title.
        sections: the sections, in order.
        pictures: content of the picture files, by the names that the sections use.
        drawings: SVG elements, likewise, which take the colors of the page.
        links: names and addresses of other pages.
    """
    from markupsafe import Markup

    addresses = {name: to_data_uri(content, _WIDE) for name, content in pictures.items()}
    return render_page(
        "sections.html.jinja",
        title=title,
        subtitle=subtitle,
        sections=sections,
        pictures=addresses,
        drawings={name: Markup(drawing) for name, drawing in (drawings or {}).items()},
        links=links,
    )


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
