"""Bytes of one image file to one uint8 array of the dataset's size: the decode step."""

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

RejectReason = Literal["empty", "unsupported", "damaged", "too_many_pixels", "unreadable", "not_an_image"]

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
# 200 megapixels: above any camera, and 600 MB decoded. The header is enough to refuse, before pixels are allocated.
MAX_PIXELS = 200_000_000
# Pillow's own limit would only warn, and its error would hide the reason.
Image.MAX_IMAGE_PIXELS = None


class RejectedImageError(Exception):
    """The file cannot be used; ``reason`` says why in one word of a fixed set."""

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: RejectReason = reason


def decode_image(content: bytes, image_size: int, channels: int) -> npt.NDArray[np.uint8]:
    """Returns the first frame, upright, resized to a square with an antialiasing filter.

    Args:
        content: the file's bytes; the format is told from them, never from a name.
        image_size: height and width of the result in pixels. The aspect ratio is not kept.
        channels: 1 for luma (ITU-R BT.601), 3 for RGB.

    Returns:
        uint8 ``[image_size, image_size, channels]``. Transparent parts are white; 16-bit images keep their high byte.

    Raises:
        RejectedImageError: the bytes are empty, damaged, of another format, or hold more than MAX_PIXELS.
    """
    if not content:
        raise RejectedImageError("empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RejectedImageError("too_many_pixels", f"{image.width} x {image.height}")
            mode = "L" if channels == 1 else "RGB"
            # The JPEG decoder averages by powers of two in the frequency domain: fewer pixels left to resize.
            image.draft(mode, (image_size, image_size))
            upright = ImageOps.exif_transpose(image)
            pixels = _to_mode(upright, mode).resize((image_size, image_size), Image.Resampling.LANCZOS)
    except UnidentifiedImageError as error:
        raise RejectedImageError("not_an_image") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        # What Pillow's decoders raise on damaged data (its PNG reader raises SyntaxError).
        raise RejectedImageError("damaged", str(error)) from error
    return np.asarray(pixels, dtype=np.uint8).reshape(image_size, image_size, channels)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit to 8-bit instead of scaling it.
        high_byte = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(high_byte).convert(mode)
    if image.mode in ("I", "F"):
        raise RejectedImageError("unsupported", f"{image.mode} pixels have no fixed range")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        background = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(background, with_alpha).convert(mode)
    return image.convert(mode)
