"""HTML pages that need nothing from outside: templates that escape what they are given, pictures inside."""

import base64
import io
from typing import Any

from PIL import Image

# A hundred runs with pictures stay below ten megabytes.
_PICTURE_WIDTH, _PICTURE_QUALITY = 640, 55


def render_page(template: str, **values: Any) -> str:
    """Returns a page as HTML text.

    Args:
        template: name of a file in ``trainer/templates``.
        values: that it needs, all of them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


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
