"""
Reading any picture, refusing broken ones with a reason, and writing, cutting and laying out images.

Run     python -m pytest tests/test_images.py       # 3 s
"""
import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.images import cut, find, grid, read_image, resize, sheet, write_png

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, exif=exif)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, rows: bytes = b"", depth: int = 8) -> bytes:
    """A PNG file of so many pixels, whatever its rows hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


GRAY = PIXELS[..., 0]
AS_RGB = np.repeat(GRAY[..., None], 3, 2)
ALPHA = np.where(np.arange(30) < 15, 0, 255).astype(np.uint8)[None].repeat(20, 0)
SIXTEEN = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
FRAMES = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (200, 10)]
SIDEWAYS = {2: np.fliplr(PIXELS), 3: np.rot90(PIXELS, 2), 4: np.flipud(PIXELS), 5: PIXELS.transpose(1, 0, 2),
            6: np.rot90(PIXELS, -1), 7: np.rot90(PIXELS, 2).transpose(1, 0, 2), 8: np.rot90(PIXELS), 99: PIXELS}
GOOD = {        # file name -> (content, pixels)
    "rgb.png": (saved(RGB), PIXELS),
    "gray.png": (saved(Image.fromarray(GRAY)), AS_RGB),
    "16 bit gray.png": (saved(Image.fromarray(GRAY.astype(np.uint16) * 257)), AS_RGB),
    "16 bit color.png": (png(30, 20, SIXTEEN, depth=16), PIXELS),
    "1 bit.png": (saved(Image.fromarray(GRAY > 99)), np.where(AS_RGB > 99, 255, 0)),
    "alpha.png": (saved(Image.fromarray(np.dstack([PIXELS, ALPHA]))), np.where(ALPHA[..., None] == 0, 255, PIXELS)),
    "gray and clear.png": (saved(Image.fromarray(np.dstack([GRAY, 0 * GRAY]))), np.full_like(PIXELS, 255)),
    "palette.png": (saved(RGB.quantize(8)), np.array(RGB.quantize(8).convert("RGB"))),
    "cmyk.tif": (saved(RGB.convert("CMYK"), "TIFF"), np.array(RGB.convert("CMYK").convert("RGB"))),
    "animated.gif": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), np.array(FRAMES[0])),
    "animated.webp": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
                      np.array(FRAMES[0])),
    "a png inside.JPG": (saved(RGB), PIXELS),
    "Grüße 你好\ntwo lines.png": (saved(RGB), PIXELS),
    **{f"exif {number}.png": (turned(number), pixels) for number, pixels in SIDEWAYS.items()},
}
BAD = {         # file name -> (content, part of the reason)
    "truncated.png": (saved(RGB)[:700], "."),
    "truncated.jpg": (saved(RGB, "JPEG")[:-40], "truncated"),
    "empty.png": (b"", "cannot identify"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    "large.png": (png(12000, 12000), "12000x12000 is over 100 megapixels"),
    "bomb.png": (png(60000, 60000), "decompression bomb"),
    "few rows.png": (png(64, 64, b"\0" * 100), "."),
    "float.tif": (saved(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), "no known range"),
    "negative.tif": (saved(Image.fromarray(GRAY.astype(np.int32) - 300), "TIFF"), "outside 0..65535"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_of_every_kind_are_read(tmp_path, name):
    content, pixels = GOOD[name]
    (tmp_path / name).write_bytes(content)
    [(_, path)] = find(str(tmp_path), "hr_dir")
    image = read_image(path)
    assert image.dtype == np.uint8 and np.array_equal(image, pixels)
    image[:] = 0                                                        # the caller may write to it


@pytest.mark.parametrize("name", BAD)
def test_broken_pictures_are_refused_with_one_line(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_image(tmp_path / name)
    assert str(error.value) and "\n" not in str(error.value)


def test_any_bytes_are_a_picture_or_refused(tmp_path):
    rng = random.Random(0)
    starts = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF\x24\0\0\0WEBPVP8 ",
              b"P6 9 9 255\n", saved(RGB), saved(RGB, "JPEG"), saved(RGB, "TIFF"), saved(RGB, "WEBP")]
    for number in range(600):
        content = bytearray(starts[number % len(starts)] + rng.randbytes(50))
        for _ in range(number % 4):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            image = read_image(io.BytesIO(content))
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_what_is_called_a_picture_and_is_no_file(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")                                    # opening it would wait for ever
    (tmp_path / os.fsdecode(b"not \xff utf-8.png")).write_bytes(saved(RGB))
    listed = [path for _, path in find(str(tmp_path), "hr_dir")]        # all but the folder, so that they are named
    assert len(listed) == 4
    for path in [*listed, tmp_path]:
        with pytest.raises(ValueError, match="not a file|utf-8"):
            read_image(path)


def test_no_memory_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    def load(_):
        raise MemoryError
    write_png(tmp_path / "a.png", PIXELS)
    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


def test_a_folder_without_pictures_is_named(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit):
            find(str(folder), "hr_dir")
        assert f"error: hr_dir: {folder} " in capsys.readouterr().err
    assert all(Path(path).exists() for _, path in find("skimage", "hr_dir"))


def test_png_is_whole_and_repeatable(tmp_path):
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, PIXELS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.array_equal(read_image(tmp_path / "a.png"), PIXELS) and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(AssertionError):
        write_png(tmp_path / "c.png", PIXELS / 255)


def test_resize_of_float_is_that_of_uint8_to_rounding():
    for how in ("area", "bicubic", "lanczos"):
        small, exact = resize(PIXELS, (15, 10), how), resize(PIXELS.astype(float), (15, 10), how)
        assert small.shape == exact.shape == (10, 15, 3) and small.dtype == np.uint8
        assert np.abs(small - exact.clip(0, 255)).max() <= 2        # Pillow rounds twice
    assert np.allclose(resize(PIXELS.astype(float), (15, 10), "area"), PIXELS.reshape(10, 2, 15, 2, 3).mean((1, 3)))


def test_crops_are_even_inside_and_no_more_than_asked():
    image = np.arange(64 * 40 * 3, dtype=np.uint16).reshape(64, 40, 3)
    for side, limit in ((4, 100), (4, 3), (7, 5), (99, 4)):
        corners = grid(16, 10, side, limit)
        assert 1 <= len(corners) == len(set(corners)) <= limit
        for y, x in corners:
            assert 0 <= y <= max(0, 16 - side) and 0 <= x <= max(0, 10 - side)
            assert np.array_equal(cut(image, (y, x), side, 4), image[4 * y:4 * (y + side), 4 * x:4 * (x + side)])
    assert grid(16, 10, 4, 100)[0] == (0, 0) and grid(16, 10, 4, 100)[-1] == (12, 6)
    assert grid(8, 8, 8, 9) == [(0, 0)] and grid(9, 9, 3, 1) == [(3, 3)]


def test_a_sheet_shows_every_image_under_its_title():
    rows = [[np.full((8, 8, 3), value, np.uint8) for value in row] for row in ((10, 20), (30, 40), (50, 60))]
    for below in (None, [["a", "b"]] * 3):
        image = sheet(rows, ["LR", "HR"], cell=16, below=below)
        places = [np.argwhere((image == value).all(2)) for row in rows for value in [part[0, 0, 0] for part in row]]
        assert all(len(place) >= 256 for place in places)
        assert places[0][0, 0] < places[2][0, 0] < places[4][0, 0] and places[0][0, 1] < places[1][0, 1]
