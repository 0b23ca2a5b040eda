import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from data_prep.decode import ImageOptions, decode_image
from data_prep.formats import FORMATS, RejectedImageError, _is_tga, open_image

# Formats that Pillow opens by another program, by a stub, by no signature, or to no end here.
KEPT_SHUT = {"EPS", "WMF", "HDF5", "BUFR", "GRIB", "MPEG", "FITS", "PSD", "FLI", "PCD", "XBM"}
RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """A TIFF with other values in some of its tags."""
    information = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        information[getattr(TiffImagePlugin, name)] = value
    content = bytearray(encode(Image.fromarray(pixels), "TIFF"))
    # Twelve bytes an entry: tag, type, count, value.
    start = struct.unpack_from("<I", content, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        tag = struct.unpack_from("<H", content, entry)[0]
        if tag in information:
            struct.pack_into("<H", content, entry + 8, information[tag])
    return bytes(content)


def bmp(compression: int) -> bytes:
    content = bytearray(encode(Image.fromarray(RAMP), "BMP"))
    struct.pack_into("<I", content, 30, compression)
    return bytes(content)


def jpeg(bits: int) -> bytes:
    content = encode(Image.fromarray(RAMP), "JPEG")
    frame = content.index(b"\xff\xc0")
    return content[: frame + 4] + bytes([bits]) + content[frame + 5 :]


def icon_of(width: int, height: int) -> bytes:
    """An icon of 16x16 pixels whose picture, a PNG, has other dimensions."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in (header, data)]
    picture = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def reason_of(content: bytes) -> str:
    with pytest.raises(RejectedImageError) as rejected:
        decode_image(content, ImageOptions(image_size=8))
    return rejected.value.reason


def test_formats_that_run_a_program_or_are_no_image_are_kept_shut():
    assert set(Image.OPEN) >= KEPT_SHUT
    assert not set(FORMATS) & KEPT_SHUT


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"8BPS\0\x01" + bytes(40),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
        b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40),
        b"\xff\x0a" + bytes(40),
        b"\xff\xd8\xff\xf7\0\x0b\x08\0\x08\0\x08\x01\x01\x11\0" + bytes(40),
        b"SIMPLE  =                    T" + bytes(60),
        bytes(128) + b"DICM" + bytes(40),
        bmp(compression=4),
        jpeg(bits=12),
        tiff(RAMP, COMPRESSION=34887),
        tiff(RAMP, PHOTOMETRIC_INTERPRETATION=32844),
        tiff(RAMP.astype(np.uint16), PHOTOMETRIC_INTERPRETATION=8),
    ],
    ids=[
        "eps",
        "photoshop",
        "heic",
        "heif",
        "jxl",
        "jpeg-ls",
        "fits",
        "dicom",
        "bmp",
        "jpeg",
        "lerc",
        "logluv",
        "lab-16",
    ],
)
def test_an_image_of_a_kind_that_is_not_read_is_unsupported(content):
    assert reason_of(content) == "unsupported"


def test_the_thumbnail_of_a_raw_picture_is_not_taken_for_it():
    information = TiffImagePlugin.ImageFileDirectory_v2()
    information[254] = 1
    assert reason_of(encode(Image.fromarray(RAMP), "TIFF", tiffinfo=information)) == "unsupported"


@pytest.mark.parametrize("size", [(60_000, 60_000), (2_000_000_000, 1)])
def test_a_large_picture_inside_an_icon_is_refused_by_its_header(size):
    assert reason_of(icon_of(*size)) == "too_many_pixels"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_tga_is_recognized_from_its_header(mode, compression):
    image = Image.fromarray(RAMP).convert(mode)
    content = encode(image, "TGA", **({"compression": compression} if compression else {}))
    assert open_image(content).format == "TGA"
    np.testing.assert_array_equal(decode_image(content, ImageOptions(image_size=8))[..., 0], image.convert("L"))


def test_a_tga_whose_fourth_byte_is_no_alpha_is_opaque():
    content = bytearray(encode(Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.new("L", (8, 8), 0)]), "TGA"))
    content[17] &= 0xF0
    np.testing.assert_array_equal(decode_image(bytes(content), ImageOptions(image_size=8))[..., 0], RAMP)


def test_bytes_that_are_no_image_are_not_taken_for_a_tga():
    random = np.random.default_rng(0)
    files = [random.bytes(64) for _ in range(20_000)]
    # Small numbers, as at the start of many a file of another kind.
    files += [bytes(random.integers(0, 4, 64, dtype=np.uint8)) for _ in range(20_000)]
    files += [b"\0\0\2\0\1\0\x20\x20" + bytes(64), b"\0\1\0\0" + bytes(64), b"\0\0\x0b\3" + bytes(64)]
    assert [content for content in files if _is_tga(content)] == []


def test_lab_has_the_right_colours():
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:4], colours[4:] = (200, 30, 20), (20, 60, 220)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(colours), *profiles, outputMode="LAB")
    decoded = decode_image(encode(image, "TIFF"), ImageOptions(image_size=8, channels=3))
    assert np.abs(decoded.astype(int) - colours).max() <= 4


def test_premultiplied_gray_shows_the_background():
    content = encode(Image.merge("LA", [Image.new("L", (8, 8), 50), Image.new("L", (8, 8), 0)]), "TIFF")
    assert decode_image(content, ImageOptions(image_size=8, background=9)).max() == 9
    associated = content.replace(struct.pack("<HHII", 338, 3, 1, 2), struct.pack("<HHII", 338, 3, 1, 1))
    assert associated != content
    assert decode_image(associated, ImageOptions(image_size=8, background=9)).max() == 9
