"""
Reading any picture, refusing broken ones with a reason, and the groups of stage 01.

Run     python -m pytest tests/test_data.py        # 5 s
"""
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.groups import group_images, load_groups
from common.images import read_image, write_png

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6                                                          # turn by 90 degrees to view
    return saved(RGB, format="PNG", exif=exif)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, body=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def palette():
    image = RGB.quantize(8)
    return saved(image, format="PNG"), np.array(image.convert("RGB"))


GRAY = PIXELS[..., 0]
CLEAR = np.dstack([PIXELS, np.where(np.arange(30) < 15, 0, 255)[None].repeat(20, 0)]).astype(np.uint8)
OVER_WHITE = np.where(CLEAR[..., 3:] == 0, 255, PIXELS).astype(np.uint8)
FRAMES = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (200, 10)]
GOOD = {
    "rgb.png": (saved(RGB, format="PNG"), PIXELS),
    "gray.png": (saved(Image.fromarray(GRAY), format="PNG"), np.repeat(GRAY[..., None], 3, 2)),
    "sixteen.png": (saved(Image.fromarray(GRAY.astype(np.uint16) * 257), format="PNG"),
                    np.repeat(GRAY[..., None], 3, 2)),
    "sixteen.tif": (saved(Image.fromarray(GRAY.astype(np.uint16) * 257), format="TIFF"),
                    np.repeat(GRAY[..., None], 3, 2)),
    "alpha.png": (saved(Image.fromarray(CLEAR), format="PNG"), OVER_WHITE),
    "palette.png": palette(),
    "one_bit.png": (saved(Image.fromarray(GRAY > 99), format="PNG"),
                    np.repeat((GRAY > 99)[..., None], 3, 2).astype(np.uint8) * 255),
    "cmyk.tif": (saved(RGB.convert("CMYK"), format="TIFF"), np.array(RGB.convert("CMYK").convert("RGB"))),
    "rotated.png": (rotated(), np.rot90(PIXELS, -1)),
    "animated.gif": (saved(FRAMES[0], format="GIF", save_all=True, append_images=FRAMES[1:]),
                     np.full((9, 9, 3), 200, np.uint8)),
    "dot.png": (saved(Image.fromarray(PIXELS[:1, :1]), format="PNG"), PIXELS[:1, :1]),
    "png_inside.jpg": (saved(RGB, format="PNG"), PIXELS),
}
BAD = {
    "truncated.png": (GOOD["rgb.png"][0][:700], "."),
    "truncated.jpg": (saved(RGB, format="JPEG")[:400], "(?i)truncated"),
    "zero_bytes.png": (b"", "cannot identify"),
    "text.png": (b"<html>not found</html>", "cannot identify"),
    "bomb.png": (png(12000, 12000), "12000x12000 is over 100 megapixels"),
    "huge_bomb.png": (png(60000, 60000), "decompression bomb"),
    "short.png": (png(64, 64, b"\0" * 100), "."),
    "float.tif": (saved(Image.fromarray(GRAY.astype(np.float32)), format="TIFF"), "no known range"),
    "negative.tif": (saved(Image.fromarray(GRAY.astype(np.int32) - 300), format="TIFF"), "outside 0..65535"),
}


@pytest.mark.parametrize("name", GOOD)
def test_reads(tmp_path, name):
    content, pixels = GOOD[name]
    (tmp_path / name).write_bytes(content)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == pixels.shape and np.array_equal(image, pixels)
    image[:] = 0                                                             # the caller may write to it


def test_reads_16_bit_color_and_palette_with_transparency(tmp_path):
    image = RGB.quantize(8)
    image.info["transparency"] = 0
    image.save(tmp_path / "clear.png")
    white = np.array(image) == 0
    assert white.any() and (read_image(tmp_path / "clear.png")[white] == 255).all()
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                        + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))
    assert np.array_equal(read_image(tmp_path / "deep.png"), PIXELS)


@pytest.mark.parametrize("name", BAD)
def test_refuses_with_one_line(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_image(tmp_path / name)
    assert str(error.value) and "\n" not in str(error.value)


def test_refuses_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(ValueError):
            read_image(path)


def test_png_is_whole_and_repeatable(tmp_path):
    write_png(tmp_path / "a.png", PIXELS)
    write_png(tmp_path / "b.png", PIXELS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.array_equal(read_image(tmp_path / "a.png"), PIXELS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(AssertionError):
        write_png(tmp_path / "c.png", PIXELS / 255)


@pytest.fixture
def stage01(tmp_path):
    """A hand-written data set: one group in train, one without ground truth in test."""
    for name in ("lr", "hr", "c0", "c1"):
        write_png(tmp_path / f"{name}.png", PIXELS[:4, :4] if name == "lr" else PIXELS[:16, :16])
    group = {"id": "train_00000", "split": "train", "source": "x", "scale": 4, "lr": "lr.png", "hr": "hr.png",
             "degradation": {}, "candidates": [{"id": f"c{k}", "path": f"c{k}.png", "method": "m"} for k in range(2)],
             "labels": {"overall": {"ranks": [1, 2], "scores": [0.9, 0.1], "source": "proxy", "votes": None}}}
    bare = group | {"id": "test_00000", "split": "test", "hr": None, "labels": {}}
    (tmp_path / "groups.jsonl").write_text(f"{json.dumps(group)}\n{json.dumps(bare)}\n")
    return tmp_path


def test_groups(stage01):
    groups = load_groups(stage01, "train")
    assert [group["id"] for group in groups] == ["train_00000"]
    lr, candidates, hr = group_images(stage01, groups[0])
    assert lr.shape == (4, 4, 3) and [c.shape for c in candidates] == [(16, 16, 3)] * 2 and hr.shape == (16, 16, 3)
    assert group_images(stage01, load_groups(stage01, "test")[0])[2] is None


@pytest.mark.parametrize("old, new, words", [
    ('"id": "train_00000"', '"id" "train_00000"', "line 1 is not JSON"),
    ('"source": "x", ', "", "line 1: key 'source' is missing"),
    ('"split": "train"', '"split": "trian"', "'trian' is not one of train, val, test"),
    ('"ranks": [1, 2]', '"ranks": [1]', "labels of 'overall' do not fit the 2 candidates"),
    ('"overall"', '"beauty"', "labels of 'beauty'"),
    ('"method": "m"', '"name": "m"', "key 'method' is missing in a candidate"),
    ('"lr.png"', '"gone.png"', "gone.png is missing"),
    ('"split": "train"', '"split": "val"', "no group in the split 'train'"),
])
def test_damaged_groups_get_one_line(stage01, capsys, old, new, words):
    path = stage01 / "groups.jsonl"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(SystemExit) as stop:
        load_groups(stage01, "train")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_missing_groups_and_damaged_images_get_one_line(stage01, capsys):
    groups = load_groups(stage01, "train")
    (stage01 / "c1.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        group_images(stage01, groups[0])
    (stage01 / "groups.jsonl").unlink()
    with pytest.raises(SystemExit):
        load_groups(stage01, "train")
    first, second = capsys.readouterr().err.splitlines()
    assert "c1.png cannot be read" in first and "groups.jsonl is missing" in second
