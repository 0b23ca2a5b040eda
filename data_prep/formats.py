"""Open images of the supported formats, detected from their bytes, and say why anything else is rejected."""

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from PIL import AvifImagePlugin, Image, ImageFile, TiffImagePlugin

RejectReason = Literal[
    "empty",  # zero bytes
    "not_an_image",  # not an image, such as an HTML page named .jpg
    "damaged",  # truncated, or with bytes that its format does not allow
    "too_many_pixels",  # more than MAX_PIXELS according to its header
    "unsupported",  # an image, but of a format, compression or pixel type that is not supported
    "too_much_memory",  # the decoder needed more memory than there is
    "decoder_crashed",  # the decoder's process died
    "decoder_hung",  # no result within a minute
    "unreadable",  # the file does not exist, or is local and cannot be opened
]

# The formats of images that people train on. Pillow opens more, some by starting another program (EPS), some with a
# stub (HDF5, GRIB), some whatever the bytes are. Each format is one more decoder that a malicious file can reach.
FORMATS = (
    "JPEG",  # and MPO, a JPEG with more pictures after the first
    "PNG",
    "BMP",
    "GIF",
    "TIFF",
    "WEBP",
    "AVIF",
    "JPEG2000",
    "PPM",  # PBM, PGM, PPM and PFM
    "ICO",
    "SUN",
    "TGA",
)
# Bytes that identify image formats that are not supported: (offset, bytes).
_UNREAD = (
    (0, b"%!PS"),
    (0, b"\xc5\xd0\xd3\xc6"),  # EPS with a preview
    (0, b"8BPS"),  # Photoshop
    (0, b"gimp xcf"),
    (0, b"DDS "),
    (0, b"\x01\xda"),  # SGI
    (0, b"\x0a\x05\x01"),  # PCX
    (0, b"qoif"),  # Pillow decodes it in Python, a second or more per megapixel
    (0, b"SIMPLE  ="),  # FITS
    (0, b"v/1\x01"),  # OpenEXR
    (0, b"#?RADIANCE"),
    (0, b"#?RGBE"),
    (0, b"\xff\x0a"),  # JPEG XL
    (0, b"\0\0\0\x0cJXL "),
    (0, b"II\xbc\x01"),  # JPEG XR
    (0, b"\xff\xd8\xff\xf7"),  # JPEG-LS
    (0, b"P7\n"),  # PAM
    (0, b"\xd7\xcd\xc6\x9a"),  # WMF
    (0, b"AT&TFORM"),  # DjVu
    (0, b"FUJIFILMCCD-RAW"),
    (0, b"IIRO"),  # raw images of Olympus
    (0, b"IIU\0"),  # and Panasonic
    (4, b"ftypcrx "),  # and Canon
    (4, b"ftyphei"),  # HEIC of phones
    (4, b"ftyphev"),
    (128, b"DICM"),
)
# Brands of AVIF files that files of other codecs in the same container also have.
_SHARED_BRANDS = (b"mif1", b"msf1")
# 100 megapixels: more than all but a few cameras. The header is enough to reject an image, before pixels are allocated.
# The largest image that is allowed takes up to 2.8 GB to decode, measured with a 16-bit RGB PNG: the 16-bit pixels and
# a few copies with 8 bits. One with 8 bits takes less.
MAX_PIXELS = 100_000_000
# Pillow raises an error above twice this number, also for pictures inside a file, and warns above this number.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Ray runs one task per core.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# Key in the info of a TGA image: how many bits of the fourth byte are alpha. Pillow always treats them as alpha.
TGA_ALPHA_BITS = "tga_alpha_bits"
_PREFIX_BYTES = 18
_NEW_SUBFILE_TYPE, _WEBP_IN_TIFF = 254, 50001
# Matches the errors of Pillow's readers for files that are intact but of a kind that the reader does not support.
_SAYS_UNSUPPORTED = re.compile(
    r"unsupported|not (yet )?supported|cannot handle|unknown (pixel mode|data organization)|"
    r"unable to determine|samples per pixel",
    re.IGNORECASE,
)


class RejectedImageError(Exception):
    """An image file cannot be used; ``reason`` says why."""

    def __init__(self, reason: RejectReason) -> None:
        super().__init__(reason)
        self.reason: RejectReason = reason


@contextlib.contextmanager
def rejections() -> Iterator[None]:
    """Turn any error that Pillow's readers raise in this context into a `RejectedImageError`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RejectedImageError("too_many_pixels") from error
    except MemoryError as error:
        raise RejectedImageError("too_much_memory") from error
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        # A KeyError means a mode or a compression that the reader does not know.
        is_unsupported = isinstance(error.__cause__, KeyError) or _SAYS_UNSUPPORTED.search(str(error))
        raise RejectedImageError("unsupported" if is_unsupported else "damaged") from error


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Return an image of which only the header has been read, not the pixels.

    Args:
        content: the file's bytes; the format is detected from them, never from a name.

    Raises:
        RejectedImageError: the image cannot be used.
    """
    if not content:
        raise RejectedImageError("empty")
    prefix = content[:_PREFIX_BYTES]
    for name, (is_of_format, read_header) in _READERS.items():
        if is_of_format(prefix):
            return _open_as(name, read_header, content)
    raise RejectedImageError("unsupported" if _is_unread(content) else "not_an_image")


def _is_unread(content: bytes) -> bool:
    return any(content.startswith(start, place) for place, start in _UNREAD)


def _open_as(name: str, read_header: Callable[..., ImageFile.ImageFile], content: bytes) -> ImageFile.ImageFile:
    try:
        with rejections():
            image = read_header(io.BytesIO(content), "")
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _check_tiff(image.tag_v2)
            elif name == "TGA":
                image.info[TGA_ALPHA_BITS] = content[17] & 0x0F
            if image.width * image.height > MAX_PIXELS:
                raise RejectedImageError("too_many_pixels")
            return image
    except RejectedImageError as error:
        if error.reason == "damaged" and name == "PPM":
            # The signature is a letter and a digit, and many text files start that way.
            raise RejectedImageError("not_an_image") from error
        if error.reason == "damaged" and (content[8:12] in _SHARED_BRANDS or _is_unread(content)):
            raise RejectedImageError("unsupported") from error
        raise


def _check_tiff(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    """Reject a TIFF that Pillow would misread."""
    # The first image in a camera's raw file is a thumbnail.
    is_reduced = tags.get(_NEW_SUBFILE_TYPE, 0) & 1
    # Pillow would read the wide values as bytes.
    is_wide_in_planes = (
        tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and max(tags[TiffImagePlugin.BITSPERSAMPLE]) > 8
    )
    # Pillow knows this compression, but its libtiff does not and reports damaged data.
    is_webp = tags.get(TiffImagePlugin.COMPRESSION) == _WEBP_IN_TIFF
    if is_reduced or is_wide_in_planes or is_webp:
        raise RejectedImageError("unsupported")


def _is_tga(prefix: bytes) -> bool:
    """Return whether 18 bytes are a TGA header; it has no signature, so every field must have a valid value."""
    if len(prefix) < _PREFIX_BYTES:
        return False
    _, has_palette, kind, _, palette_length, palette_depth = struct.unpack_from("<BBBHHB", prefix)
    width, height, depth, descriptor = struct.unpack_from("<HHBB", prefix, 12)
    if has_palette:
        is_palette = has_palette == 1 and palette_length > 0 and palette_depth in (16, 24, 32)
    else:
        is_palette = prefix[3:8] == bytes(5)
    pixels = {1: (8,) if has_palette else (), 2: (16, 24, 32), 3: (8, 16)}
    is_kind = kind & ~8 in pixels and depth in pixels[kind & ~8]
    return is_palette and is_kind and width > 0 and height > 0 and not descriptor & 0xC0


def _find_readers() -> Mapping[str, tuple[Callable[[bytes], object], Callable[..., ImageFile.ImageFile]]]:
    """Return two functions for each format: one detects it from the first bytes, one reads its header."""
    Image.init()
    readers = {}
    for name in FORMATS:
        read_header, accepts = Image.OPEN[name]
        readers[name] = (accepts or _is_tga, read_header)
    return readers


_READERS = _find_readers()
