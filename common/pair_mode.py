"""
Pair mode, beside the judge: a multimodal LLM is asked which of two candidates is better, in both orders.

An answer that changes when A and B change places says nothing about the candidates: `swap_consistency` is the share
of pairs for which it does not, without pairs where A and B were equally likely. (The judge scores one candidate at a
time, so swapping changes nothing there.) The questions are those of `label: mllm` in stage 01.

Shapes: G groups, C candidates of each, P = C (C - 1) / 2 pairs, 3 axes as in AXES.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import dist, mllm_labels
from common.dist import mine
from common.groups import Labels, group_images
from common.metrics import AXES
from common.reward_stats import accuracies, rate


def ask(model: str, source: Path, groups: list[dict], device: torch.device, batch: int) -> Tensor:
    """float64 [g, 3, P, 2] of this rank's groups: 1 A, 0 B, 0.5 neither; order 0 shows the pair (i, j) as A, B."""
    count = len(groups[0]["candidates"])
    asker = mllm_labels.load(model, device, "pair_model")
    found = [torch.zeros(0, len(AXES), count * (count - 1) // 2, 2, dtype=torch.float64)]
    for group in tqdm(mine(groups), desc="ask in pairs", unit="group", disable=not dist.is_main()):
        lr, images, _ = group_images(source, group)
        found.append(torch.from_numpy(mllm_labels.both_orders(asker, lr, images, batch)).double()[None])
    return torch.cat(found)


def compare(said: np.ndarray, judge: np.ndarray, labels: Labels, *, model: str, seed: int) -> dict:
    """
    From the answers [G, 3, P, 2], and the judge's scores [G, C, 3] and labels of the same groups.

    accuracy: over the pairs that the labels do not tie; an answer that changes with the order is half right, as equal
    scores are. swap_consistency: over the pairs without a tied answer. first_place: share of the answers for A; 0.5
    without a bias.
    """
    left, right = np.triu_indices(judge.shape[1], 1)                               # in the order of both_orders
    result = {"model": model, "groups": len(said), "accuracy": {}, "swap_consistency": {}, "first_place": {},
              "judge_accuracy": accuracies({"judge": judge}, labels.ranks, seed)[0]["judge"]}
    for a, axis in enumerate(AXES):
        vote = said[:, a, :, 0] - said[:, a, :, 1]                                 # [G, P] 1: i, -1: j, 0: it changed
        firm = (said[:, a] != 0.5).all(-1)
        wanted = np.sign(labels.ranks[:, right, a] - labels.ranks[:, left, a])     # NaN without a label
        known = np.abs(wanted) == 1
        hits = np.where(known, (1 + vote * wanted) / 2, 0.0)
        result["accuracy"][axis] = rate(hits.sum(1), known.sum(1), seed)
        result["swap_consistency"][axis] = rate((firm * np.abs(vote)).sum(1), firm.sum(1), seed)
        result["first_place"][axis] = round(float(said[:, a].mean()), 4)
    return result
