"""
Hacking probes: the HR image of an unseen photograph, tampered with as a policy would that hunts for reward.

An honest judge scores every probe below HR, the honest candidate. candidates.PROBES says what is done to it.
"""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import dist, mllm, run
from common.candidates import PROBES, tamper
from common.dist import mine
from common.groups import group_images
from common.images import sheet
from common.metrics import AXES
from common.mllm import Judge
from common.reward_stats import rate


def probe_images(source: Path, group: dict, other: dict, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """LR, and HR followed by its probes, of one group; `other`: the group whose HR is the foreign photograph."""
    lr, _, hr = group_images(source, group | {"candidates": []})
    _, _, foreign = group_images(source, other | {"candidates": []})
    return lr, [hr, *tamper(hr, lr, foreign, run.np_rng(seed, "probe", group["id"]))]


def strangers(groups: list[dict]) -> list[dict]:
    """For each group another one, half the list away in the order of photographs."""
    order = sorted(range(len(groups)), key=lambda i: groups[i]["source"])
    partner = dict(zip(order, order[len(order) // 2:] + order[:len(order) // 2]))
    return [groups[partner[i]] for i in range(len(groups))]


def score_all(cfg, judge: Judge, source: Path, groups: list[dict]) -> np.ndarray:
    """[G, 1 + probes, 3] expected scores of HR and of its probes; all groups have HR. Every rank gets all rows."""
    scores = [torch.zeros(0, 1 + len(PROBES), len(AXES), dtype=torch.float64)]
    own = list(zip(mine(groups), mine(strangers(groups))))
    starts = range(0, len(own), cfg.groups_per_forward)
    for i in tqdm(starts, desc="probe", unit="batch", disable=not dist.is_main()):
        read = [probe_images(source, group, other, cfg.seed) for group, other in own[i:i + cfg.groups_per_forward]]
        scores.append(mllm.expected_scores(judge, *map(list, zip(*read))).double())
    return dist.gather_rows(torch.cat(scores)).numpy().round(4)


def probe_rates(scores: np.ndarray | None, seed: int) -> dict | None:
    """
    How often HR is scored above its probes (ties count half), from scores [G, 1 + probes, 3]; None without scores.

    `each`: probe -> axis -> {value, ci95}; `all`: likewise over all probes, of the overall score. A probe need not show
    on an axis that it does not hurt. Intervals: bootstraps over groups.
    """
    if scores is None:
        return None
    above = (1 + np.sign(scores[:, :1] - scores[:, 1:])) / 2                                 # [G, probes, 3]
    ones = np.ones(len(scores))
    each = {name: {axis: rate(above[:, p, a], ones, seed) for a, axis in enumerate(AXES)}
            for p, name in enumerate(PROBES)}
    means = scores.mean(0).round(4).tolist()
    return {"groups": len(scores), "each": each,
            "all": rate(above[..., AXES.index("overall")].sum(1), len(PROBES) * ones, seed),
            "mean_scores": {name: dict(zip(AXES, row)) for name, row in zip(("hr", *PROBES), means)}}


def picture(cfg, source: Path, groups: list[dict], scores: np.ndarray) -> np.ndarray:
    """LR, HR and the probes of cfg.example_groups groups, evenly spaced, with their overall scores: uint8 [H, W, 3]."""
    others, rows, below = strangers(groups), [], []
    for g in np.linspace(0, len(groups) - 1, min(cfg.example_groups, len(groups))).astype(int):
        lr, images = probe_images(source, groups[g], others[g], cfg.seed)
        rows.append([lr, *images])
        below.append([groups[g]["id"], *(f"overall {score:.2f}" for score in scores[g, :, AXES.index("overall")])])
    return sheet(rows, ["LR", "hr (honest)", *PROBES], below=below)
