import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from data_prep.decode import ImageOptions, decode_image, decode_or_measure
from data_prep.formats import RejectedImageError
from data_prep.values import ValueRange, find_value_range

TWELVE_BITS = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64
COLOURS = np.dstack([TWELVE_BITS, TWELVE_BITS[::-1], TWELVE_BITS.T])


def encode(pixels: np.ndarray, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def encode_colours(pixels: np.ndarray, suffix: str) -> bytes:
    order = cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR
    encoded, content = cv2.imencode(suffix, cv2.cvtColor(pixels, order))
    assert encoded
    return content.tobytes()


def netpbm(kind: str, pixels: np.ndarray, largest: int) -> bytes:
    height, width = pixels.shape[:2]
    header = f"{kind}\n# of a microscope\n{width} {height}\n{largest}\n".encode()
    if kind in ("P2", "P3"):
        return header + b"\n# a line\n".join(b" ".join(b"%d" % value for value in row.ravel()) for row in pixels)
    return header + pixels.astype(">u2" if largest > 255 else np.uint8).tobytes()


def decode(content: bytes, value_range: str | None = "0:4095", channels: int = 1, **options) -> np.ndarray:
    options = ImageOptions(image_size=8, channels=channels, value_range=value_range, **options)
    return decode_image(content, options).squeeze()


def measure(content: bytes) -> ValueRange:
    found = decode_or_measure(content, ImageOptions(image_size=8))
    assert isinstance(found, ValueRange)
    return found


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(5, 4091)], (0, 4095)),
        ([(5, 4091), (0, 4096)], (0, 8191)),
        ([(0, 3000), (0, 200)], (0, 4095)),
        ([(0, 65535), (0, 4095)], (0, 65535)),
        ([(0, 255)], (0, 255)),
        ([(0, 0)], (0, 1)),
        ([(0.1, 0.9)], (0, 1)),
        ([(0, 1.5)], (0, 3)),
        ([(-1024, 3071)], (-1024, 3071)),
        ([(-1024, 100), (0, 3071)], (-1024, 3071)),
        ([(-7, -7)], (-7, -6)),
        ([(0, 2**32 - 1)], (0, 2**32 - 1)),
    ],
)
def test_the_range_of_a_dataset_holds_the_values_of_all_its_images(found, expected):
    assert find_value_range([ValueRange(*one) for one in found]) == expected


@pytest.mark.parametrize(
    "content",
    [
        encode(TWELVE_BITS, "PNG"),
        encode(TWELVE_BITS, "TIFF"),
        encode(TWELVE_BITS, "TIFF", compression="tiff_lzw"),
        encode(TWELVE_BITS, "JPEG2000"),
        encode(TWELVE_BITS, "PPM"),
        netpbm("P2", TWELVE_BITS, 65535),
        encode(TWELVE_BITS.astype(np.int32), "TIFF"),
        encode(TWELVE_BITS.astype(np.float32), "TIFF"),
        encode(TWELVE_BITS.astype(np.float32), "PPM"),
        encode(TWELVE_BITS, "ICO", sizes=[(8, 8)]),
    ],
    ids=["png", "tiff", "lzw", "jp2", "pgm", "plain-pgm", "int32", "float", "pfm", "ico"],
)
def test_12_bits_of_gray_in_any_container_fill_the_gray_levels(content):
    assert measure(content) == (0, 63 * 64)
    np.testing.assert_array_equal(decode(content), TWELVE_BITS >> 4)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".jp2", ".ppm"])
def test_12_bits_of_colour_fill_the_gray_levels(suffix):
    content = encode_colours(COLOURS.repeat(8, axis=0).repeat(8, axis=1), suffix)
    assert measure(content) == (0, 63 * 64)
    np.testing.assert_array_equal(decode(content, channels=3), COLOURS >> 4)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_transparent_pixels_of_16_bits_show_the_background(suffix):
    alpha = np.full((8, 8), 65535, np.uint16)
    alpha[:, :4] = 0
    content = encode_colours(np.dstack([COLOURS, alpha]), suffix)
    assert measure(content) == (0, 63 * 64)
    decoded = decode(content, channels=3, background=9)
    assert (decoded[:, :4] == 9).all()
    np.testing.assert_array_equal(decoded[:, 4:], COLOURS[:, 4:] >> 4)


@pytest.mark.parametrize(
    "content",
    [
        netpbm("P5", TWELVE_BITS, 4095),
        netpbm("P2", TWELVE_BITS, 4095),
        netpbm("P6", np.dstack([TWELVE_BITS] * 3), 4095),
        netpbm("P3", np.dstack([TWELVE_BITS] * 3), 4095),
        netpbm("P5", TWELVE_BITS >> 6, 63),
    ],
)
def test_a_range_that_the_header_says_needs_no_other(content):
    for value_range in (None, "0:255"):
        decoded = decode(content, value_range)
        assert np.abs(decoded - TWELVE_BITS / (63 * 64) * 252).max() <= 4


def test_images_of_8_bits_keep_their_values_whatever_the_range():
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for kind in ("PNG", "TIFF", "BMP", "PPM", "JPEG2000"):
        np.testing.assert_array_equal(decode(encode(gray, kind)), gray)


def test_signed_values_are_read_as_such():
    content = encode(np.arange(-32, 32, dtype=np.int32).reshape(8, 8), "TIFF")
    assert measure(content) == (-32, 31)
    np.testing.assert_array_equal(decode(content, "-32:31").ravel(), np.minimum(255, np.arange(64) * 256 // 63))


def test_signed_16_and_8_bits_of_a_tiff_are_signed():
    for bits, kind in ((16, np.int16), (8, np.int8)):
        values = np.arange(-32, 32, dtype=kind).reshape(8, 8)
        content = with_tag(encode(values.view(np.uint16 if bits == 16 else np.uint8), "TIFF"), 339, 2)
        assert measure(content) == (-32, 31)


def with_tag(content: bytes, tag: int, value: int) -> bytes:
    """A TIFF of 8x8 pixels with one more tag, its directory written again at its end."""
    start = struct.unpack_from("<I", content, 4)[0]
    count = struct.unpack_from("<H", content, start)[0]
    entries = [content[start + 2 + 12 * number : start + 14 + 12 * number] for number in range(count)]
    entries.append(struct.pack("<HHIHH", tag, 3, 1, value, 0))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    padding = bytes(len(content) % 2)
    return content[:4] + struct.pack("<I", len(content) + len(padding)) + content[8:] + padding + directory


def test_what_is_no_number_is_black():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    content = encode(values, "TIFF")
    assert measure(content) == (values[0, 2], 1)
    assert decode(content, "0:1")[0, :2].tolist() == [0, 255]
    with pytest.raises(RejectedImageError, match="unsupported"):
        decode(encode(np.full((8, 8), np.nan, np.float32), "TIFF"), "0:1")


def test_values_outside_the_range_are_its_ends():
    decoded = decode(encode(TWELVE_BITS, "PNG"), "1024:2047").ravel()
    assert (decoded[:17] == 0).all()
    assert (decoded[32:] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("colour", [False, True])
def test_exif_turns_images_of_16_bits(kind, colour):
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    if colour and kind == "TIFF":
        plain = encode_colours(COLOURS, ".tiff")
        content = with_tag(plain, 274, 6)
    elif colour:
        content = encode_colours(COLOURS, ".png")
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        content = content[:33] + whole + content[33:]
    else:
        content = encode(TWELVE_BITS, kind, exif=exif)
    expected = np.rot90(COLOURS[..., 0] if colour else TWELVE_BITS, -1) >> 4
    assert np.abs(decode(content, channels=3)[..., 0].astype(int) - expected).max() == 0


def test_white_is_zero_is_turned_round():
    content = with_photometric(encode(TWELVE_BITS, "TIFF"), 0)
    np.testing.assert_array_equal(decode(content), 255 - (TWELVE_BITS >> 4))


def with_photometric(content: bytes, value: int) -> bytes:
    entry = content.index(struct.pack("<HHI", 262, 3, 1))
    return content[: entry + 8] + struct.pack("<H", value) + content[entry + 10 :]


@pytest.mark.parametrize("values", ["4095", "a:b", "5:5", "9:1", "0:inf", (3, 2)])
def test_a_range_that_is_none_is_refused(values):
    with pytest.raises(ValueError, match="value_range"):
        ImageOptions(value_range=values)
