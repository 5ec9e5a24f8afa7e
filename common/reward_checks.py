"""What stage 03 asks besides the plain pair accuracy: calibration, ties, methods, costs, and cases to read."""
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import calibration, dist, metrics, mllm, pair_stats
from common.dist import mine
from common.groups import Labels, group_images
from common.metrics import AXES
from common.mllm import Judge


def score_split(cfg, judge: Judge, source: Path, groups: list[dict]) -> Tensor:
    """Expected scores of this rank's groups, float64 [g, C, 3]."""
    scores, own = [torch.zeros(0, len(groups[0]["candidates"]), len(AXES), dtype=torch.float64)], mine(groups)
    starts = range(0, len(own), cfg.groups_per_forward)
    for i in tqdm(starts, desc="score validation", unit="batch", disable=not dist.is_main()):
        lrs, images, _ = zip(*(group_images(source, group) for group in own[i:i + cfg.groups_per_forward]))
        scores.append(mllm.expected_scores(judge, lrs, images).double())
    return torch.cat(scores)


def costs(judge: Judge, source: Path, groups: list[dict], replies: Tensor | None) -> dict:
    """Median and 95th percentile: seconds and tokens of one candidate scored alone, tokens of a sampled reply."""
    seconds, tokens = [], []
    for group in [groups[0], *groups]:                                       # the first only warms up
        lr, images, _ = group_images(source, group)
        started = time.time()
        mllm.expected_scores(judge, [lr], [images[:1]])
        seconds.append(time.time() - started)
        _, grids = mllm.pixel_patches(judge, [[lr, images[0]]])
        row = mllm.prompt_row(judge, grids[0], grids[1:])
        mllm.add_stems(judge, row, [1])
        tokens.append(sum(len(segment.ids) for segment in row))
    found = {"seconds_per_score": seconds[1:], "tokens_per_score": tokens[1:]}
    if replies is not None:
        found["tokens_per_reply"] = (replies >= 0).sum(-1).flatten().tolist()
    return {f"{key}_p{q}": round(float(np.percentile(own, q)), 4) for key, own in found.items() for q in (50, 95)}


def cases(groups: list[dict], scores: np.ndarray, labels: Labels, texts: dict[str, list[list[str]]]) -> list[dict]:
    """
    Of the groups with sampled replies the two that the judge ordered best and worst (overall): {kind, group, accuracy,
    candidates}, each candidate with its scores, label rank and replies, the judge's best first. Empty without replies.
    """
    axis, found = AXES.index("overall"), []
    for g, group in enumerate(groups):
        hits = metrics.pair_hits(scores[g, :, axis], labels.ranks[g, :, axis])[0] if group["id"] in texts else []
        if len(hits):
            found.append((float(np.mean(hits)), g))
    result = []
    for kind, (accuracy, g) in (("best", max(found)), ("worst", min(found))) if len(found) > 1 else ():
        rows = [{"candidate": candidate["id"], "method": candidate["method"], "score": float(scores[g, c, axis]),
                 "label_rank": float(labels.ranks[g, c, axis]), "replies": texts[groups[g]["id"]][c]}
                for c, candidate in enumerate(groups[g]["candidates"])]
        rows.sort(key=lambda row: -row["score"])
        result.append({"kind": kind, "group": groups[g]["id"], "accuracy": round(accuracy, 4), "candidates": rows})
    return result


def more(groups: list[dict], scores: np.ndarray, labels: Labels, *, prior: np.ndarray, train: list[dict],
         val: tuple[np.ndarray, Labels, dict], texts: dict, seed: int) -> dict:
    """
    Further keys of results.json, from the judge's and the method prior's [G, C, 3]; val: scores and labels of
    validation, and the calibration that was fitted there.
    """
    ties, overall = {}, AXES.index("overall")
    for a, axis in enumerate(AXES):
        gap = pair_stats.best_tie_gap(val[0][..., a], val[1].ranks[..., a])
        ties[axis] = {"gap": round(gap, 4), **pair_stats.accuracy_with_ties(
            scores[..., a], labels.ranks[..., a], gap, seed)}
    methods = pair_stats.accuracy_by_method(groups, scores[..., overall], labels.ranks[..., overall], train=train,
                                            seed=seed)
    known = {candidate["method"] for group in train for candidate in group["candidates"]}
    unseen = np.array([[candidate["method"] not in known for candidate in group["candidates"]] for group in groups])
    methods["within_tier"] = pair_stats.within_tier(
        scores[..., overall], np.where(unseen, np.nan, prior[..., overall]), labels.ranks[..., overall], seed)
    return {"correlation": pair_stats.correlations(scores, labels, seed), "ties": ties, "methods": methods,
            "calibration": calibration.check(val[2], scores, labels), "cases": cases(groups, scores, labels, texts)}


def headline(results: dict) -> dict:
    """What the manifest holds of them: overall, None where there is none."""
    probed, calibrated = results["probes"], results["calibration"]["overall"]
    return {"probe_rate": probed and probed["all"]["value"],
            "probe_rate_ci95": probed and probed["all"]["ci95"],
            "accuracy_with_ties": results["ties"]["overall"]["value"],
            "plcc": results["correlation"]["plcc"]["overall"]["value"],
            "krcc": results["correlation"]["krcc"]["overall"]["value"],
            "held_out_method_accuracy": results["methods"]["held_out"]["value"],
            "within_tier_accuracy": results["methods"]["within_tier"]["judge"]["value"],
            "within_tier_method_prior": results["methods"]["within_tier"]["method_prior"]["value"],
            "calibration_error_before": calibrated and calibrated["before"]["mae"],
            "calibration_error": calibrated and calibrated["after"]["mae"]}
