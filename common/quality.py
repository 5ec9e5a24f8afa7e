"""
Whether a preference set is worth training on: what stage 01 says of it in quality.json and, in short, on the screen.

The method prior orders candidates by the mean training label of their method and sees no pixel. Where it is right about
nearly all pairs of the test split, the labels say little but the names of the methods, and so will a model learn.
"""
import numpy as np

from common import metrics
from common.groups import Labels, SPLITS, label_arrays, method_prior
from common.metrics import AXES

PRIOR_LIMIT = 0.75      # above this there is a warning; 0.667 is our demo, 0.5 is chance


def check(groups: list[dict], near: list[dict], answers: dict | None = None) -> dict:
    """
    All of quality.json. groups: lines of groups.jsonl; near: near-duplicate sources (duplicates.near_pairs); answers:
    how a label model answered (mllm_labels.collect).
    """
    labeled = [group for group in groups if group["labels"]]
    labels = label_arrays(labeled)
    splits = {}
    for group in groups:
        splits.setdefault(group["source"], set()).add(group["split"])
    pairs = [pair | {"splits": [sorted(splits[pair[side]]) for side in "ab"]} for pair in near
             if pair["a"] in splits and pair["b"] in splits]
    found = {
        "groups": {split: sum(group["split"] == split for group in groups) for split in SPLITS},
        "near_duplicates": pairs,
        "leaks": {"near_duplicates_across_splits": sum(len(set(map(str, pair["splits"]))) > 1 for pair in pairs),
                  "sources_in_two_splits": sorted(name for name, own in splits.items() if len(own) > 1),
                  "files_in_two_splits": shared_files(groups)},
        "labels": {axis: label_statistics(labeled, labels, a) for a, axis in enumerate(AXES)},
        "methods": method_statistics(groups),
        "method_prior": prior_accuracy(labeled),
        "axis_correlation": axis_correlation(labels)} | ({"label_model": answers} if answers else {})
    return found | {"warnings": warnings(found)}


def shared_files(groups: list[dict]) -> list[list[str]]:
    """[file, file] of equal LR or HR pictures in different splits."""
    seen, shared = {}, []
    for group in groups:
        for path in filter(group.get("sha256", {}).get, filter(None, (group["lr"], group["hr"]))):
            split, first = seen.setdefault(group["sha256"][path], (group["split"], path))
            if split != group["split"]:
                shared.append([first, path])
    return shared


def label_statistics(labeled: list[dict], labels: Labels, a: int) -> dict:
    """Number of labels, pairs and votes on axis a, how many pairs are tied, and how the scores spread."""
    own = [group["labels"][AXES[a]] for group in labeled if AXES[a] in group["labels"]]
    ranks, scores = labels.ranks[..., a], labels.scores[..., a]
    count = ranks.shape[1] if len(ranks) else 0
    total = len(own) * count * (count - 1) // 2
    ordered = int(metrics.pair_accuracy(list(ranks), list(ranks))[2].sum())
    known = scores[~np.isnan(scores)]
    spread = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]).round(4).tolist() if len(known) else None
    return {"groups": len(own), "sources": sorted({label["source"] for label in own}), "pairs": ordered,
            "tied": round(1 - ordered / total, 4) if total else None, "score_quartiles": spread,
            "votes": sum(counted(label["votes"]) for label in own)}


def counted(votes: list | int | None) -> int:
    """How many votes a label has: a list of them, or of people's judgements the number alone."""
    return votes if isinstance(votes, int) else len(votes or [])


def method_statistics(groups: list[dict]) -> dict[str, dict]:
    """Method -> candidates per split, and per axis the mean rank and how often it has the best one."""
    found = {}
    for group in groups:
        for c, candidate in enumerate(group["candidates"]):
            own = found.setdefault(candidate["method"], {split: 0 for split in SPLITS} | {axis: [] for axis in AXES})
            own[group["split"]] += 1
            for axis, label in group["labels"].items():
                own[axis].append(label["ranks"][c])
    for own in found.values():
        for axis in AXES:
            ranks = np.array(own.pop(axis))
            own |= {axis: {"mean_rank": round(float(ranks.mean()), 3), "best": round(float((ranks == 1).mean()), 3)}
                    } if len(ranks) else {}
    return dict(sorted(found.items()))


def prior_accuracy(labeled: list[dict]) -> dict[str, float]:
    """Per axis the pairs of the test split that the method prior orders rightly; NaN where that cannot be said."""
    train, test = ([group for group in labeled if group["split"] == split] for split in ("train", "test"))
    if not train or not test:
        return dict.fromkeys(AXES, np.nan)
    guesses, ranks = method_prior(test, train, label_arrays(train)), label_arrays(test).ranks
    return {axis: round(metrics.pair_accuracy(list(guesses[..., a]), list(ranks[..., a]))[0], 4)
            for a, axis in enumerate(AXES)}


def axis_correlation(labels: Labels) -> float:
    """Pearson's, of consistency and naturalness over candidates; of minus the ranks where there are no scores."""
    both = np.where(np.isnan(labels.scores).any((0, 1)), -labels.ranks, labels.scores)[..., :2].reshape(-1, 2)
    both = both[~np.isnan(both).any(1)]
    return round(float(np.corrcoef(both.T)[0, 1]), 4) if len(both) > 1 and both.std(0).all() else np.nan


def warnings(found: dict) -> list[str]:
    """One line for each thing that a builder should look at."""
    prior = found["method_prior"]["overall"]
    lines = [f"labels mostly encode method names: the name alone orders {prior:.0%} of the test pairs rightly; mix "
             "strengths, settings or seeds in a method"] * (prior > PRIOR_LIMIT)
    leaks = found["leaks"]
    lines += [f"{leaks['near_duplicates_across_splits']} near-duplicate sources lie in different splits (quality.json)"
              ] * bool(leaks["near_duplicates_across_splits"])
    lines += [f"{len(leaks['files_in_two_splits'])} pictures lie in two splits, the first: {' and '.join(first)}"
              for first in leaks["files_in_two_splits"][:1]]
    lines += [f"no {split} groups: stages 02 and 03 need some" for split, count in found["groups"].items() if not count]
    answers = found.get("label_model")
    if answers and (abs(answers["first_place"] - 0.5) > 0.15 or answers["consistent"] < 0.65):
        lines.append(f"the label model names the first place in {answers['first_place']:.0%} of its answers and agrees "
                     f"with itself in {answers['consistent']:.0%} of the pairs (guessing: 50% each)")
    return lines + ["no labels: stage 02 cannot train on this set"] * (not any(
        own["groups"] for own in found["labels"].values()))


def show(found: dict) -> None:
    """Print the table and the warnings."""
    print(f"{'labels on':<14}{'groups':>8}{'pairs':>8}{'tied':>8}{'method prior':>14}")
    for axis, own in found["labels"].items():
        if own["groups"]:
            prior = found["method_prior"][axis]
            print(f"{axis:<14}{own['groups']:>8}{own['pairs']:>8}{own['tied']:>8.3f}{prior:>14.3f}")
    counts = {method: sum(own[split] for split in SPLITS) for method, own in found["methods"].items()}
    rarest, most = min(counts, key=counts.get), max(counts, key=counts.get)
    print(f"{len(counts)} methods, from {rarest} ({counts[rarest]} candidates) to {most} ({counts[most]}); "
          f"{len(found['near_duplicates'])} pairs of near-duplicate sources")
    if "label_model" in found:
        print("label model: {questions} questions, {consistent:.3f} of the pairs answered alike in both orders, "
              "{first_place:.3f} of the answers for the first place".format(**found["label_model"]))
    for line in found["warnings"]:
        print(f"warning: {line}")


def headline(found: dict) -> dict:
    """The part of it that manifest.json repeats."""
    kinds = sorted({kind for own in found["labels"].values() for kind in own["sources"]})
    pairs = next((own["pairs"] for own in reversed(found["labels"].values()) if own["groups"]), 0)
    prior = {"method_prior": found["method_prior"], "axis_correlation": found["axis_correlation"]} if kinds else {}
    return {"pairs": pairs, "label_source": ", ".join(kinds) or "none"} | prior
