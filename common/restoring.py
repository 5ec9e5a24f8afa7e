"""
Restore a folder of pictures of any size with SR policies: tiles without seams, colors, a page to look at.

Tiles  The whole image has one first latent. In every denoising step overlapping tiles predict the next state of their
       parts; where they overlap the predictions are averaged with smooth weights, and all go on from one latent
       (MultiDiffusion, arXiv 2302.08113, eq. 5). Decoding averages pixels likewise. The outer quarter of an overlap has
       no weight: there a tile sees the padding of convolutions. With one tile this is sr_policy.restore, to the bit.
       Measured on the demo, differences across tile borders over those of the image restored whole: tiles of 32 px that
       are cut 2.738, that overlap by 8 px 1.003.
Color  A latent diffusion model may shift colors. `adain` (arXiv 1703.06868, eq. 8) gives each channel the mean and
       spread of LR's; `wavelet` (StableSR, arXiv 2305.07015) takes the low frequencies from LR.
Disk   <variant>/ (PNG, sub-folders kept)  records/ (one JSON per picture)  index.html  scores.csv
       skipped.jsonl. A picture is done if its record has its checksum, the policies' and those of the outputs.

Shapes: h w size of LR, H = s h, W = s w size of SR; tiles and corners in LR px. A latent, what the policy observes of
LR, and SR have sides that are a fixed multiple k of LR's.
"""
import collections
import hashlib
import html
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import mllm, report, run, sr_policy
from common.config import fail
from common.images import (BICUBIC, MAX_PIXELS, cut, evenly, find, from_pixels, grid, read_image, resize, to_pixels,
                           write_png)
from common.metrics import AXES
from common.mllm import Judge
from common.sr_policy import Policy

MARGIN = 0.25                           # share of an overlap, at a tile's border, that has no weight
COLOR_FIXES = ("auto", "none", "adain", "wavelet")
WAVELET_LEVELS = 5                      # low frequencies are wider than about 2 ** 5 px of SR
SMALLEST = 8                            # px, side of an LR image that the judge can make something of
VIEW = 384                              # px of SR that the page shows of a picture, at most
ABOUT_SCORES = """<p>Scores are the judge's, 1 to 9: is the image consistent with the low-resolution one, does it look
like a photograph, and overall. It never saw a ground truth, and it can be fooled: trust your eyes first.</p>"""


# tiles -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tiles:
    size: tuple[int, int]               # h, w of the padded LR image
    side: tuple[int, int]               # h, w of every tile
    overlap: int                        # of neighbors, at least
    corners: list[tuple[int, int]]      # y, x


def cut_into_tiles(height: int, width: int, *, tile: int, overlap: int, multiple: int) -> Tiles:
    """Tiles that cover an LR image, evenly spread; sides, corners and overlap become multiples of `multiple`."""
    tile, overlap = (math.ceil(length / multiple) * multiple for length in (tile, overlap))
    overlap = min(overlap, tile // 2 // multiple * multiple)                    # a tile's two ends do not meet

    def starts(length: int) -> list[int]:
        count = 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))
        last = max(0, length - tile) // multiple
        return [multiple * (last * i // max(1, count - 1)) for i in range(count)]
    return Tiles((height, width), (min(tile, height), min(tile, width)), overlap,
                 [(y, x) for y in starts(height) for x in starts(width)])


def tile_weights(start: int, side: int, length: int, overlap: int) -> Tensor:
    """[side] of a tile along one axis: rises from 0 to 1 over an overlap; 1 at the ends of the image."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / max(overlap, 1)
    rise = (math.pi / 2 * ((place - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)).sin() ** 2
    weights = torch.ones(side, dtype=torch.float64)
    if overlap and start > 0:
        weights *= rise
    if overlap and start + side < length:
        weights *= rise.flip(0)
    return weights.float()


def take(image: Tensor, tiles: Tiles, corners: list[tuple[int, int]]) -> Tensor:
    """The tiles at `corners` of an image [1, C, k h, k w]: [B, C, k side, k side]; k may be a fraction."""
    k = image.shape[-1] / tiles.size[1]
    height, width = (round(length * k) for length in tiles.side)
    return torch.cat([image[..., round(y * k):round(y * k) + height, round(x * k):round(x * k) + width]
                      for y, x in corners])


def blend(make: Callable[[list[tuple[int, int]]], Tensor], tiles: Tiles, batch: int) -> Tensor:
    """The image [1, C, k h, k w] whose tiles are make(corners) -> [B, C, k side, k side]; `batch` tiles at a time."""
    for i in range(0, len(tiles.corners), batch):
        corners = tiles.corners[i:i + batch]
        pieces = make(corners)
        if i == 0:
            k = pieces.shape[-1] / tiles.side[1]
            size = [round(length * k) for length in tiles.size]
            total, weight_sum = pieces.new_zeros(pieces.shape[1], *size), pieces.new_zeros(*size)
        for (y, x), piece in zip(corners, pieces):
            y, x, (height, width) = round(y * k), round(x * k), piece.shape[-2:]
            down = tile_weights(y, height, size[0], round(tiles.overlap * k))
            across = tile_weights(x, width, size[1], round(tiles.overlap * k))
            weight, place = (down[:, None] * across).to(piece.device), (slice(y, y + height), slice(x, x + width))
            total[:, *place] += weight * piece
            weight_sum[place] += weight
    return (total / weight_sum)[None]


@torch.no_grad()
def restore(policy: Policy, lr: np.ndarray, key: tuple, *, tile: int, overlap: int, batch: int) -> Tensor:
    """
    SR [1, 3, H, W] in 0..1, on the CPU, of one LR image uint8 [h, w, 3] of any size; deterministic (eta 0).

    tile, overlap: LR px. batch: tiles at a time, memory only. The noise depends on `key` (see draw_noise) alone.
    """
    below, right = (-length % policy.multiple for length in lr.shape[:2])
    padded = np.pad(lr, ((0, below), (0, right), (0, 0)), mode="reflect")
    padded = from_pixels(padded).to(policy.times.device)
    tiles = cut_into_tiles(*padded.shape[-2:], tile=tile, overlap=overlap, multiple=policy.multiple)
    several = len(tiles.corners) > 1
    if several and policy.kind == "sd3":                # it encodes LR at the size of SR: too large
        seen = blend(lambda at: policy.observe(take(padded, tiles, at), [(*key, *corner) for corner in at]),
                     tiles, batch)
    else:
        seen = policy.observe(padded, [key])
    x = sr_policy.draw_noise([key], (policy.channels, *seen.shape[-2:]), seen.device)
    for i in tqdm(range(policy.sampler.steps), "denoising steps", leave=False, disable=None if several else True):
        index = torch.tensor([i], device=x.device)
        x = blend(lambda at: sr_policy.step(policy, take(x, tiles, at), index.expand(len(at)),
                                            take(seen, tiles, at))[0], tiles, batch)
    image = blend(lambda at: policy.decode(take(x, tiles, at), take(seen, tiles, at)).cpu(), tiles, batch)
    height, width = (policy.sampler.scale * length for length in lr.shape[:2])
    return image[..., :height, :width]


# color -------------------------------------------------------------------------------------------------------

def low_frequencies(image: Tensor) -> Tensor:
    """What passes of the kernel (1, 2, 1) / 4 leave, each twice as wide as the last; borders are repeated."""
    kernel = image.new_tensor([0.25, 0.5, 0.25]).repeat(3, 1, 1, 1)
    for gap in (2 ** level for level in range(WAVELET_LEVELS)):
        image = F.conv2d(F.pad(image, (gap, gap, 0, 0), mode="replicate"), kernel, dilation=gap, groups=3)
        image = F.conv2d(F.pad(image, (0, 0, gap, gap), mode="replicate"), kernel.mT, dilation=gap, groups=3)
    return image


def fix_color(image: Tensor, smooth: Tensor, kind: str) -> Tensor:
    """SR [1, 3, H, W] in 0..1 with the colors of up-sampled LR, `smooth`; kind: none, adain, wavelet."""
    if kind == "wavelet":
        return (image + low_frequencies(smooth - image)).clamp(0, 1)
    if kind == "adain":
        std, mean = torch.std_mean(image, (2, 3), correction=0, keepdim=True)
        lr_std, lr_mean = torch.std_mean(smooth, (2, 3), correction=0, keepdim=True)
        return ((image - mean) / std.clamp(min=1e-5) * lr_std + lr_mean).clamp(0, 1)
    return image


# a folder ----------------------------------------------------------------------------------------------------

@dataclass
class Picture:
    file: str                           # path below lr_dir
    path: Path
    output: str                         # path below a variant's folder


def find_pictures(lr_dir: str, out: Path) -> list[Picture]:
    """The pictures below lr_dir but not below `out`, which may lie inside; stops where `out` could do damage."""
    root, target = Path(lr_dir).resolve(), out.resolve()
    if root.is_relative_to(target):
        fail(f"out: {out} is or holds lr_dir={lr_dir}: give a folder of its own, so that no picture is overwritten")
    if out.exists() and not (out / "config.yaml").exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"out: {out} has files that this command did not write: give a new or empty folder")
    files = [(name, path) for name, path in find(lr_dir, "lr_dir")
             if not path.resolve().is_relative_to(target)]
    if not files:
        fail(f"lr_dir: {lr_dir} holds no picture but those in out={out}")
    names = collections.Counter(name for name, _ in files)              # a.png and a.jpg: keep the suffix, too
    pictures = [Picture(f"{name}{path.suffix}", path, f"{name}{path.suffix * (names[name] > 1)}.png")
                for name, path in files]
    twice, count = collections.Counter(picture.output for picture in pictures).most_common(1)[0]
    if count > 1:
        fail(f"lr_dir: {count} pictures would be restored as {twice}: rename one of them")
    return pictures


def checksum(folders: list[Path]) -> str:
    """sha256 of all files of the policies in `folders`: what other weights restored is restored again."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return hashlib.sha256("".join(f"{path.name} {run.sha256(path)}\n" for path in files).encode()).hexdigest()


def record_path(folder: Path, picture: Picture) -> Path:
    return folder / "records" / f"{picture.output}.json"


def is_done(folder: Path, picture: Picture, policies_sha256: str) -> bool:
    """Whether these policies have restored this very picture, and the outputs lie in `folder` unchanged."""
    path = record_path(folder, picture)
    record = run.read_json(path) if path.exists() else {"reason": "new"}
    try:
        return "reason" not in record and record["policies"] == policies_sha256 \
            and record["sha256"] == run.sha256(picture.path) \
            and all(run.sha256(folder / name) == digest for name, digest in record["outputs"].items())
    except OSError:                                                     # a file is gone or cannot be read
        return False


def restore_picture(folder: Path, picture: Picture, policies: dict[str, Policy], *, policies_sha256: str, seed: int,
                    tile: int, overlap: int, batch: int, color_fix: str, judge: Judge | None, judge_side: int,
                    judge_crops: int) -> bool:
    """
    Write <variant>/<output> for each variant -> policy, and the picture's record last; False for a broken file.

    tile, overlap: LR px. batch: tiles at a time. color_fix: one of COLOR_FIXES; auto: none for the pixel policy, whose
    color is its regressor's, else wavelet. The judge scores at most judge_crops crops of judge_side px of SR.
    """
    record = {"file": picture.file, "policies": policies_sha256}
    try:
        record["sha256"], lr = run.sha256(picture.path), read_image(picture.path)
    except (OSError, ValueError) as error:
        record["reason"] = f"cannot be read: {error}"
    else:
        scale = next(iter(policies.values())).sampler.scale
        smooth = from_pixels(lr)
        smooth = sr_policy.upsample(smooth, scale).clamp(0, 1)                              # [1, 3, H, W]
        images, outputs = {BICUBIC: to_pixels(smooth)[0]}, {}
        for name, policy in policies.items():
            image = restore(policy, lr, (seed, "folder", picture.file), tile=tile, overlap=overlap, batch=batch)
            automatic = "none" if policy.kind == "pixel" else "wavelet"
            image = fix_color(image, smooth, automatic if color_fix == "auto" else color_fix)
            images[name], path = to_pixels(image)[0], folder / name / picture.output
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, images[name])
            outputs[f"{name}/{picture.output}"] = run.sha256(path)
        record |= {"outputs": outputs, "size": [lr.shape[1], lr.shape[0]], "scores": {}}
        if judge and min(lr.shape[:2]) >= SMALLEST:
            scores = mllm.scores_in_crops(judge, lr[None], np.stack(list(images.values()))[None], crop=judge_side,
                                          limit=judge_crops)[0]                             # [variants, 3]
            record["scores"] = {name: dict(zip(AXES, row.double().numpy().round(4).tolist()))
                                for name, row in zip(images, scores) if row.isfinite().all()}     # else: not read
    path = record_path(folder, picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_bytes(path, json.dumps(record).encode())
    return "reason" not in record


# the page ----------------------------------------------------------------------------------------------------

def views(folder: Path, picture: Picture, record: dict, scale: int) -> dict[str, np.ndarray]:
    """LR enlarged by repetition, bicubic, and every output, of the part of a picture that has the most contrast."""
    lr, side = read_image(picture.path), VIEW // scale
    corner = max(grid(*lr.shape[:2], side, 64), key=lambda at: cut(lr, at, side, 1).mean(2).std())
    small = cut(lr, corner, side, 1)
    size = (scale * small.shape[1], scale * small.shape[0])
    images = {"LR": resize(small, size, "nearest"), BICUBIC: resize(small, size, "bicubic")}
    return images | {name.split("/")[0]: cut(read_image(folder / name), corner, side, scale)
                     for name in record["outputs"]}


def figure(record: dict, images: dict[str, np.ndarray]) -> str:
    """One picture: a slider from bicubic to the last variant, all images side by side, and links to the outputs."""
    last, below = list(images)[-1], {name: f"overall {axes['overall']:.2f}" for name, axes in record["scores"].items()}
    links = ", ".join(f'<a href="{quote(name)}">{html.escape(name.split("/")[0])}</a>' for name in record["outputs"])
    slider = report.compare(images[BICUBIC], images[last], (BICUBIC, last))
    return f"<h2>{html.escape(record['file'])}</h2>" + report.figure(
        slider + report.row(images, below), f"{record['size'][0]} x {record['size'][1]} px. Whole image: {links}.")


def write_page(folder: Path, pictures: list[Picture], *, lr_dir: str, variants: list[str], scale: int,
               shown_images: int) -> list[dict]:
    """index.html, skipped.jsonl and, if the judge was there, scores.csv, from the records of all pictures."""
    records = [run.read_json(record_path(folder, picture)) for picture in pictures]
    skipped = [{"file": record["file"], "reason": record["reason"]} for record in records if "reason" in record]
    run.write_lines(folder / "skipped.jsonl", skipped)
    good = [record for record in records if "reason" not in record]
    showable = [(picture, record) for picture, record in zip(pictures, records) if "reason" not in record
                and record["size"][0] * record["size"][1] * scale ** 2 <= MAX_PIXELS]
    shown = [(showable[i][1], views(folder, *showable[i], scale)) for i in evenly(len(showable), shown_images)]
    parts = [f"<p>{len(good)} pictures of {html.escape(lr_dir)}, {scale} times as wide and high; shown: {len(shown)}, "
             f"evenly spread, each where it has most contrast. Drag the slider: bicubic on the left, {variants[-1]} on "
             "the right.</p>"]
    scores = [{"image": record["file"], "variant": name, **axes} for record in good
              for name, axes in record["scores"].items()]
    if scores:
        means = [[name, *(f"{np.mean([row[axis] for row in scores if row['variant'] == name]):.2f}" for axis in AXES)]
                 for name in (BICUBIC, *variants) if name in {row["variant"] for row in scores}]
        parts += [report.table([["mean score", *AXES], *means], variants[-1]), ABOUT_SCORES]
        run.write_csv(folder / "scores.csv", scores)
    parts += [figure(record, images) for record, images in shown]
    if skipped:
        parts += ["<h2>Left out</h2>", report.table([["file", "reason"], *(list(line.values()) for line in skipped)])]
    run.write_bytes(folder / "index.html", report.page("Restored pictures", parts).encode(errors="replace"))
    return records
