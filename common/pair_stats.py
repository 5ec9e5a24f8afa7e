"""
More about rankings inside LR groups: correlations, accuracy with ties, accuracy by method.

Shapes: G groups, C candidates of each, 3 axes as in AXES, P pairs of candidates. Ranks: 1 is best, NaN: no label.
"""
import numpy as np
from scipy.stats import kendalltau, pearsonr, spearmanr

from common import metrics
from common.groups import Labels
from common.metrics import AXES
from common.reward_stats import rate


def correlations(scores: np.ndarray, labels: Labels, seed: int) -> dict[str, dict]:
    """
    Kind -> axis -> {value, ci95}: mean over groups of a correlation inside the group, from scores [G, C, 3].

    srcc: Spearman's with minus the rank; krcc: Kendall's tau-b with the same; plcc: Pearson's with the label's score
    (None where labels have ranks only, or scores of votes). A group that ties everything, on either side, has none and
    is left out.
    """
    kinds = {"srcc": (spearmanr, -labels.ranks), "krcc": (kendalltau, -labels.ranks), "plcc": (pearsonr, labels.scores)}
    result = {}
    for kind, (correlation, wanted) in kinds.items():
        result[kind] = {}
        for a, axis in enumerate(AXES):
            pairs = [(s, w) for s, w in zip(scores[..., a], wanted[..., a])
                     if not np.isnan(s + w).any() and np.ptp(s) > 0 and np.ptp(w) > 0]
            values = np.array([correlation(s, w).statistic for s, w in pairs])
            result[kind][axis] = rate(values, np.ones(len(values)), seed)
    return result


def tie_decisions(scores: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    All pairs of candidates of the groups, scores and ranks [G, C]: how far the scores lie apart, |difference| [P];
    whether the labels tie them or, if not, the scores order them as the labels do [P, 2]; and the group [P].
    """
    left, right = np.triu_indices(scores.shape[1], 1)
    gaps, order = scores[:, left] - scores[:, right], ranks[:, right] - ranks[:, left]            # [G, pairs]
    known = ~np.isnan(gaps + order)
    found = np.stack([order == 0, (np.sign(gaps) == np.sign(order)) & (order != 0)], axis=-1)
    return np.abs(gaps[known]), found[known], np.nonzero(known)[0]


def best_tie_gap(scores: np.ndarray, ranks: np.ndarray) -> float:
    """
    The threshold e with the highest accuracy with ties: two scores are tied if they lie at most e apart.

    "Tie calibration" of arXiv 2305.14324, which tries every gap that occurs; scores and ranks [G, C]. Ties among the
    best thresholds go to the smallest, 0 (equal scores only) included.
    """
    gaps, found, _ = tie_decisions(scores, ranks)
    if not len(gaps):
        return 0.0
    order = np.argsort(gaps, kind="stable")
    gaps, found = gaps[order], found[order].astype(np.int64)
    right = np.cumsum(found[:, 0]) + found[:, 1].sum() - np.cumsum(found[:, 1])       # if pairs up to here are tied
    last = np.append(gaps[1:] > gaps[:-1], True)                                      # of those with the same gap
    at_zero = found[gaps == 0, 0].sum() + found[gaps > 0, 1].sum()
    return float(np.append(0.0, gaps[last])[np.argmax(np.append(at_zero, right[last]))])


def accuracy_with_ties(scores: np.ndarray, ranks: np.ndarray, gap: float, seed: int) -> dict:
    """
    {value, ci95, pairs, tied} over *all* pairs inside the groups: a pair is right if the labels tie it and the scores
    lie at most `gap` apart, or the labels order it and the scores, further apart than that, order it likewise.
    """
    gaps, found, group = tie_decisions(scores, ranks)
    right = np.where(gaps <= gap, found[:, 0], found[:, 1])
    hits, pairs = np.bincount(group, right, len(scores)), np.bincount(group, None, len(scores))
    return {**rate(hits, pairs, seed), "pairs": len(gaps), "tied": int(found[:, 0].sum())}


def method_parts(groups: list[dict]) -> list[list[list[str]]]:
    """Per group and candidate the parts of its method's name: "warp+blur" has two."""
    return [[candidate["method"].split("+") for candidate in group["candidates"]] for group in groups]


def accuracy_where(involved: list[np.ndarray], scores: np.ndarray, ranks: np.ndarray, seed: int) -> dict:
    """{pairs, value, ci95} over the pairs with at least one involved candidate; involved: bool [C] per group."""
    right, pairs = np.zeros((2, len(scores)))
    for g, chosen in enumerate(involved):
        hits, better, worse = metrics.pair_hits(scores[g], ranks[g])
        inside = chosen[better] | chosen[worse]
        right[g], pairs[g] = hits[inside].sum(), inside.sum()
    return {"pairs": int(pairs.sum()), **rate(right, pairs, seed)}


def accuracy_by_method(groups: list[dict], scores: np.ndarray, ranks: np.ndarray, *, train: list[dict],
                       seed: int) -> dict:
    """
    Accuracy of the pairs in which a method takes part, scores and ranks [G, C].

    `each`: a row per method, where a candidate with two faults ("warp+blur") counts for both. `held_out`: the pairs
    with a candidate that has a method which no training group has, if there are any.
    """
    names, known = method_parts(groups), {part for own in method_parts(train) for parts in own for part in parts}
    rows = []
    for method in sorted({part for own in names for parts in own for part in parts}):
        involved = [np.array([method in parts for parts in own]) for own in names]
        rows.append({"method": method, "candidates": int(sum(own.sum() for own in involved)),
                     "in_training": method in known, **accuracy_where(involved, scores, ranks, seed)})
    unseen = [np.array([not set(parts) <= known for parts in own]) for own in names]
    return {"each": rows, "held_out": accuracy_where(unseen, scores, ranks, seed)}


def within_tier(scores: np.ndarray, prior: np.ndarray, ranks: np.ndarray, seed: int) -> dict:
    """
    Accuracy where the method's name says least: {prior_gap, pairs, judge, method_prior}, the latter two {value, ci95}.

    Of the pairs that the labels do not tie, those in the third (with ties more) whose methods lie closest in `prior`,
    the mean training label of a method (NaN: training never showed it; such pairs are left out). scores, prior, ranks:
    [G, C].
    """
    pairs = [metrics.pair_hits(own, order)[1:] for own, order in zip(prior, ranks)]
    gaps = [np.abs(own[better] - own[worse]) for own, (better, worse) in zip(prior, pairs)]
    known = np.concatenate(gaps)
    known = known[~np.isnan(known)]
    limit = float(np.quantile(known, 1 / 3)) if len(known) else 0.0
    near = [gap <= limit for gap in gaps]                                   # False for NaN
    counts = np.array([chosen.sum() for chosen in near], dtype=np.float64)
    result = {"prior_gap": round(limit, 4), "pairs": int(counts.sum())}
    for name, values in (("judge", scores), ("method_prior", prior)):
        right = [metrics.pair_hits(own, order)[0][chosen].sum() for own, order, chosen in zip(values, ranks, near)]
        result[name] = rate(np.array(right), counts, seed)
    return result
