"""Decode the bytes of one image file to one uint8 array of the dataset's size.

OpenCV decodes JPEG, three to four times as fast as Pillow (benchmarks/prepare.py). Pillow, which supports more formats,
decodes everything else and any unusual JPEG. Both are followed by the same resize, so that a class does not look
different because its files have another format.
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

# Ray runs one task per core.
cv2.setNumThreads(1)

_JPEG_END = b"\xff\xd9"
_REDUCED_FLAGS = {
    1: {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR},
    2: {1: cv2.IMREAD_REDUCED_GRAYSCALE_2, 3: cv2.IMREAD_REDUCED_COLOR_2},
    4: {1: cv2.IMREAD_REDUCED_GRAYSCALE_4, 3: cv2.IMREAD_REDUCED_COLOR_4},
    8: {1: cv2.IMREAD_REDUCED_GRAYSCALE_8, 3: cv2.IMREAD_REDUCED_COLOR_8},
}


class ImageOptions(BaseModel):
    """How images are decoded: size, channels, fit and range of values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(250, ge=1, le=4096)
    """Height and width of the result in pixels; the training notes used 250."""
    channels: Literal[1, 3] = 1
    """1 for luma (ITU-R BT.601), 3 for RGB."""
    resize: Literal["fit", "crop", "pad"] = "fit"
    """How an image becomes a square. fit: stretch the whole image. crop: take the largest square in its center. pad:
    keep the whole image and its aspect ratio, and fill the rest with the background."""
    background: int = Field(255, ge=0, le=255)
    """Gray value, 0 (black) to 255 (white), behind transparent pixels and around padded images."""

    value_range: ValueRange | None = None
    """LOW:HIGH, the values that become 0 and 255 in images with more than 8 bits per channel, such as 0:4095 for 12
    bits. None: determined from the images, see `data_prep.values`."""

    @field_validator("value_range", mode="before")
    @classmethod
    def _parse_value_range(cls, given: Any) -> Any:
        low, high = map(float, given.split(":")) if isinstance(given, str) else given or (0, 1)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("give two numbers LOW:HIGH, the smaller one first")
        return None if given is None else (low, high)

    @classmethod
    def of(cls, record: BaseModel) -> "ImageOptions":
        """Return the image options that are among the fields of a manifest or of a `PrepareConfig`."""
        return cls(**record.model_dump(include=set(cls.model_fields)))


def decode_image(content: bytes, options: ImageOptions) -> Pixels:
    """Return the first frame of an image, upright and resized.

    Args:
        content: the file's bytes; the format is detected from them, never from a name.
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
    """Return the same as `decode_image`; if that needs a range of values, return the image's smallest and largest one.

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
    """Return uint8 ``[height, width, channels]``, or None for a JPEG that OpenCV does not decode as Pillow does."""
    # OpenCV returns a partial image for a truncated file, and does not read CMYK as Adobe writes it.
    if header.format != "JPEG" or header.mode not in ("L", "RGB") or not content.rstrip(b"\0").endswith(_JPEG_END):
        return None
    # The decoder can shrink an image by a power of two in the frequency domain, which makes the resize cheaper. The
    # result keeps at least 1.5 times the final size: closer to it, the resize would blur what it keeps of the same
    # picture in a PNG. If a side is not a multiple of the factor, it would be rounded up, which stretches the picture.
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
    """Return an image of at most 8 bits per channel as uint8 ``[height, width, channels]``, upright and opaque."""
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
        # All results are contiguous; without a resize, this one would be a view.
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
    """Resize pixels: average over all of them to shrink, interpolate cubically to enlarge."""
    channels = pixels.shape[2]
    shrunk = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    if shrunk != pixels.shape[:2]:
        pixels = np.asarray(cv2.resize(pixels, shrunk[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    if shrunk != (height, width):
        pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    return pixels.reshape(height, width, channels)
