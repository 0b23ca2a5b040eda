"""Bytes of one image file to one uint8 array of the dataset's size: the decode step.

JPEG goes through OpenCV, which is three to four times as fast as Pillow there (benchmarks/prepare.py); everything else,
and any JPEG out of the ordinary, goes through Pillow, which knows more kinds. Both end in the same resize, so that a
class whose files are of another format does not look different.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_prep.formats import TGA_ALPHA_BITS, RejectedImageError, open_image, rejections
from data_prep.values import ALL_16_BITS, ValueRange, WideImage, measure, narrow, read_wide_image

Pixels = npt.NDArray[np.uint8]

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

    value_range: ValueRange | None = None
    """LOW:HIGH, the values that become 0 and 255 in images with more than 8 bits a pixel, such as 0:4095 for 12 bits.
    None: see `data_prep.values`."""

    @field_validator("value_range", mode="before")
    @classmethod
    def _parse_value_range(cls, given: Any) -> Any:
        low, high = map(float, given.split(":")) if isinstance(given, str) else given or (0, 1)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("give two numbers LOW:HIGH, the smaller one first")
        return None if given is None else (low, high)

    @classmethod
    def of(cls, record: BaseModel) -> "ImageOptions":
        """Returns the options that a manifest, or a config of a preparation, has among its own."""
        return cls(**record.model_dump(include=set(cls.model_fields)))


def decode_image(content: bytes, options: ImageOptions) -> Pixels:
    """Returns the first frame of an image, upright and resized.

    Args:
        content: the file's bytes; the format is told from them, never from a name.
        options: size, channels and fit of the result.

    Returns:
        uint8 ``[image_size, image_size, channels]``. Without a range of values, 16-bit images keep their high byte.

    Raises:
        RejectedImageError: the image cannot be used.
    """

    def range_of(wide: WideImage) -> ValueRange:
        if options.value_range is None and wide.pixels.dtype != np.uint16:
            raise RejectedImageError("unsupported")
        return options.value_range or ALL_16_BITS

    return _decode(content, options, range_of)


def decode_or_measure(content: bytes, options: ImageOptions) -> Pixels | ValueRange:
    """Return what `decode_image` does, or the smallest and the largest value where it takes a range to scale these.

    Raises:
        RejectedImageError: the image cannot be used.
    """

    def range_of(wide: WideImage) -> ValueRange:
        if options.value_range is None:
            raise _MeasuredError(measure(wide))
        return options.value_range

    try:
        return _decode(content, options, range_of)
    except _MeasuredError as error:
        return error.found


class _MeasuredError(Exception):
    def __init__(self, found: ValueRange) -> None:
        super().__init__()
        self.found = found


def _decode(content: bytes, options: ImageOptions, range_of: Callable[[WideImage], ValueRange]) -> Pixels:
    with open_image(content) as header, rejections():
        pixels = _decode_plain_jpeg(content, header, options)
        if pixels is None:
            wide = read_wide_image(header, content)
            image = header if wide is None else narrow(wide, wide.range or range_of(wide))
            pixels = _flatten(image, options)
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


def _flatten(image: Image.Image, options: ImageOptions) -> Pixels:
    """Return uint8 ``[height, width, channels]`` of an image of at most 8 bits a pixel."""
    mode = "L" if options.channels == 1 else "RGB"
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "LAB":
        upright = ImageCms.applyTransform(upright, _lab_to_rgb()) or upright
    elif upright.mode == "La":
        upright = upright.convert("LA")
    if upright.has_transparency_data and image.info.get(TGA_ALPHA_BITS) != 0:
        with_alpha = upright.convert("RGBA")
        background = Image.new("RGBA", with_alpha.size, (options.background,) * 3 + (255,))
        upright = Image.alpha_composite(background, with_alpha)
    return np.asarray(upright.convert(mode), np.uint8).reshape(upright.height, upright.width, options.channels)


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


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
