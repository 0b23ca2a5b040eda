"""Read images with more than 8 bits per channel, and convert their values to 0 to 255.

All images of a dataset share one range of values, else what is dark in one image would be bright in another. It goes
from 0 to the smallest 2**bits - 1 that is not below the largest value of any such image, whether integer or floating
point. If some values are negative, it goes from the smallest value to the largest. Values outside a given range are
clipped. An image whose header gives the range needs no other: the largest value of a PGM, 12 bits of a TIFF, the
precision of a JPEG 2000.
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, TiffImagePlugin
from PIL.ExifTags import Base

from data_prep.formats import RejectedImageError

# Values are converted in blocks of rows: NumPy needs 8 bytes for each, 2.4 GB for the largest image that is allowed.
_BLOCK_VALUES = 2**20
_16_BIT_COLOR = re.compile(r"(L|RGB)A?;16[BLN]")
_WHITE_IS_ZERO = 0


class ValueRange(NamedTuple):
    """A range of values, both ends included."""

    low: float
    high: float

    def __str__(self) -> str:
        return " to ".join(str(int(end)) if end.is_integer() else f"{end:g}" for end in map(float, self))


ALL_16_BITS = ValueRange(0, 2**16 - 1)


class WideImage(NamedTuple):
    """An image with more than 8 bits per channel."""

    pixels: npt.NDArray[Any]
    """``[height, width]``, or ``[height, width, 3]`` for RGB: int8, uint16, int32, uint32 or float32."""
    range: ValueRange | None
    """The range of the values if the header gives it."""
    alpha: npt.NDArray[np.uint16] | None = None
    """``[height, width]``, or None if the image is opaque."""
    orientation: int = 1
    """EXIF orientation of the pixels, 1 to 8."""
    is_inverted: bool = False
    """Whether the smallest value is white."""


def read_wide_image(image: ImageFile.ImageFile, content: bytes) -> WideImage | None:
    """Return the pixels of an image, or None if it has at most 8 bits per channel.

    Args:
        image: the opened image, from `data_prep.formats.open_image`.
        content: the file's bytes.

    Raises:
        RejectedImageError: no value is finite, or the image is of an unsupported kind.
    """
    if image.format == "PPM" and image.mode in ("L", "I", "RGB"):
        return _read_netpbm(image, content)
    raw_mode = _raw_mode(image)
    precision = _precision(content) if image.format == "JPEG2000" else 0
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    is_signed = tags.get(TiffImagePlugin.SAMPLEFORMAT) in (2, (2,))
    if image.mode.startswith("I;16") or image.mode in ("I", "F") or (image.mode == "L" and is_signed):
        pixels = np.asarray(image)
        if image.mode.startswith("I;16"):
            pixels = pixels.astype(np.uint16, copy=False)
        elif image.mode == "L":
            pixels = pixels.view(np.int8)
        elif raw_mode == "I;32N":
            pixels = pixels.view(np.uint32)
        elif image.mode == "F" and not np.isfinite(pixels).any():
            raise RejectedImageError("unsupported")
        known = ValueRange(0, 2**12 - 1) if raw_mode == "I;12" else None
        if 0 < precision < 16:
            # Pillow scales the values to 16 bits.
            known = ALL_16_BITS
        is_inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
        return WideImage(pixels, known, None, _orientation(image), is_inverted)
    if _16_BIT_COLOR.fullmatch(raw_mode) or (precision == 16 and image.mode in ("RGB", "RGBA")):
        return _read_16_bit_colors(image, content)
    return None


def _read_netpbm(image: ImageFile.ImageFile, content: bytes) -> WideImage | None:
    """Return the values of a PGM or PPM, or None if Pillow reads it fast: else it takes a second per megapixel."""
    codec, _, offset, arguments = image.tile[0]
    if codec == "raw" and arguments != "I;16B":
        return None
    largest = arguments[1] if isinstance(arguments, tuple) else 2**16 - 1
    shape = (image.height, image.width, 3) if image.mode == "RGB" else (image.height, image.width)
    if codec == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", content[offset:])
        values = np.array(text.split(maxsplit=math.prod(shape))[: math.prod(shape)], np.uint16)
    else:
        values = np.frombuffer(content, np.uint8 if largest < 256 else ">u2", math.prod(shape), offset)
    known = None if largest == 2**16 - 1 else ValueRange(0, largest)
    return WideImage(values.astype(np.uint16).reshape(shape), known)


def _read_16_bit_colors(image: Image.Image, content: bytes) -> WideImage:
    # Pillow keeps only the high byte of each value, but raises an error if the file is truncated.
    image.load()
    colors = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if colors is None or colors.dtype != np.uint16 or colors.ndim != 3:
        raise RejectedImageError("unsupported")
    alpha = np.asarray(colors[..., 3], np.uint16) if colors.shape[2] == 4 else None
    # OpenCV returns BGR.
    return WideImage(colors[..., 2::-1], None, alpha, _orientation(image))


def _orientation(image: Image.Image) -> int:
    """Return the orientation still to be applied to the pixels: Pillow and OpenCV apply that of a TIFF themselves."""
    return int(image.getexif().get(Base.Orientation, 1))


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name for the layout of the pixels in the file."""
    # An icon has no tile: its pixels are read with the header.
    arguments = image.tile[0].args if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _precision(content: bytes) -> int:
    """Return the bits per value of a JPEG 2000 image, from the first segment of its code stream."""
    return (content[content.index(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1


def measure(wide: WideImage) -> ValueRange:
    """Return the smallest and the largest finite value of an image, without alpha."""
    values = wide.pixels
    if values.dtype == np.float32:
        values = values[np.isfinite(values)]
    return ValueRange(float(values.min()), float(values.max()))


def find_value_range(found: Iterable[ValueRange]) -> ValueRange:
    """Return the range of values of a dataset, given that of each image with more than 8 bits per channel."""
    lows, highs = zip(*found, strict=True)
    low, high = min(lows), max(highs)
    if low < 0:
        return ValueRange(low, max(high, low + 1))
    return ValueRange(0, 2 ** max(1, math.ceil(high).bit_length()) - 1)


def narrow(wide: WideImage, value_range: ValueRange) -> Image.Image:
    """Return an image with 8 bits per channel and the orientation in its EXIF data."""
    pixels = wide.pixels
    bytes_ = np.empty(pixels.shape, np.uint8)
    rows = max(1, _BLOCK_VALUES // pixels[0].size)
    for start in range(0, len(pixels), rows):
        block = pixels[start : start + rows]
        is_16_bits = block.dtype == np.uint16
        bytes_[start : start + rows] = (
            _bytes_of_16_bits(value_range)[block] if is_16_bits else _to_bytes(block, value_range)
        )
    if wide.is_inverted:
        bytes_ = 255 - bytes_
    if wide.alpha is not None:
        bytes_ = np.dstack([bytes_, (wide.alpha >> 8).astype(np.uint8)])
    image = Image.fromarray(bytes_)
    image.getexif()[Base.Orientation] = wide.orientation
    return image


@functools.lru_cache(maxsize=4)
def _bytes_of_16_bits(value_range: ValueRange) -> npt.NDArray[np.uint8]:
    return _to_bytes(np.arange(2**16), value_range)


def _to_bytes(values: npt.NDArray[Any], value_range: ValueRange) -> npt.NDArray[np.uint8]:
    """Scale values to 0 to 255 in equal steps; with the range of 16 bits, this is the high byte."""
    low, high = value_range
    finite = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.clip((finite - low) * (256 / (high - low)), 0, 255).astype(np.uint8)
