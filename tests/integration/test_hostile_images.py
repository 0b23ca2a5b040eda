"""Every kind of image file that a folder may hold, made with real encoders: each is decoded correctly or rejected."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.manifest import SPLITS
from data_prep.prepare import PrepareConfig, prepare
from tests.conftest import read_split

SIZE = 32
# Dark at the top left and bright at the bottom right, with a black square in the top left corner: what is turned,
# mirrored, cut or scaled wrongly does not look like it.
ROWS, COLUMNS = np.mgrid[:96, :128]
GRAY = (60 + ROWS + COLUMNS * 0.7).astype(np.uint8)
GRAY[:24, :32] = 0
PICTURE = Image.fromarray(GRAY)
EXPECTED = np.asarray(PICTURE.resize((SIZE, SIZE), Image.Resampling.BOX), np.int16)
# How to turn an upright picture so that each EXIF orientation turns it back (EXIF 2.3, tag 0x0112).
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def with_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_transparent_half() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.fromarray(np.full((96, 128), 255, np.uint8)))
    return image


def good_files() -> Iterator[tuple[str, bytes]]:
    color = PICTURE.convert("RGB")
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif"), ("WEBP", "webp")):
        yield f"rgb.{suffix}", encode(color, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
        if kind != "WEBP":
            yield f"gray.{suffix}", encode(PICTURE, kind, **({"quality": 95} if kind == "JPEG" else {}))
    yield "gray.gif", encode(PICTURE, "GIF")
    yield "palette.png", encode(color.quantize(256), "PNG")
    yield "palette.bmp", encode(color.quantize(256), "BMP")
    yield "palette.tif", encode(color.quantize(256), "TIFF")
    yield "alpha.png", encode(with_transparent_half(), "PNG")
    yield "gray-alpha.png", encode(with_transparent_half().convert("LA"), "PNG")
    yield "alpha.tif", encode(with_transparent_half(), "TIFF")
    yield "alpha.webp", encode(with_transparent_half(), "WEBP", lossless=True)
    yield "16-bit.png", encode(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG")
    yield "16-bit.tif", encode(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF")
    # The values of all images with more than 8 bits share one range, which is 16 bits here.
    yield "32-bit.tif", encode(Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF")
    yield "float.tif", encode(Image.fromarray(GRAY.astype(np.float32) * 257), "TIFF")
    yield "12-bit-by-its-header.png", b"P5 128 96 4095 " + (GRAY.astype(np.uint16) * 16).byteswap().tobytes()
    for kind in ("PPM", "TGA", "JPEG2000", "AVIF"):
        yield f"really-{kind}.png", encode(color, kind)
    yield "really-ICO.png", encode(color, "ICO", sizes=[color.size])
    yield "several.jpg", encode(color, "MPO", save_all=True, append_images=[Image.new("RGB", color.size)], quality=95)
    yield "cmyk.jpg", encode(color.convert("CMYK"), "JPEG", quality=95)
    yield "cmyk.tif", encode(color.convert("CMYK"), "TIFF")
    yield "progressive.jpg", encode(color, "JPEG", quality=95, progressive=True)
    yield "no-subsampling.jpg", encode(color, "JPEG", quality=95, subsampling=0)
    yield "interlaced.gif", encode(PICTURE, "GIF", interlace=1)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"{compression}.tiff", encode(color, "TIFF", compression=compression)
    yield "lossless.webp", encode(color, "WEBP", lossless=True)
    frames = [PICTURE, Image.new("L", PICTURE.size, 255)]
    for kind, suffix in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")):
        yield (
            f"animated.{suffix}",
            encode(
                frames[0], kind, save_all=True, append_images=frames[1:], **{"lossless": True} if kind == "WEBP" else {}
            ),
        )
    for orientation, turn in ORIENTATIONS.items():
        yield (
            f"turned-{orientation}.jpg",
            encode(color.transpose(turn), "JPEG", quality=95, exif=with_exif(orientation)),
        )
    yield "turned.png", encode(PICTURE.transpose(ORIENTATIONS[6]), "PNG", exif=with_exif(6))
    yield "turned.webp", encode(color.transpose(ORIENTATIONS[8]), "WEBP", lossless=True, exif=with_exif(8))
    yield "padded.jpg", encode(color, "JPEG", quality=95) + b"\0" * 512
    yield "with-something-behind.jpg", encode(color, "JPEG", quality=95) + b"MOTION PHOTO" * 20
    yield "really-a-png.jpg", encode(PICTURE, "PNG")
    yield "UPPER CASE.JPG", encode(color, "JPEG", quality=95)
    plain = encode(PICTURE, "PNG")
    for name in (
        "with spaces.png",
        "日本語 né.png",
        "new\nline.png",
        "-dash.png",
        "a%20b.png",
        "#hash?.png",
        "[x]*.png",
    ):
        yield name, plain
    yield "x" * 200 + ".png", plain
    yield "deep/er/nested.png", plain


def bomb_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_files() -> Iterator[tuple[str, bytes, set[str]]]:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
    yield "empty.jpg", b"", {"empty"}
    yield "page.jpg", b"<!doctype html><title>404</title>", {"not_an_image"}
    yield "text.png", b"just text\n", {"not_an_image"}
    yield "archive.gif", b"PK\x03\x04" + b"\0" * 100, {"not_an_image"}
    yield "random.webp", np.random.default_rng(1).bytes(4000), {"not_an_image"}
    yield "drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"not_an_image"}
    for kind, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("BMP", "bmp"),
        ("GIF", "gif"),
        ("TIFF", "tif"),
        ("WEBP", "webp"),
    ):
        content = encode(noisy, kind)
        yield f"half.{suffix}", content[: len(content) // 2], {"damaged", "not_an_image"}
        yield f"header.{suffix}", content[:30], {"damaged", "not_an_image"}
    for kind, suffix in (("PNG", "png"), ("TIFF", "tif")):
        content = bytearray(encode(noisy, kind, **({"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {})))
        content[len(content) // 2] ^= 0xFF
        yield f"flipped-bit.{suffix}", bytes(content), {"damaged", "not_an_image"}
    yield "bomb.png", bomb_png(60_000, 60_000), {"too_many_pixels"}
    yield "wide-bomb.png", bomb_png(2_000_000_000, 1), {"too_many_pixels"}
    bmp = bytearray(encode(Image.new("L", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    yield "bomb.bmp", bytes(bmp), {"too_many_pixels"}
    gif = bytearray(encode(Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    yield "bomb.gif", bytes(gif), {"too_many_pixels"}
    lossless = encode(Image.fromarray(GRAY), "JPEG")
    yield "12-bit.jpg", lossless.replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc0\0\x0b\x0c"), {"unsupported"}
    yield "photo-of-a-phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), {"unsupported"}
    yield "drawing-by-a-program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n(rm) run\n", {"unsupported"}
    yield "all-nan.tif", encode(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), {"unsupported"}
    for kind in ("PPM", "TGA", "JPEG2000", "AVIF", "ICO"):
        content = encode(noisy, kind)
        yield f"half-{kind}.png", content[: len(content) // 2], {"damaged"}
        yield f"header-{kind}.png", content[:17], {"damaged", "not_an_image"}
    yield (
        "bomb-tga.png",
        struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 60_000, 60_000, 24, 0),
        {"too_many_pixels"},
    )
    yield "bomb-pgm.png", b"P5 60000 60000 255 ", {"too_many_pixels"}


@pytest.fixture(scope="module")
def prepared(resources, tmp_path_factory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("prepared") / "dataset"
    for name, content in [*good_files(), *((name, content) for name, content, _ in bad_files())]:
        path = source / "hostile" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (source / "plain").mkdir()
    for index in range(4):
        Image.fromarray(np.full((9, 9), 60 * index, np.uint8)).save(source / "plain" / f"{index}.png")
    (source / "hostile" / ".hidden.png").write_bytes(encode(PICTURE, "PNG"))
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "._x.png").write_bytes(b"resource fork")
    (source / "hostile" / "loop").symlink_to(source / "hostile")
    (source / "hostile" / "gone.png").symlink_to(source / "nowhere.png")
    prepare(str(source), str(target), PrepareConfig(image_size=SIZE, max_bad_fraction=0.9))
    return target


@pytest.fixture(scope="module")
def stored(prepared) -> dict[str, np.ndarray]:
    images = {}
    for split in SPLITS:
        rows = read_split(prepared, split)
        images |= {path: image[..., 0] for path, image in zip(rows["path"], rows["image"], strict=True)}
    return images


@pytest.fixture(scope="module")
def rejected(prepared) -> dict[str, str]:
    table = pq.read_table(prepared / "rejected.parquet").to_pydict()
    return dict(zip(table["path"], table["reason"], strict=True))


def test_the_corpus_is_large_enough():
    assert len(list(good_files())) + len(list(bad_files())) >= 60


@pytest.mark.parametrize("name", [name for name, _ in good_files()])
def test_a_good_file_shows_the_picture(stored, name):
    difference = np.abs(stored[f"hostile/{name}"].astype(np.int16) - EXPECTED)
    assert difference.mean() < 2
    assert np.percentile(difference, 95) < 8


@pytest.mark.parametrize(("name", "reasons"), [(name, reasons) for name, _, reasons in bad_files()])
def test_a_bad_file_is_listed_with_its_reason(stored, rejected, name, reasons):
    assert rejected[f"hostile/{name}"] in reasons
    assert f"hostile/{name}" not in stored


def test_hidden_files_and_loops_are_passed_over(stored, rejected):
    names = {name for name, _ in good_files()}
    assert {path.removeprefix("hostile/") for path in stored if path.startswith("hostile/")} == names
    assert not any("hidden" in path or "MACOSX" in path or "loop" in path for path in rejected)
