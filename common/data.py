"""Images and preference groups on disk. Every image in memory is uint8 [H, W, 3], RGB."""
import hashlib
import io
import os
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common import group_file, run
from common.group_file import AXES, SPLITS              # scripts say data.AXES

MAX_PIXELS = 100_000_000
REBUILD = "build the data set again with 01_build_dataset.py into another run= folder"
# nothing else is tried: some of Pillow's formats run other programs, whatever a file is called
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# everything that Pillow's decoders let through on broken files
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError,
                 ArithmeticError, AttributeError, Image.DecompressionBombError)


def read_image(path: str | Path | io.BytesIO) -> np.ndarray:
    """
    Read a picture (a path, or what is in the file) of one of the FORMATS as uint8 [H, W, 3] RGB: EXIF rotation applied,
    16 bit scaled to 8, alpha over white, first frame of an animation. Raises ValueError with a one-line reason if it is
    not a whole image. No memory stays a MemoryError: it says nothing about the picture.
    """
    if not isinstance(path, io.BytesIO) and not is_regular(path):
        raise ValueError("it is not a file, or leads to none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # our own size limit is checked below
        try:
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS // 10**6} megapixels")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
        except DECODE_ERRORS as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def is_regular(path: str | Path) -> bool:
    """Whether reading it can end: no folder, no pipe, no link to nowhere or to itself, and a name in UTF-8."""
    try:
        str(path).encode()
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return True                                         # opening it says so
    except (OSError, ValueError):
        return False


def _to_rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] of any Pillow mode."""
    if image.mode.startswith("I"):                                        # 16-bit gray: I;16, I;16B or I
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("integer pixels outside 0..65535")
        gray = np.round(gray / 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3]; the file appears whole or not at all. Same pixels give the same bytes."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def copy_png(source: str | Path, target: str | Path) -> tuple[int, int]:
    """
    An RGB PNG keeps its bytes; anything else becomes one, with the pixels of read_image. Returns (height, width);
    ValueError that names the file if it is not a whole image.
    """
    try:
        pixels = read_image(source)
    except ValueError as error:
        raise ValueError(f"{source} cannot be read ({error})") from error
    with Image.open(source) as image:
        as_is = image.format == "PNG" and image.mode == "RGB" and np.array_equal(np.array(image), pixels)
    if as_is:                                               # not so if EXIF turns it, or it has a transparent color
        run.write_bytes(Path(target), Path(source).read_bytes())
    else:
        write_png(target, pixels)
    return pixels.shape[:2]


def load_groups(folder: str | Path, split: str) -> list[dict]:
    """
    Groups of one split ("train", "val", "test") of a finished stage 01, in file order. Stops with one line if
    groups.jsonl is damaged, a file is missing, or the split is empty.
    """
    assert split in SPLITS, split
    groups = [group for group in all_groups(folder) if group["split"] == split]
    if not groups:
        run.fail(f"{Path(folder) / 'groups.jsonl'} has no group in the split {split!r}: build one with more "
                 "photographs or groups")
    return groups


def all_groups(folder: str | Path) -> list[dict]:
    """Groups of all splits of a finished stage 01, in file order; stops like load_groups."""
    path = Path(folder) / "groups.jsonl"
    try:
        return group_file.read_groups(Path(folder))
    except FileNotFoundError:
        run.fail(f"{path} is missing: {REBUILD}")
    except ValueError as error:
        run.fail(f"{path} {error}: {REBUILD}")


def read_checked(path: Path, wanted: str | None) -> np.ndarray:
    """read_image of a file that has to have the sha256 `wanted`; stops with one line. None: any."""
    try:
        content = path.read_bytes()
        if wanted and hashlib.sha256(content).hexdigest() != wanted:
            raise ValueError("its checksum is not the one of groups.jsonl")
        return read_image(io.BytesIO(content))
    except (OSError, ValueError) as error:
        run.fail(f"{path} cannot be read ({error}): {REBUILD}")


def group_images(folder: str | Path, group: dict) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """(lr [h, w, 3], candidates K times [H, W, 3], hr [H, W, 3] or None) of one group, uint8."""
    folder, sums = Path(folder), group.get("sha256", {})
    images = [read_checked(folder / name, sums.get(name)) for name in group_file.files_of(group)]
    count = len(group["candidates"])
    return images[0], images[1:1 + count], images[1 + count] if group["hr"] else None
