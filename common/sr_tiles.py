"""
Restore an image of any size with an SR policy, in overlapping tiles where it is larger than one, without a seam.

The whole image has one first latent. In each denoising step tiles predict their parts of it; where they overlap the
predictions are averaged with smooth weights, and all go on from one latent (MultiDiffusion, arXiv 2302.08113, eq. 5).
Decoding averages pixels likewise. The outer quarter of an overlap counts for nothing: there a tile sees the padding of
convolutions. With one tile this is sr_policy.restore, to the bit.

Shapes: h w size of LR, H W = s h, s w size of SR; boxes and their sides in LR px. A latent, what the policy sees of LR,
and SR have sides that are a fixed multiple of those of LR.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import sr_policy
from common.sr_pipelines import LatentSampler
from common.sr_policy import Policy

MARGIN = 0.25                           # share of an overlap, at a tile's border, that has no weight


@dataclass(frozen=True)
class Tiles:
    size: tuple[int, int]               # h, w of the padded LR image
    side: tuple[int, int]               # h, w of all tiles
    overlap: int                        # at least, between neighbors
    corners: list[tuple[int, int]]      # y, x


def starts(length: int, side: int, overlap: int, multiple: int) -> list[int]:
    """Where tiles of `side` begin so that they cover `length`, evenly spread; all are multiples of `multiple`."""
    count = 1 if length <= side else math.ceil((length - overlap) / (side - overlap))
    last = max(0, length - side) // multiple
    return [multiple * (last * i // max(1, count - 1)) for i in range(count)]


def cut_into_tiles(height: int, width: int, *, tile: int, overlap: int, multiple: int) -> Tiles:
    """Tiles of an LR image; `tile` and `overlap` are rounded up to multiples of `multiple`, as its sides are."""
    tile, overlap = (math.ceil(length / multiple) * multiple for length in (max(tile, 1), overlap))
    overlap = min(overlap, tile // 2 // multiple * multiple)                    # weights of a tile's two ends
    side = min(tile, height), min(tile, width)
    rows, columns = (starts(*lengths, overlap, multiple) for lengths in ((height, side[0]), (width, side[1])))
    return Tiles((height, width), side, overlap, [(y, x) for y in rows for x in columns])


def weights(start: int, side: int, length: int, overlap: int) -> Tensor:
    """[side] of a tile along one axis: rising from 0 to 1 over an overlap, but at the ends of the image 1."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / max(overlap, 1)
    rise = (math.pi / 2 * ((place - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)).sin() ** 2
    found = torch.ones(side, dtype=torch.float64)
    if overlap and start > 0:
        found *= rise
    if overlap and start + side < length:
        found *= rise.flip(0)
    return found.float()


def cut(image: Tensor, tiles: Tiles, corners: list[tuple[int, int]]) -> Tensor:
    """The tiles at `corners` of an image [1, C, k h, k w] (k may be a fraction): [B, C, ..]."""
    (h, w), (side_h, side_w) = image.shape[-2:], tiles.side
    (y_from, y_side), (x_from, x_side) = ((length / whole, side * length // whole) for length, whole, side in
                                          ((h, tiles.size[0], side_h), (w, tiles.size[1], side_w)))
    return torch.cat([image[..., round(y * y_from):round(y * y_from) + y_side,
                            round(x * x_from):round(x * x_from) + x_side] for y, x in corners])


@dataclass
class Tiled:
    """A policy as sr_policy.restore takes it, whose steps and decoding are blended from tiles of one LR image."""
    policy: Policy
    tiles: Tiles
    batch: int                          # tiles at a time
    bar: tqdm

    def __post_init__(self):
        self.sampler, self.levels = self.policy.sampler, self.policy.levels

    def observe(self, lr: Tensor, key: tuple) -> Tensor:
        """What the policy is told of LR [1, 3, h, w]; an autoencoder reads it in tiles, others at once."""
        if not reads_tiles(self.policy) or len(self.tiles.corners) == 1:
            return self.policy.observe(lr, [key])
        return blend(lambda at: self.policy.observe(cut(lr, self.tiles, at), [(*key, *corner) for corner in at]), self)

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise of a state x [1, C, h, w] before denoising step `index` [1]."""
        both = blend(lambda at: torch.cat(self.policy.predict(cut(x, self.tiles, at), index.expand(len(at)),
                                                              cut(seen, self.tiles, at)), 1), self)
        return both.chunk(2, 1)

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        """Clean latent [1, C, h, w] -> SR [1, 3, H, W] in 0..1, on the CPU: it may be large."""
        return blend(lambda at: self.policy.decode(cut(latent, self.tiles, at), cut(seen, self.tiles, at)).cpu(), self)


def reads_tiles(policy: Policy) -> bool:
    """Whether the policy encodes LR at the size of SR, which is too much at once for a large image: sd3."""
    return isinstance(policy.sampler, LatentSampler) and policy.sampler.policy == "sd3"


def blend(make: Callable[[list[tuple[int, int]]], Tensor], tiled: Tiled) -> Tensor:
    """One image [1, C, k h, k w] from make(corners) -> [B, C, k side], called for some tiles at a time."""
    tiles, total = tiled.tiles, None
    for i in range(0, len(tiles.corners), tiled.batch):
        corners = tiles.corners[i:i + tiled.batch]
        made = make(corners)
        if total is None:
            k = made.shape[-1] / tiles.side[1]
            size = [round(length * k) for length in tiles.size]
            total, sums = made.new_zeros(made.shape[1], *size), made.new_zeros(*size)
        for (y, x), piece in zip(corners, made):
            y, x, (height, width) = round(y * k), round(x * k), piece.shape[-2:]
            down, across = (weights(at, length, whole, round(tiles.overlap * k)).to(made.device)
                            for at, length, whole in zip((y, x), (height, width), size))
            weight, place = down[:, None] * across, (slice(y, y + height), slice(x, x + width))
            total[:, *place] += weight * piece
            sums[place] += weight
        tiled.bar.update(len(corners))
    return (total / sums)[None]


def pad(lr: np.ndarray, multiple: int) -> np.ndarray:
    """Reflect [h, w, 3] at its lower and right side until both sides are multiples; one pixel is repeated."""
    below, right = (-length % multiple for length in lr.shape[:2])
    return np.pad(lr, ((0, below), (0, right), (0, 0)), mode="reflect")


@torch.no_grad()
def restore(policy: Policy, lr: np.ndarray, key: tuple, *, tile: int, overlap: int, batch: int) -> Tensor:
    """
    SR [1, 3, H, W] in 0..1, on the CPU, of one LR image uint8 [h, w, 3] of any size.

    tile, overlap: LR px. batch: tiles at a time, memory only. The noise depends on `key` (as in draw_noise) alone.
    """
    device = policy.times.device
    padded = torch.from_numpy(pad(lr, policy.multiple)).permute(2, 0, 1)[None].float().div(255).to(device)
    tiles = cut_into_tiles(*padded.shape[-2:], tile=tile, overlap=overlap, multiple=policy.multiple)
    count, passes = len(tiles.corners), policy.sampler.steps + 1 + reads_tiles(policy)
    with tqdm(total=count * passes, desc="tiles", leave=False, disable=None if count > 1 else True) as bar:
        tiled = Tiled(policy, tiles, batch, bar)
        seen = tiled.observe(padded, key)
        noise = sr_policy.draw_noise([key], (policy.channels, *seen.shape[-2:]), device)
        images = sr_policy.restore(tiled, seen, noise)
    height, width = (policy.sampler.scale * length for length in lr.shape[:2])
    return images[..., :height, :width]
