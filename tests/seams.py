"""
How visible the borders of tiles are, and how far a tiled image is from one restored whole, for three ways to tile.

Run     python tests/seams.py runs/demo [cold_start]        # a run with a finished stage 04; 1 minute
"""
import sys
from pathlib import Path

import numpy as np
import skimage
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import metrics, sr_pipelines, sr_policy, sr_tiles
from common.images import read_image, resize, to_pixels

PHOTOGRAPHS = {"chelsea.png": (30, 100), "coffee.png": (100, 200)}      # corners of crops of 256 x 256 px; test split
WAYS = ((32, 0), (32, 8), (16, 4), (48, 16))                            # tile, overlap; LR px


def seam(image: np.ndarray, whole: np.ndarray, tiles: sr_tiles.Tiles, scale: int) -> float:
    """Mean |difference| across the borders of tiles, over that at the same places of the image restored whole."""
    begin = sorted({x for _, x in tiles.corners})
    borders = sorted({scale * x for x in [*begin[1:], *(x + tiles.side[1] for x in begin[:-1])]})
    across = [np.abs(np.diff(one.astype(float), axis=1))[:, [x - 1 for x in borders]].mean() for one in (image, whole)]
    return across[0] / across[1]


@torch.no_grad()
def blended_outputs(policy, lr: np.ndarray, key: tuple, *, tile: int, overlap: int) -> torch.Tensor:
    """Every tile restored to the end on its own, from its part of the one first latent; then pixels are averaged."""
    images = torch.from_numpy(lr).permute(2, 0, 1)[None].float().div(255)
    tiles = sr_tiles.cut_into_tiles(*lr.shape[:2], tile=tile, overlap=overlap, multiple=policy.multiple)
    noise = sr_policy.draw_noise([key], (policy.channels, *lr.shape[:2]), images.device)
    seen = policy.observe(images, [key])
    with tqdm(disable=True) as bar:
        tiled = sr_tiles.Tiled(policy, tiles, 16, bar)
        return sr_tiles.blend(lambda at: sr_policy.restore(policy, sr_tiles.cut(seen, tiles, at),
                                                           sr_tiles.cut(noise, tiles, at)), tiled)


def main() -> None:
    run, name = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "policy"
    policy = sr_pipelines.load_policy(run / "04_train_sr_grpo" / name, torch.device("cpu"))
    print(f"tile {'overlap':>8} {'way':<24}{'seam':>6} {'PSNR to whole, dB':>18}    means of {len(PHOTOGRAPHS)} crops")
    rows = {}
    for photograph, (y, x) in PHOTOGRAPHS.items():
        hr = read_image(Path(skimage.__file__).parent / "data" / photograph)[y:y + 256, x:x + 256]
        lr = resize(np.ascontiguousarray(hr), (64, 64), "area")
        key = (0, "seams", photograph)
        whole = to_pixels(sr_tiles.restore(policy, lr, key, tile=64, overlap=0, batch=16))[0]
        for tile, overlap in WAYS:
            tiles = sr_tiles.cut_into_tiles(64, 64, tile=tile, overlap=overlap, multiple=policy.multiple)
            made = {"every step": sr_tiles.restore(policy, lr, key, tile=tile, overlap=overlap, batch=16)}
            made |= {"outputs": blended_outputs(policy, lr, key, tile=tile, overlap=overlap)} if overlap else {}
            for way, image in made.items():
                pixels = to_pixels(image)[0]
                rows.setdefault((tile, overlap, way), []).append(
                    (seam(pixels, whole, tiles, policy.sampler.scale), metrics.psnr(pixels, whole)))
    for (tile, overlap, way), found in rows.items():
        where = f"blended: {way}" if overlap else "cut"
        print("{:>4} {:>8} {:<24}{:>6.3f} {:>18.1f}".format(tile, overlap, where, *np.mean(found, axis=0)))


if __name__ == "__main__":
    main()
