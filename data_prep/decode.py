"""Bytes of one image file to one uint8 array of the dataset's size: the decode step.

JPEG goes through OpenCV, which is three to four times as fast as Pillow there (benchmarks/prepare.py); everything else,
and any JPEG out of the ordinary, goes through Pillow, which knows more kinds. Both end in the same resize, so that a
class whose files are of another format does not look different.
"""

import io
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

Pixels = npt.NDArray[np.uint8]
RejectReason = Literal[
    "empty",  # zero bytes
    "not_an_image",  # no format that is read here, such as an HTML page named .jpg
    "damaged",  # cut off, or bytes that its format does not allow
    "too_many_pixels",  # more than MAX_PIXELS by its header
    "unsupported",  # pixels without a fixed range (32-bit, floating point)
    "too_much_memory",  # the decoder asked for more than there is
    "decoder_crashed",  # the decoder's process died
    "decoder_hung",  # no result within a minute
    "unreadable",  # there is no such file, or it is a local one that cannot be opened
]

# A TIFF or WebP that was cut off cannot be identified, but it is not something else.
_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
# 100 megapixels: above all but a few cameras. The header is enough to refuse, before pixels are allocated; what is
# allowed takes at most about 1.2 GB in the decoder.
MAX_PIXELS = 100_000_000
# Pillow's own limit would only warn, and its error would hide the reason.
Image.MAX_IMAGE_PIXELS = None
# Ray runs one task a core.
cv2.setNumThreads(1)

_JPEG_END = b"\xff\xd9"
_REDUCED_FLAGS = {
    1: {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR},
    2: {1: cv2.IMREAD_REDUCED_GRAYSCALE_2, 3: cv2.IMREAD_REDUCED_COLOR_2},
    4: {1: cv2.IMREAD_REDUCED_GRAYSCALE_4, 3: cv2.IMREAD_REDUCED_COLOR_4},
    8: {1: cv2.IMREAD_REDUCED_GRAYSCALE_8, 3: cv2.IMREAD_REDUCED_COLOR_8},
}


class ImageOptions(BaseModel):
    """What an image is turned into."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(250, ge=1, le=4096)
    """Height and width in pixels; the notes used 250."""
    channels: Literal[1, 3] = 1
    """1 for luma (ITU-R BT.601), 3 for RGB."""
    resize: Literal["fit", "crop", "pad"] = "fit"
    """fit: the whole image, its aspect ratio not kept. crop: the largest square in its middle. pad: the whole image
    with its aspect ratio, between bars of the background."""
    background: int = Field(255, ge=0, le=255)
    """Gray value behind transparent pixels and of the bars of pad: 255 is white."""

    @classmethod
    def of(cls, record: BaseModel) -> "ImageOptions":
        """Returns the options that a manifest, or a config of a preparation, has among its own."""
        return cls(**record.model_dump(include=set(cls.model_fields)))


class RejectedImageError(Exception):
    """The file cannot be used; ``reason`` says why."""

    def __init__(self, reason: RejectReason) -> None:
        super().__init__(reason)
        self.reason: RejectReason = reason


def decode_image(content: bytes, options: ImageOptions) -> Pixels:
    """Returns the first frame of an image, upright and resized.

    Args:
        content: the file's bytes; the format is told from them, never from a name.
        options: size, channels and fit of the result.

    Returns:
        uint8 ``[image_size, image_size, channels]``. 16-bit images keep their high byte.

    Raises:
        RejectedImageError: the image cannot be used.
    """
    if not content:
        raise RejectedImageError("empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            if header.width * header.height > MAX_PIXELS:
                raise RejectedImageError("too_many_pixels")
            pixels = _decode_plain_jpeg(content, header, options)
            if pixels is None:
                pixels = _decode_with_pillow(header, options)
    except UnidentifiedImageError as error:
        raise RejectedImageError("damaged" if content.startswith(_FIRST_BYTES) else "not_an_image") from error
    except MemoryError as error:
        raise RejectedImageError("too_much_memory") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        # What Pillow's readers raise on bytes that their format does not allow.
        raise RejectedImageError("damaged") from error
    return _fit_square(pixels, options)


def _decode_plain_jpeg(content: bytes, header: Image.Image, options: ImageOptions) -> Pixels | None:
    """Returns uint8 ``[height, width, channels]``, or None where OpenCV does not do what Pillow does."""
    # OpenCV returns what there is of a file that was cut off, and its CMYK is not Adobe's.
    if header.format != "JPEG" or header.mode not in ("L", "RGB") or not content.rstrip(b"\0").endswith(_JPEG_END):
        return None
    # What the decoder can average by powers of two in the frequency domain need not be resized. Half as much again is
    # left, since averaging nearly as many pixels as there are would blur what the same picture in a PNG keeps. Sides
    # that the factor does not divide would be rounded up, which stretches the picture.
    side = max(header.size) if options.resize == "pad" else min(header.size)
    reduction = max(
        factor
        for factor in _REDUCED_FLAGS
        if factor == 1
        or (side >= 1.5 * options.image_size * factor and header.width % factor == header.height % factor == 0)
    )
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED_FLAGS[reduction][options.channels])
    if pixels is None:
        return None
    if options.channels == 3:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
    return np.asarray(pixels, np.uint8)[..., np.newaxis]


def _decode_with_pillow(image: Image.Image, options: ImageOptions) -> Pixels:
    """Returns uint8 ``[height, width, channels]``."""
    mode = "L" if options.channels == 1 else "RGB"
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # Pillow clips 16 bits to 8 where it should scale them.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise RejectedImageError("unsupported")
    elif upright.has_transparency_data:
        with_alpha = upright.convert("RGBA")
        background = Image.new("RGBA", with_alpha.size, (options.background,) * 3 + (255,))
        upright = Image.alpha_composite(background, with_alpha)
    return np.asarray(upright.convert(mode), np.uint8).reshape(upright.height, upright.width, options.channels)


def _fit_square(pixels: Pixels, options: ImageOptions) -> Pixels:
    size = options.image_size
    height, width, channels = pixels.shape
    if options.resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        # Contiguous, as all that is returned: where nothing is resized, it would be a view.
        return np.ascontiguousarray(_resize(pixels[top : top + side, left : left + side], size, size))
    if options.resize == "pad":
        scale = size / max(height, width)
        fitted = _resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        square = np.full((size, size, channels), options.background, np.uint8)
        top, left = (size - fitted.shape[0]) // 2, (size - fitted.shape[1]) // 2
        square[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
        return square
    return _resize(pixels, size, size)


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Returns the pixels at another size: averaged over all of them where it shrinks, cubic where it grows."""
    channels = pixels.shape[2]
    shrunk = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    if shrunk != pixels.shape[:2]:
        pixels = np.asarray(cv2.resize(pixels, shrunk[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    if shrunk != (height, width):
        pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    return pixels.reshape(height, width, channels)
