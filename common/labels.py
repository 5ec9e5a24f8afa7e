"""Labels of many groups as arrays, and what can be guessed of them from the names of the methods alone."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import data, run
from common.config import nearest
from common.data import AXES


@dataclass
class Labels:                           # NaN where a group has no label on an axis
    ranks: np.ndarray                   # [G, C, 3] 1 is best
    scores: np.ndarray                  # [G, C, 3] proxy score or MOS; NaN, too, where there are no common_scores


def common_scores(label: dict) -> list[float]:
    """
    A label's scores, if those of different groups compare; else [].

    Strengths and win shares from votes do not: one group's are spread wider than another's where more votes were cast.
    """
    return [] if label.get("scale") == "group" else label.get("scores") or []


def label_arrays(groups: list[dict]) -> Labels:
    """Labels of groups that all have the same number of candidates C; without groups C is 0."""
    ranks, scores = np.full((2, len(groups), len(groups[0]["candidates"]) if groups else 0, len(AXES)), np.nan)
    for g, group in enumerate(groups):
        for axis, label in group["labels"].items():
            ranks[g, :, AXES.index(axis)] = label["ranks"]
            scores[g, :, AXES.index(axis)] = common_scores(label) or np.nan
    return Labels(ranks, scores)


def has_method(candidate: dict, names: list[str]) -> bool:
    """Whether its method, or a part of it ("warp" in "warp+blur"), is one of the names."""
    return not set(names).isdisjoint([candidate["method"], *candidate["method"].split("+")])


def check_methods(folder: Path, names: list[str]) -> None:
    """Stop at a name in held_out_methods that no candidate of the data set has."""
    methods = {candidate["method"] for group in data.all_groups(folder) for candidate in group["candidates"]}
    known = methods | {part for method in methods for part in method.split("+")}
    for name in names:
        if name not in known:
            run.fail(f"held_out_methods: {folder} has no candidate of method {name!r}; "
                     f"did you mean {nearest(name, known)!r}?")


def leave_out(groups: list[dict], names: list[str]) -> list[dict]:
    """The groups without candidates of these methods and their labels; what has less than two left is dropped."""
    found = []
    for group in groups:
        kept = [c for c, candidate in enumerate(group["candidates"]) if not has_method(candidate, names)]
        labels = {axis: label | {key: [label[key][c] for c in kept] for key in ("ranks", "scores") if label.get(key)}
                  for axis, label in group["labels"].items()}
        if len(kept) > 1:
            found.append(group | {"candidates": [group["candidates"][c] for c in kept], "labels": labels})
    return found


def method_prior(groups: list[dict], train: list[dict], labels: Labels,
                 held_out: list[str] = ()) -> np.ndarray:
    """
    [G, C, 3] the mean label of a candidate's method in training; the mean of that table for an unseen method.

    labels: of `train`. Scores, or minus the ranks on an axis where not every training group has common ones. NaN where
    nothing is known. held_out: methods that training was not shown, and neither is this.
    """
    values = np.where(np.isnan(labels.scores).any((0, 1)), -labels.ranks, labels.scores)
    seen = {}
    for group, own in zip(train, values):
        for candidate, value in zip(group["candidates"], own):
            if has_method(candidate, held_out):
                continue
            seen.setdefault(candidate["method"], []).append(value)
    table = {method: column_means(np.stack(own)) for method, own in seen.items()}
    unseen = column_means(np.stack(list(table.values())))
    table = {method: np.where(np.isnan(own), unseen, own) for method, own in table.items()}
    return np.array([[table.get(candidate["method"], unseen) for candidate in group["candidates"]]
                     for group in groups])


def column_means(values: np.ndarray) -> np.ndarray:
    """Means over the first axis without NaN, as np.nanmean, which warns where there is nothing but NaN."""
    known = ~np.isnan(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / known.sum(0).clip(1), np.nan)
