"""
Score SR outputs of any size with the judge, and rank the methods that made them; no ground truth is needed.

An image larger than those the judge was trained on is cut into crops of that size, at the same place in LR and in every
output; its score is the mean over crops. So a fault that shows only in the image as a whole, such as a drift of color
from one end to the other, is seen in parts or not at all.

Shapes: N LR images, M methods, G crops of one image.
"""
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import dist, metrics, mllm, run
from common.dist import mine
from common.images import cut, grid, resize
from common.metrics import AXES
from common.mllm import Judge
from common.replies import sample_replies
from common.sr_folders import BICUBIC, Scene, read

CELLS = 8                               # numbers per image and method, see score_all
VIEW = 192                              # px, at most, of what is shown of an image around a judged crop


def score_all(cfg, judge: Judge, scenes: list[Scene], methods: list[str], *, side: int) -> Tensor:
    """
    float64 [n, M, CELLS] of this rank's scenes: 3 mean scores (NaN where a method has no output), number of crops, and
    corners (y, x; LR px) of the crops with the lowest and the highest overall score. side: px of a judged crop.
    """
    table = [torch.zeros(0, len(methods), CELLS, dtype=torch.float64)]
    bar = tqdm(mine(scenes), desc="judge", unit="image", disable=not dist.is_main())
    for scene in bar:
        lr, images = read(scene, BICUBIC in methods)
        cells = torch.full((1, len(methods), CELLS), torch.nan, dtype=torch.float64)
        for scale in sorted({len(image) // len(lr) for image in images.values()}):
            own = [key for key in methods if key in images and len(images[key]) // len(lr) == scale]
            small = max(1, side // scale)
            corners = grid(*lr.shape[:2], small, cfg.crops_per_image)
            scores = mllm.expected_scores(
                judge, [cut(lr, at, small, 1) for at in corners],
                [[cut(images[key], at, small, scale) for key in own] for at in corners],
                groups_per_forward=cfg.groups_per_forward).double()                       # [G, own, 3]
            places = torch.tensor(corners, dtype=torch.float64)
            for column, key in enumerate(own):
                overall = scores[:, column, 2]
                cells[0, methods.index(key)] = torch.cat([
                    scores[:, column].mean(0), torch.tensor([len(corners)]), places[overall.argmin()],
                    places[overall.argmax()]])
        table.append(cells)
    return torch.cat(table)


def mean_of(values: np.ndarray, seed: int) -> dict:
    """{value, ci95} of the mean of values [n], a bootstrap over images; NaNs are left out, None where too few."""
    values = values[~np.isnan(values)]
    ends = [round(end, 4) for end in metrics.bootstrap_ci(values, seed)] if len(values) > 1 else None
    return {"value": round(float(values.mean()), 4) if len(values) else None, "ci95": ends}


def rank_methods(scores: np.ndarray, methods: list[str], seed: int) -> dict:
    """
    Ranking by the mean overall score, from scores [N, M, 3] (NaN: no output).

    `wins`[a][b]: share of the images that both have on which a scores higher than b, ties half. `behind_best`: mean
    of the best method's overall score minus the own one, on the same images; an interval above 0 says "worse".
    """
    overall = scores[..., AXES.index("overall")]                                                  # [N, M]
    order = np.argsort(-np.nanmean(overall, 0), kind="stable")
    wins = {a: {b: mean_of((1 + np.sign(overall[:, i] - overall[:, j])) / 2, seed)
                for j, b in enumerate(methods) if j != i} for i, a in enumerate(methods)}
    against = {a: [found["value"] for found in own.values() if found["value"] is not None] for a, own in wins.items()}
    rows = [{"method": methods[m], "images": int((~np.isnan(overall[:, m])).sum()),
             **{axis: mean_of(scores[:, m, a], seed) for a, axis in enumerate(AXES)},
             "win_rate": round(float(np.mean(against[methods[m]])), 4) if against[methods[m]] else None,
             "behind_best": mean_of(overall[:, order[0]] - overall[:, m], seed)} for m in order]
    return {"ranking": rows, "wins": {methods[m]: wins[methods[m]] for m in order}}


def extremes(overall: np.ndarray, m: int) -> list[tuple[str, int]]:
    """("best", image) and ("worst", image) of method m by its own score, overall [N, M]; one if there is one image."""
    best, worst = int(np.nanargmax(overall[:, m])), int(np.nanargmin(overall[:, m]))
    return [("best", best)] + [("worst", worst)] * (worst != best)


@torch.no_grad()
def explain(cfg, judge: Judge, lr: np.ndarray, image: np.ndarray, *, max_tokens: int, key: str) -> list[str]:
    """cfg.sampled_replies replies of the judge about one crop; their randomness depends on (seed, key) alone."""
    features, grids = mllm.image_features(judge, [[lr, image]])
    uniforms = torch.rand(1, cfg.sampled_replies, max_tokens, generator=run.generator(cfg.seed, "explain", key))
    return [mllm.reply_text(judge, ids) for ids in sample_replies(judge, features, grids, uniforms)[0]]


def examples(cfg, judge: Judge, scenes: list[Scene], *, measured: np.ndarray, methods: list[str], side: int,
             max_tokens: int) -> list[dict]:
    """
    Best and worst image of each method: {method, kind, image, scores, replies, views}; methods in order of display.

    measured: [N, M, CELLS] of score_all. views: LR and all outputs around the crop that scored highest or lowest.
    """
    found = []
    for m, method in enumerate(methods):
        for kind, n in extremes(measured[..., AXES.index("overall")], m):
            lr, images = read(scenes[n], BICUBIC in methods)
            scale, places = len(images[method]) // len(lr), measured[n, m, 4:].astype(int).tolist()
            corner, small = tuple(places[2:] if kind == "best" else places[:2]), max(1, side // scale)
            replies = explain(cfg, judge, cut(lr, corner, small, 1), cut(images[method], corner, small, scale),
                              max_tokens=max_tokens, key=f"{scenes[n].name} {method} {kind}")
            scores = {key: float(measured[n, i, 2]) for i, key in enumerate(methods) if key in images}
            found.append({"method": method, "kind": kind, "image": scenes[n].name, "scores": scores,
                          "replies": replies, "views": view(lr, images, corner, small)})
    return found


def view(lr: np.ndarray, images: dict[str, np.ndarray], corner: tuple[int, int], side: int) -> dict[str, np.ndarray]:
    """LR and every output around a crop of `side` LR px at `corner`; all enlarged to one size by repetition."""
    top = max(len(image) // len(lr) for image in images.values())
    size = min(max(side, VIEW // top), *lr.shape[:2])
    at = tuple(int(np.clip(place + side // 2 - size // 2, 0, length - size))
               for place, length in zip(corner, lr.shape[:2]))
    shown = {"LR": cut(lr, at, size, 1)}
    shown |= {key: cut(image, at, size, len(image) // len(lr)) for key, image in images.items()}
    return {key: resize(image, (top * size, top * size), "nearest") for key, image in shown.items()}
