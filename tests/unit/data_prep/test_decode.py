import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from data_prep.decode import ImageOptions, decode_image
from data_prep.formats import FORMATS, RejectedImageError

# How far pixels may be off: JPEG loses a little even at its best quality.
TOLERANCE = {"JPEG": 3, "AVIF": 4}
ENCODE = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
RED, GREEN, BLUE = (200, 30, 20), (10, 180, 40), (20, 60, 220)
# ITU-R BT.601
LUMA = np.array([0.299, 0.587, 0.114])


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    if image_format == "SUN":  # which Pillow reads and does not write
        pixels = np.asarray(image)
        return cv2.imencode(".ras", pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()
    if image_format == "ICO":
        options = {"sizes": [image.size], **options}
    sink = io.BytesIO()
    image.save(sink, image_format, **{**ENCODE.get(image_format, {}), **options})
    return sink.getvalue()


def picture(height: int, width: int, noise: float = 0) -> Image.Image:
    """A gray picture without an edge that resizing could put on either side."""
    rows, columns = np.mgrid[:height, :width]
    waves = 128 + 50 * np.sin(columns / 17) + 50 * np.cos(rows / 11)
    noisy = waves + np.random.default_rng(0).normal(0, noise, (height, width))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def quarters() -> np.ndarray:
    """64x64: red and green above blue and white."""
    image = np.empty((64, 64, 3), np.uint8)
    image[:32, :32], image[:32, 32:], image[32:, :32], image[32:, 32:] = RED, GREEN, BLUE, (255, 255, 255)
    return image


def decode(content: bytes, image_size: int = 64, channels: int = 3, **options) -> np.ndarray:
    return decode_image(content, ImageOptions(image_size=image_size, channels=channels, **options)).astype(int)


def reason_of(content: bytes, **options) -> str:
    with pytest.raises(RejectedImageError) as rejected:
        decode_image(content, ImageOptions(**options))
    return rejected.value.reason


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(np.asarray(one, int).squeeze() - np.asarray(other, int).squeeze()).mean())


@pytest.mark.parametrize("image_format", FORMATS)
def test_colours_are_rgb_in_every_format(image_format):
    decoded = decode(encode(Image.fromarray(quarters()), image_format))
    assert decoded.shape == (64, 64, 3)
    assert np.abs(decoded - quarters()).max() <= TOLERANCE.get(image_format, 0)


@pytest.mark.parametrize("image_format", FORMATS)
def test_gray_is_luma_in_every_format(image_format):
    decoded = decode(encode(Image.fromarray(quarters()), image_format), channels=1)
    assert decoded.shape == (64, 64, 1)
    assert np.abs(decoded[..., 0] - quarters() @ LUMA).max() <= 1 + TOLERANCE.get(image_format, 0)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (41, 20), (20, 20)])
def test_any_size_becomes_the_square_that_was_asked_for(image_format, channels, height, width):
    content = encode(picture(height, width), image_format)
    decoded = decode_image(content, ImageOptions(image_size=20, channels=channels))
    assert decoded.shape == (20, 20, channels)
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize("image_format", FORMATS)
def test_gray_files_have_three_equal_channels_as_rgb(image_format):
    decoded = decode(encode(picture(64, 64), image_format))
    assert np.abs(decoded - np.asarray(picture(64, 64))[..., None]).max() <= TOLERANCE.get(image_format, 0)
    if image_format != "WEBP":  # it has colours only
        assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(image_format):
    first, second = picture(32, 32), Image.new("L", (32, 32), 255)
    content = encode(first, image_format, save_all=True, append_images=[second])
    with Image.open(io.BytesIO(content)) as written:
        assert written.n_frames == 2
    assert np.abs(decode(content, 32, 1)[..., 0] - np.asarray(first)).max() <= TOLERANCE.get(image_format, 0)


def test_the_format_is_recognized_from_the_content_alone():
    assert reason_of(encode(picture(8, 8).convert("RGB"), "PNG").replace(b"\x89PNG", b"\x88PNG")) == "not_an_image"


# By the EXIF standard: the sides of the upright picture at which the stored first row and first column are. A bar along
# the first half of the stored first row is then in these cells of a 4x4 grid.
BAR_CELLS = {
    1: {(0, 0), (0, 1)},  # top, left
    2: {(0, 3), (0, 2)},  # top, right
    3: {(3, 3), (3, 2)},  # bottom, right
    4: {(3, 0), (3, 1)},  # bottom, left
    5: {(0, 0), (1, 0)},  # left, top
    6: {(0, 3), (1, 3)},  # right, top
    7: {(3, 3), (2, 3)},  # right, bottom
    8: {(3, 0), (2, 0)},  # left, bottom
}


@pytest.mark.parametrize("orientation", BAR_CELLS)
@pytest.mark.parametrize(
    ("image_format", "size"), [("JPEG", 64), ("JPEG", 640), ("PNG", 64), ("WEBP", 64), ("TIFF", 64)]
)
def test_exif_orientation_puts_a_marked_corner_where_it_belongs(image_format, size, orientation):
    stored = np.zeros((size, 2 * size), np.uint8)
    stored[: size // 4, :size] = 255
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    decoded = decode(encode(Image.fromarray(stored), image_format, exif=exif), 16, 1)[..., 0]
    cells = decoded.reshape(4, 4, 4, 4).mean(axis=(1, 3))
    assert {tuple(map(int, cell)) for cell in np.argwhere(cells > 128)} == BAR_CELLS[orientation]


@pytest.mark.parametrize("size", [32, 100])
def test_shrinking_averages_as_lanczos_does(size):
    image = picture(300, 400, noise=20)
    reference = image.resize((size, size), Image.Resampling.LANCZOS)
    # Mean difference in pixel values; picking single pixels is off by the noise.
    assert difference(decode(encode(image, "PNG"), size, 1), reference) < 3
    assert difference(image.resize((size, size), Image.Resampling.NEAREST), reference) > 10


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_a_pattern_finer_than_the_result_becomes_its_mean(image_format):
    checkerboard = (np.indices((240, 240)).sum(axis=0) % 2 * 255).astype(np.uint8)
    decoded = decode(encode(Image.fromarray(checkerboard), image_format), 30, 1)
    assert np.abs(decoded - 127.5).max() <= 2


def test_growing_is_smooth():
    step = np.repeat(np.array([[50, 200]], np.uint8), 2, axis=0)
    decoded = decode(encode(Image.fromarray(step), "PNG"), 20, 1)[..., 0]
    assert np.diff(decoded, axis=1).max() < 50
    assert (np.abs(decoded[:, 0] - 50) < 20).all()
    assert (np.abs(decoded[:, -1] - 200) < 20).all()


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (256, 256, 32),
        (304, 400, 32),
        (300, 400, 32),
        (297, 393, 32),
        (1001, 1001, 250),
        (999, 1499, 125),
        (40, 40, 64),
    ],
)
def test_a_jpeg_and_a_png_of_one_picture_decode_alike(height, width, size):
    image = picture(height, width)
    jpeg, png = (decode(encode(image, image_format), size, 1) for image_format in ("JPEG", "PNG"))
    assert difference(jpeg, png) < 3


def test_crop_takes_the_middle_square():
    image = np.zeros((20, 60), np.uint8)
    image[:, 20:40] = 255
    middle = decode(encode(Image.fromarray(image), "PNG"), 20, 1, resize="crop")
    assert middle.min() == 255
    assert middle.flags.c_contiguous  # though nothing was resized: its bytes are hashed


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_pad_keeps_the_aspect_ratio_between_bars_of_the_background(image_format):
    image = Image.new("L", (640, 320), 90)
    decoded = decode(encode(image, image_format), 40, 1, resize="pad", background=7)[..., 0]
    assert (decoded[:10] == 7).all()
    assert (decoded[30:] == 7).all()
    assert (decoded[10:30] == 90).all()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_the_high_byte(image_format):
    values = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    content = encode(Image.fromarray(values), image_format, **({"compression": None} if image_format == "TIFF" else {}))
    np.testing.assert_array_equal(decode(content, 64, 1)[..., 0], values >> 8)


def test_16_bit_colour_keeps_the_high_byte():
    values = np.random.default_rng(0).integers(0, 2**16, (64, 64, 3), np.uint16)
    encoded, content = cv2.imencode(".png", values[..., ::-1])
    assert encoded
    np.testing.assert_array_equal(decode(content.tobytes()), values >> 8)


def test_a_palette_is_looked_up():
    image = Image.fromarray(quarters()).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    np.testing.assert_array_equal(decode(encode(image, "PNG")), quarters())


def test_one_bit_images_are_black_and_white():
    image = np.indices((64, 64)).sum(axis=0) % 2 == 0
    np.testing.assert_array_equal(decode(encode(Image.fromarray(image), "PNG"), 64, 1)[..., 0], image * 255)


@pytest.mark.parametrize(("background", "expected"), [(255, 135), (0, 8)])
def test_transparent_pixels_show_the_background(background, expected):
    image = Image.new("RGBA", (8, 8), (16, 16, 16, 128))
    decoded = decode(encode(image, "PNG"), 8, 3, background=background)
    assert np.abs(decoded - expected).max() <= 1


def test_transparency_is_white_unless_asked_otherwise():
    assert decode(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"), 8, 1).min() == 255


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_shows_the_background(image_format):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    decoded = decode(encode(image, image_format, transparency=0), 8, 3)
    assert (decoded[:, :4] == 255).all()
    assert (decoded[:, 4:] == (200, 0, 0)).all()


def test_gray_with_alpha_shows_the_background():
    assert decode(encode(Image.new("LA", (8, 8), (0, 0)), "PNG"), 8, 1, background=70).tolist() == [[[70]] * 8] * 8


def test_cmyk_jpeg_has_the_right_colours():
    image = Image.fromarray(quarters()).convert("CMYK")
    decoded = decode(encode(image, "JPEG"))
    assert np.abs(decoded - np.asarray(image.convert("RGB"), int)).max() <= 3


def test_bytes_after_the_end_of_a_jpeg_are_passed_over():
    content = encode(picture(32, 32), "JPEG")
    assert difference(decode(content + b"appended by a phone", 32, 1), picture(32, 32)) < 2


def test_no_bytes_are_empty():
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"%PDF-1.7\n",
        b"P5 and more text",
        b"Pyramids",
        b"\0" * 100,
        b"GIF",
        b"\xff",
    ],
)
def test_other_files_are_not_an_image(content):
    assert reason_of(content) == "not_an_image"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # that there is less than there should be
@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_that_was_cut_off_is_damaged(image_format, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encode(Image.fromarray(noise), image_format)
    assert reason_of(content[: int(len(content) * kept)]) == "damaged"


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


@pytest.mark.parametrize("header", [png_header, bmp_header])
def test_too_many_pixels_are_refused_by_the_header(header):
    assert reason_of(header(20_000, 20_000)) == "too_many_pixels"
    # The header is sound: it is the number that is refused. No pixels follow.
    assert reason_of(header(200, 200)) == "damaged"


@pytest.mark.parametrize("values", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)])
def test_pixels_without_a_fixed_range_are_unsupported(values):
    assert reason_of(encode(Image.fromarray(values), "TIFF", compression=None)) == "unsupported"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about tags that were broken here on purpose
@pytest.mark.parametrize("image_format", FORMATS)
def test_any_byte_may_be_wrong_or_missing(image_format):
    content = encode(picture(6, 7), image_format)
    options = ImageOptions(image_size=8)
    for position in range(len(content)):
        flipped = content[position] ^ 0xFF
        for broken in (content[:position], content[:position] + bytes([flipped]) + content[position + 1 :]):
            with contextlib.suppress(RejectedImageError):
                assert decode_image(broken, options).shape == (8, 8, 1)


@pytest.mark.parametrize("values", [{"image_size": 0}, {"image_size": 5000}, {"channels": 2}, {"background": 256}])
def test_options_outside_their_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ImageOptions(**values)
