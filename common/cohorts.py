"""
Cohorts: one LR image and its candidates with labels, as the reward model trains and is evaluated on them.

Also what decides who works on which cohort: picks are functions of (seed, step), shares of (rank, world size).
"""
import numpy as np
import torch

from common import dist, metrics, mllm
from common.dist import mine
from common.groups import Cohort
from common.metrics import AXES
from common.mllm import Judge


def scores_of(judge: Judge, cohorts: list[Cohort], groups_per_forward: int = 4) -> np.ndarray:
    """
    Expected scores [cohorts, C, 3], on every rank; each works on its share.

    groups_per_forward: in training; four times as many, at most 16, fit a pass without gradient.
    """
    judge.model.eval()
    own = mine(cohorts)
    scores = torch.zeros(0, len(cohorts[0].images) * 3)
    if own:
        scores = mllm.expected_scores(judge, [c.lr for c in own], [c.images for c in own],
                                      groups_per_forward=min(16, 4 * groups_per_forward)).flatten(1)
    return dist.gather_rows(scores).view(len(cohorts), -1, 3).numpy()


def evaluate(judge: Judge, cohorts: list[Cohort], groups_per_forward: int = 4) -> dict[str, float]:
    """Pair accuracy of the expected read-out per labeled axis; val_pair_accuracy is overall's, else the mean."""
    scores = scores_of(judge, cohorts, groups_per_forward)
    labeled = [a for a in range(3) if not all(np.isnan(c.ranks[:, a]).all() for c in cohorts)]
    accuracy = {AXES[a]: metrics.pair_accuracy(scores[:, :, a], [c.ranks[:, a] for c in cohorts])[0] for a in labeled}
    result = {f"val_{axis}_accuracy": value for axis, value in accuracy.items()}
    return result | {"val_pair_accuracy": accuracy.get("overall", sum(accuracy.values()) / len(accuracy))}
