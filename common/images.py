"""
Images: find, read, write, resize, cut, and lay out on a sheet. In memory they are uint8 [H, W, 3], RGB.

Float images are 0..1. Nothing is cropped at the border, and sizes are (height, width) unless said otherwise.
"""
import io
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from common.config import fail

MAX_PIXELS = 100_000_000
# nothing else is tried: some of Pillow's formats run other programs, whatever a file is called
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
# real photographs inside scikit-image's wheel: no drawings, masks, text pages, out-of-focus or tiny pictures
SKIMAGE = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
           "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
           "motorcycle_right.png", "retina.jpg", "rocket.jpg")
TEXTURES = ("brick", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon", "retina")     # of these, no scenes
SAME_SCENE = {"motorcycle_left": "motorcycle", "motorcycle_right": "motorcycle"}    # two cameras, one source
FILTERS = {"nearest": Image.NEAREST, "area": Image.BOX, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC,
           "lanczos": Image.LANCZOS}
BICUBIC = "bicubic"                 # LR up-sampled, which SR methods and policies are compared with
LUMA = np.array([0.299, 0.587, 0.114])      # ITU-R BT.601
HEADER = 18                         # px, height of the line of column titles
GAP = 4                             # px between cells


def listed(root: Path) -> list[Path]:
    """All pictures below a folder, by suffix; a broken link is one of them, so that it is named as skipped."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())


def find(folder: str, key: str) -> list[tuple[str, Path]]:
    """
    (source name, path) of every picture in a folder; `skimage`: the photographs in scikit-image's wheel and
    one in matplotlib's. Pictures of one source share a split. `key` is the setting that errors name.
    """
    if folder == "skimage":
        paths = [Path(skimage.__file__).parent / "data" / name for name in SKIMAGE]
        paths.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
        return [(SAME_SCENE.get(path.stem, path.stem), path) for path in paths]
    root = Path(folder)
    if not root.is_dir():
        fail(f"{key}: {root} is not a folder: give a folder of pictures")
    paths = listed(root)
    if not paths:
        fail(f"{key}: {root} holds no picture ({' '.join(SUFFIXES)}): give a folder of pictures")
    return [(path.relative_to(root).with_suffix("").as_posix(), path) for path in paths]


def read_image(file: str | Path | io.BytesIO) -> np.ndarray:
    """
    Read a picture (a path, or what is in the file) of one of the FORMATS as uint8 [H, W, 3] RGB: EXIF rotation applied,
    16 bit scaled to 8, alpha over white, first frame of an animation.

    Raises ValueError with a one-line reason if it is not a whole image. MemoryError says nothing about the picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # our own size limit is checked below
        try:
            if not isinstance(file, io.BytesIO):
                str(file).encode()                          # JSON cannot hold a name that is not UTF-8
                if not Path(file).is_file():                # a folder, a pipe, a broken link
                    raise ValueError("it is not a file, or leads to none")
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS // 10**6} megapixels")
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
        except MemoryError:
            raise
        except Exception as error:                          # on broken files Pillow's decoders raise almost anything
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> np.ndarray:
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
    """Write any picture as an RGB PNG, and return its (height, width); ValueError names what is not a whole image."""
    try:
        pixels = read_image(source)
    except ValueError as error:
        raise ValueError(f"{source} cannot be read ({error})") from error
    write_png(target, pixels)
    return pixels.shape[:2]


def resize(image: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """[H, W, 3] to size (width, height), anti-aliased; how: a key of FILTERS. uint8 stays uint8."""
    if image.dtype == np.uint8:
        return np.array(Image.fromarray(image).resize(size, FILTERS[how]))
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image, 2, 0).astype(np.float32)]
    return np.stack([np.asarray(channel.resize(size, FILTERS[how])) for channel in channels], axis=2)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 0..255 or float 0..1 -> float64 0..1."""
    return image / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)


def luma(image: np.ndarray) -> np.ndarray:
    """Brightness of [H, W, 3] in its own range, float64 [H, W]."""
    return image @ LUMA


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float 0..1 (clipped) -> uint8."""
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)


def to_pixels(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in 0..1 -> uint8 [B, H, W, 3]."""
    return images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3], or one image [H, W, 3] -> [B, 3, H, W] in 0..1."""
    return torch.from_numpy(images if images.ndim == 4 else images[None]).permute(0, 3, 1, 2).float().div(255)


def turn(images: Tensor, which: int) -> Tensor:
    """One of the eight symmetries of the square, or of the four of a rectangle; which: 0..7."""
    square = images.shape[-1] == images.shape[-2]
    images = images.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if which & bit])
    return (images.transpose(-1, -2) if which & 4 and square else images).contiguous()


def grid(height: int, width: int, side: int, limit: int) -> list[tuple[int, int]]:
    """Corners (y, x) of at most `limit` crops of side x side px, evenly over the image; in LR px."""
    rows, columns = math.ceil(height / side), math.ceil(width / side)
    if rows * columns > limit:
        rows = max(1, min(rows, limit, round(math.sqrt(limit * rows / columns))))
        columns = min(columns, limit // rows)
    corners = [np.linspace(0, max(0, length - side), count).round().astype(int) if count > 1 else
               [max(0, length - side) // 2] for length, count in ((height, rows), (width, columns))]
    return [(int(y), int(x)) for y in corners[0] for x in corners[1]]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. count - 1, evenly spaced: some of a long list."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def cut(image: np.ndarray, corner: tuple[int, int], side: int, scale: int) -> np.ndarray:
    """[scale * side, scale * side, 3] of an SR image at `corner` (y, x) of its LR image, LR px; scale 1: of LR."""
    y, x = (scale * place for place in corner)
    return np.ascontiguousarray(image[y:y + scale * side, x:x + scale * side])


def sheet(rows: list[list[np.ndarray]], titles: list[str], cell: int = 192,
          below: list[list[str]] | None = None) -> np.ndarray:
    """
    Rows of uint8 images under column titles, enlarged to cell x cell px by repetition: uint8 [H, W, 3].

    below: a line of text under each image, or several.
    """
    lines = max((text.count("\n") + 1 for row in below or [] for text in row), default=0)
    height = cell + GAP + HEADER * lines
    canvas = Image.new("RGB", (len(titles) * (cell + GAP) + GAP, HEADER + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for x, title in enumerate(titles):
        draw.text((GAP + x * (cell + GAP), 1), title, fill="black", font=font)
        for y, row in enumerate(rows):
            tile = Image.fromarray(row[x]).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (GAP + x * (cell + GAP), HEADER + y * height))
            if below is not None:
                at = GAP + x * (cell + GAP), HEADER + y * height + cell
                draw.text(at, below[y][x], fill="black", font=font, spacing=0)
    return np.asarray(canvas)
