"""LR and HR images of stage 01 as tensors, and pictures that show restorations side by side."""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common import data, metrics, run

HEADER = 18                         # px, height of the line of column titles
GAP = 4                             # px between cells


@lru_cache(maxsize=4096)
def read_pixels(path: Path, sha256: str | None) -> np.ndarray:
    return data.read_checked(path, sha256)


def load(source: Path, groups: list[dict], key: str) -> Tensor:
    """The "lr" or "hr" images of stage 01's groups, all of one size: [B, 3, height, width] in 0..1."""
    pixels = np.stack([read_pixels(source / group[key], group.get("sha256", {}).get(group[key])) for group in groups])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()


def require_one_size(source: Path, groups: list[dict]) -> None:
    """Stop unless all LR images have one size and scale, as batches need; only imports can mix them."""
    first = None
    for group in groups:
        with Image.open(source / group["lr"]) as image:         # the header alone
            size = f"{image.width}x{image.height}, scale {group['scale']}"
        first = first or size
        if size != first:
            run.fail(f"{source / group['lr']} is {size}, but {groups[0]['lr']} is {first}: 04 and 05 need LR images of "
                     "one size and scale; import each into its own run=")


def judged_on(source: Path) -> dict[str, int]:
    """hr_size (px) and scale of the images that the judge learned on, as they are: an import ignores the settings."""
    group = data.load_groups(source, "train")[0]
    with Image.open(source / group["lr"]) as image:
        return {"hr_size": image.width * group["scale"], "scale": group["scale"]}


def held_out(image: np.ndarray, lr: np.ndarray, hr: np.ndarray) -> tuple[float, float, float]:
    """The proxy label of a restored uint8 image [H, W, 3]: sqrt(consistency x naturalness), and these two; 0 to 1."""
    consistency, naturalness = metrics.proxy_consistency(image, hr, lr), metrics.proxy_naturalness(image, hr)
    return (consistency * naturalness) ** 0.5, consistency, naturalness


def to_pixels(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in 0..1 -> uint8 [B, H, W, 3]."""
    return images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def turn(images: Tensor, which: int) -> Tensor:
    """One of the eight symmetries of the square, or of the four of a rectangle; which: 0..7."""
    square = images.shape[-1] == images.shape[-2]
    images = images.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if which & bit])
    return (images.transpose(-1, -2) if which & 4 and square else images).contiguous()


def sheet(rows: list[list[np.ndarray]], titles: list[str], cell: int = 192,
          below: list[list[str]] | None = None) -> np.ndarray:
    """
    Rows of uint8 images under column titles, enlarged to cell x cell px by repetition: uint8 [H, W, 3].

    below: a line of text under each image.
    """
    height = cell + GAP + HEADER * (below is not None)
    canvas = Image.new("RGB", (len(titles) * (cell + GAP) + GAP, HEADER + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for x, title in enumerate(titles):
        draw.text((GAP + x * (cell + GAP), 1), title, fill="black", font=font)
        for y, row in enumerate(rows):
            tile = Image.fromarray(row[x]).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (GAP + x * (cell + GAP), HEADER + y * height))
            if below is not None:
                draw.text((GAP + x * (cell + GAP), HEADER + y * height + cell), below[y][x], fill="black", font=font)
    return np.asarray(canvas)
