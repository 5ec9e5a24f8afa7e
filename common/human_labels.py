"""
Judgements -> labels: strengths by Davidson's model of paired comparison with ties, and groups.jsonl with them.

Within a group candidate i has the strength s_i (log odds). Of two that are compared

    P(i is better) : P(tie) : P(j is better)  =  exp((s_i - s_j) / 2) : nu : exp((s_j - s_i) / 2)

(Bradley and Terry 1952, Biometrika 39; ties: Davidson 1970, JASA 65). nu is shared by all groups of an axis. A normal
prior of width PRIOR on the strengths keeps one-sided results finite; prior, its width, and all that follows are ours.
"""
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from common import agreement, judgements, metrics, run
from common.config import fail
from common.groups import SPLITS, all_groups
from common.run import plain

PRIOR = 1.5                     # log odds; one judgement then pulls two candidates apart by about 1
LOG_NU = (-4.0, 3.0)            # bounds: without any tie (or with nothing else) nu has no finite optimum
LEAST_MARGIN = 0.01             # log odds; equal strengths share a rank


def fit(sizes: list[int], compared: list[tuple[int, int, int, float]]) -> tuple[list[np.ndarray], float]:
    """
    Most probable strengths, [K] per group with mean 0, and log nu.

    sizes: K of every group. compared: (group, i, j, 1: i is better, 1/2: a tie, 0: j is better).
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    group, i, j, better = np.array(compared).T
    i, j = ((starts[group.astype(int)] + index).astype(int) for index in (i, j))
    seen = np.stack([better == 1, better == 0.5, better == 0])                                 # [3, P]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        strengths, half = x[:-1], (x[i] - x[j]) / 2
        logits = np.stack([half, np.full_like(half, x[-1]), -half])                            # [3, P]
        shares = logits - logsumexp(logits, axis=0)
        slope = np.exp(shares) - seen
        pull = (slope[0] - slope[2]) / 2
        gradient = np.bincount(i, pull, len(strengths)) - np.bincount(j, pull, len(strengths)) + strengths / PRIOR**2
        value = (strengths**2).sum() / (2 * PRIOR**2) - shares[seen].sum()
        return value, np.append(gradient, slope[1].sum())

    bounds = [(None, None)] * starts[-1] + [LOG_NU]
    found = minimize(loss, np.zeros(starts[-1] + 1), jac=True, method="L-BFGS-B", bounds=bounds,
                     options={"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-7})
    return np.split(found.x[:-1], starts[1:-1]), float(found.x[-1])


def rank_margin(log_nu: float) -> float:
    """Log odds. Candidates share a rank unless, says the model, more than half of the answers would prefer one."""
    return max(LEAST_MARGIN, 2 * math.asinh(math.exp(log_nu) / 2))


def aggregate(groups: dict[str, list[str]], judged: list[dict]) -> dict[str, dict[str, dict]]:
    """
    Group id -> axis -> {ranks, scores (strengths), source, votes, scale} where the comparisons connect all candidates.

    Groups and axes without enough judgements are absent. overall: the mean of both strengths, where both are known.
    """
    labels, margins = {name: {} for name in groups}, []
    for axis in judgements.ASKED:
        own = [j for j in judged if j["axis"] == axis and not j["repeat_of"] and j["ranks"] is not None]
        names = sorted({j["group"] for j in own})
        number, compared = {name: g for g, name in enumerate(names)}, []
        pairs, votes = {name: set() for name in names}, dict.fromkeys(names, 0)
        for j in own:
            name, members = j["group"], groups[j["group"]]
            for a, b, better in judgements.verdicts(j):
                compared.append((number[name], members.index(a), members.index(b), better))
                pairs[name].add((a, b))
            votes[name] += 1
        strengths, log_nu = fit([len(groups[name]) for name in names], compared) if own else ([], LOG_NU[0])
        margins.append(rank_margin(log_nu))
        for name, values in zip(names, strengths):
            if len(set(judgements.components(groups[name], pairs[name]).values())) == 1:
                labels[name][axis] = label(values, margins[-1], votes[name])
    for found in labels.values():
        if len(found) == len(judgements.ASKED):
            both = [found[axis] for axis in judgements.ASKED]
            found["overall"] = label(np.mean([own["scores"] for own in both], axis=0), float(np.mean(margins)),
                                     sum(own["votes"] for own in both))
    return labels


def label(strengths: np.ndarray, margin: float, votes: int) -> dict:
    scores = [round(float(value), 4) for value in strengths]
    return {"ranks": metrics.ranks(scores, margin), "scores": scores, "source": "human", "votes": votes,
            "scale": "group"}                                           # see labels.common_scores


def set_labels(folder: Path, kind: str, without: list[str], publish: Callable[[Path, list[dict]], dict]) -> None:
    """
    Make `human` labels, or those that were built (`proxy`), the labels of groups.jsonl and of what is said about it.

    The others are kept beside them, so that either can be had again, byte by byte. without: annotators left out.
    publish(folder, groups): stage 01 writes the set and says what its manifest holds.
    """
    groups, manifest = all_groups(folder), run.read_json(folder / "manifest.json")
    names = {group["id"]: [candidate["id"] for candidate in group["candidates"]] for group in groups}
    if kind == "human":
        pictures = {group["id"]: judgements.pictures_of(group) for group in groups}
        judged = judgements.live(judgements.read(folder / judgements.NAME, names, pictures))
        unknown = set(without) - {j["annotator"] for j in judged}
        if unknown:
            fail(f"annotate_without: there is no judgement by {', '.join(sorted(unknown))}")
        used = [j for j in judged if j["annotator"] not in without]
        labels, report = aggregate(names, used), agreement.report(names, judged, without)
        if not any(labels.values()):
            fail(f"{folder / judgements.NAME}: no group has enough judgements yet to rank its candidates: go on "
                     f"with `{run.command(folder.name)} annotate=true`")
        for group in groups:
            group.setdefault("proxy_labels", group["labels"])
            group["labels"] = labels[group["id"]]
        manifest.setdefault("proxy_results", manifest["results"])
        manifest["results"] = plain(manifest["proxy_results"] | publish(folder, groups) | counts(groups)
                                    | {"annotators": len(report["annotators"])})
        report |= {"labels": manifest["results"]}
        run.write_json(folder / "annotation_report.json", report)
        run.write_bytes(folder / "annotation_report.md", agreement.markdown(report).encode())
    else:
        for group in groups:
            group["labels"] = group.pop("proxy_labels", group["labels"])
        publish(folder, groups)
        manifest["results"] = manifest.pop("proxy_results", manifest["results"])
    run.write_json(folder / "manifest.json", manifest)
    print(f"labels: {kind}, " + json.dumps(manifest["results"]))
    for stem in ("02_train_reward", "03_eval_reward"):
        if (folder.parent / stem / "config.yaml").exists():
            print(f"{folder.parent / stem} was made with the labels as they were: use another run= or delete it")


def counts(groups: list[dict]) -> dict:
    """How many groups people have labeled, for the manifest."""
    labeled = [group for group in groups if group["labels"]]
    return {"labeled_groups": {split: sum(group["split"] == split for group in labeled) for split in SPLITS},
            "labeled_overall": sum("overall" in group["labels"] for group in labeled)}
