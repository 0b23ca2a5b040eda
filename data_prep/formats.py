"""Opens the image formats that are read here, told from their bytes, and says why anything else is refused."""

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
    "not_an_image",  # no image, such as an HTML page named .jpg
    "damaged",  # cut off, or bytes that its format does not allow
    "too_many_pixels",  # more than MAX_PIXELS by its header
    "unsupported",  # an image, of a format, a compression or a kind of pixels that is not read
    "too_much_memory",  # the decoder asked for more than there is
    "decoder_crashed",  # the decoder's process died
    "decoder_hung",  # no result within a minute
    "unreadable",  # there is no such file, or it is a local one that cannot be opened
]

# The formats in which people keep images to train on. Pillow opens more: some by another program (EPS), some by a stub
# (HDF5, GRIB), some by any bytes at all, and each is one more decoder for a hostile file to reach.
FORMATS = (
    "JPEG",  # and MPO, a JPEG with more pictures behind the first
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
# How the files of images that are not read start, or are marked further in: (place, bytes).
_UNREAD = (
    (0, b"%!PS"),
    (0, b"\xc5\xd0\xd3\xc6"),  # EPS with a preview
    (0, b"8BPS"),  # Photoshop
    (0, b"gimp xcf"),
    (0, b"DDS "),
    (0, b"\x01\xda"),  # SGI
    (0, b"\x0a\x05\x01"),  # PCX
    (0, b"qoif"),  # a loop in Python, a second or more a megapixel
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
    (0, b"IIRO"),  # raw pictures of Olympus
    (0, b"IIU\0"),  # and Panasonic
    (4, b"ftypcrx "),  # and Canon
    (4, b"ftyphei"),  # HEIC of phones
    (4, b"ftyphev"),
    (128, b"DICM"),
)
# Of AVIF, but of other codecs in its container too.
_SHARED_BRANDS = (b"mif1", b"msf1")
# 100 megapixels: more than all but a few cameras. The header is enough to reject an image, before pixels are allocated.
# The largest image that is allowed takes up to 2.8 GB to decode, measured with a 16-bit RGB PNG: the 16-bit pixels and
# a few copies with 8 bits. One with 8 bits takes less.
MAX_PIXELS = 100_000_000
# Pillow raises above twice this number, for pictures within a file too, and warns above it.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Ray runs one task a core.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# In the info of a TGA: how many of the bits of its fourth byte are alpha. Pillow takes them for alpha in any case.
TGA_ALPHA_BITS = "tga_alpha_bits"
_PREFIX_BYTES = 18
_NEW_SUBFILE_TYPE, _WEBP_IN_TIFF = 254, 50001
# What Pillow's readers say of a file that is whole but of a kind that they do not know.
_SAYS_UNSUPPORTED = re.compile(
    r"unsupported|not (yet )?supported|cannot handle|unknown (pixel mode|data organization)|"
    r"unable to determine|samples per pixel",
    re.IGNORECASE,
)


class RejectedImageError(Exception):
    """The file cannot be used; ``reason`` says why."""

    def __init__(self, reason: RejectReason) -> None:
        super().__init__(reason)
        self.reason: RejectReason = reason


@contextlib.contextmanager
def rejections() -> Iterator[None]:
    """Raise what Pillow's readers raise within as a `RejectedImageError`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RejectedImageError("too_many_pixels") from error
    except MemoryError as error:
        raise RejectedImageError("too_much_memory") from error
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        # A KeyError is a mode or a compression that the reader has no entry for.
        is_unsupported = isinstance(error.__cause__, KeyError) or _SAYS_UNSUPPORTED.search(str(error))
        raise RejectedImageError("unsupported" if is_unsupported else "damaged") from error


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Return an image whose header is read and whose pixels are not.

    Args:
        content: the file's bytes; the format is told from them, never from a name.

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
            # A letter and a digit: many a text starts so.
            raise RejectedImageError("not_an_image") from error
        if error.reason == "damaged" and (content[8:12] in _SHARED_BRANDS or _is_unread(content)):
            raise RejectedImageError("unsupported") from error
        raise


def _check_tiff(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    """Refuse what Pillow would read as something else than it is."""
    # Of a camera's raw picture the first image is a thumbnail.
    is_reduced = tags.get(_NEW_SUBFILE_TYPE, 0) & 1
    # Read as bytes.
    is_wide_in_planes = (
        tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and max(tags[TiffImagePlugin.BITSPERSAMPLE]) > 8
    )
    # Known to Pillow, not to its libtiff, whose error is that of damaged data.
    is_webp = tags.get(TiffImagePlugin.COMPRESSION) == _WEBP_IN_TIFF
    if is_reduced or is_wide_in_planes or is_webp:
        raise RejectedImageError("unsupported")


def _is_tga(prefix: bytes) -> bool:
    """Return whether 18 bytes are a header of TGA, which has no signature: every field must be one that occurs."""
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
    """Return, for each format, what tells it from the first bytes and what reads its header."""
    Image.init()
    readers = {}
    for name in FORMATS:
        read_header, accepts = Image.OPEN[name]
        readers[name] = (accepts or _is_tga, read_header)
    return readers


_READERS = _find_readers()
