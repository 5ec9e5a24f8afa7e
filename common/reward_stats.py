"""
Statistics of rankings inside LR groups: pair accuracy and rank correlation, with bootstrap intervals over the groups.

Shapes: G groups, C candidates of each, 3 axes as in AXES, P pairs. Ranks: 1 is best, NaN where there is no label.
"""
import numpy as np
from torch import Tensor

from common import metrics
from common.groups import Labels
from common.metrics import AXES

RIVALS = ("lr_gray", "lr_shuffled", "method_prior", "before_grpo")     # the judge is compared with them


def rate(right: np.ndarray, pairs: np.ndarray, seed: int) -> dict:
    """right [G] of pairs [G] as a share, and its 95 % bootstrap interval over groups: None without, or in one group."""
    right, pairs = right[pairs > 0], pairs[pairs > 0]
    if not len(pairs):
        return {"value": None, "ci95": None}
    ends = [round(end, 4) for end in metrics.bootstrap_ci(right, seed, counts=pairs)] if len(pairs) > 1 else None
    return {"value": round(float(right.sum() / pairs.sum()), 4), "ci95": ends}


def accuracies(scores: dict[str, np.ndarray], ranks: np.ndarray, seed: int) -> tuple[dict, dict]:
    """Scorer -> axis -> rate over the pairs that the labels do not tie; and judge minus rival."""
    accuracy, margin = {name: {} for name in scores}, {name: {} for name in RIVALS if name in scores}
    for a, axis in enumerate(AXES):
        tally = {name: metrics.pair_accuracy(own[..., a], ranks[..., a])[1:] for name, own in scores.items()}
        for name, (right, pairs) in tally.items():
            accuracy[name][axis] = rate(right, pairs, seed)
        for name in margin:
            margin[name][axis] = rate(tally["judge"][0] - tally[name][0], tally["judge"][1], seed)
    return accuracy, margin


def accuracy_by_gap(scores: np.ndarray, labels: Labels, seed: int) -> dict[str, list[dict]]:
    """Per axis the accuracy in each quarter of the pairs, by the gap between labels (scores, else ranks)."""
    result = {}
    for a, axis in enumerate(AXES):
        found = [metrics.pair_hits(s, r) for s, r in zip(scores[..., a], labels.ranks[..., a])]
        group = np.repeat(np.arange(len(found)), [len(hits) for hits, _, _ in found])                   # [P]
        hits, better, worse = map(np.concatenate, zip(*found))
        kind, gaps = "score", labels.scores[group, better, a] - labels.scores[group, worse, a]
        if np.isnan(gaps).any():
            kind, gaps = "rank", labels.ranks[group, worse, a] - labels.ranks[group, better, a]
        quarter = np.searchsorted(np.quantile(gaps, [0.25, 0.5, 0.75]), gaps) if len(gaps) else gaps
        result[axis] = []
        for q in np.unique(quarter):
            inside = quarter == q
            right, pairs = (np.bincount(group[inside], w, len(scores)) for w in (hits[inside], None))
            low, high = (round(float(end), 4) for end in (gaps[inside].min(), gaps[inside].max()))
            result[axis].append({"quarter": int(q) + 1, "gap": kind, "from": low, "to": high,
                                 "pairs": int(inside.sum()), **rate(right, pairs, seed)})
    return result


def mean_srcc(scores: np.ndarray, ranks: np.ndarray) -> dict[str, float | None]:
    """Per axis the mean over groups of Spearman's correlation; a group that ties everything has none."""
    result = {}
    for a, axis in enumerate(AXES):
        own = [metrics.srcc(s, -r) for s, r in zip(scores[..., a], ranks[..., a]) if not np.isnan(r).any()]
        own = [value for value in own if not np.isnan(value)]
        result[axis] = round(float(np.mean(own)), 4) if own else None
    return result


def compare_readouts(sampled: Tensor, expected: np.ndarray, ranks: np.ndarray, *, seed: int) -> dict:
    """
    Sampled [g, C, K, 3] and expected [g, C, 3] scores of the same candidates, against their ranks [g, C, 3].

    A candidate none of whose replies parses has no sampled score: its pairs are left out for both read-outs.
    `difference`: sampled minus expected score, mean and mean absolute over candidates, in digits; None without any.
    """
    mean = sampled.nanmean(2).numpy()                                                       # [g, C, 3]
    ranks = np.where(np.isnan(mean), np.nan, ranks)
    accuracy, _ = accuracies({"sampled": mean, "expected": expected}, ranks, seed)
    correlation = {}
    for a, axis in enumerate(AXES):
        both = np.stack([mean[..., a], expected[..., a]])[:, ~np.isnan(mean[..., a])]       # [2, candidates]
        enough = both.shape[1] >= 5 and both.std(1).min() > 1e-6                            # few say nothing
        correlation[axis] = round(float(np.corrcoef(both)[0, 1]), 4) if enough else None
    difference = mean - expected
    apart = {axis: {"mean": round(float(np.nanmean(own)), 4), "mean_absolute": round(float(np.nanmean(abs(own))), 4)}
             if not np.isnan(own).all() else None for axis, own in zip(AXES, np.moveaxis(difference, -1, 0))}
    parsed = 1 - float(sampled[..., 0].isnan().double().mean())
    return {"groups": len(mean), "replies_per_candidate": sampled.shape[2], "parse_rate": round(parsed, 4),
            "accuracy": accuracy, "correlation": correlation, "difference": apart}
