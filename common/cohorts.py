"""
Cohorts: one LR image and its candidates with labels, as the reward model trains and is evaluated on them.

Also what decides who works on which cohort: picks are functions of (seed, step), shares of (rank, world size).
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import data, dist, labels, metrics, mllm, run
from common.mllm import AXES, Judge

IN_MEMORY = 2 * 2**30                   # bytes of a split's candidates that a process keeps; the last group whole


@dataclass
class Stored:
    """Pictures on disk, read each time that one is asked for; their number, or a slice of them, reads none."""
    folder: Path
    paths: list[str]
    sums: dict[str, str]                # path -> sha256

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            return Stored(self.folder, self.paths[i], self.sums)
        return data.read_checked(self.folder / self.paths[i], self.sums.get(self.paths[i]))


@dataclass
class Cohort:                           # one LR image and its C candidates
    id: str
    lr: np.ndarray                      # uint8 [h, w, 3]
    images: list[np.ndarray] | Stored   # C x uint8 [H, W, 3]
    methods: list[str]
    ranks: np.ndarray                   # [C, 3] 1 is best; NaN where an axis has no label
    targets: np.ndarray                 # [C, 3] 1..9, what the cold start teaches; NaN likewise


def load_cohorts(folder: Path, split: str, scale: list[np.ndarray] | None = None,
                 held_out: list[str] = ()) -> tuple[list[Cohort], list]:
    """
    Labeled cohorts of a split; `scale`: sorted label scores per axis, made from this split when not given.

    All LR images stay in memory, and the first candidates (see IN_MEMORY); the others are read when they are asked for.
    held_out: methods whose candidates are left out of training; elsewhere they have no label here.
    """
    groups = [g for g in data.load_groups(folder, split) if g["labels"]]
    groups = labels.leave_out(groups, held_out) if split == "train" and held_out else groups
    if not groups:
        run.fail(f"{folder}: the split {split} has no labels, so there is nothing to learn from: let people "
                 "compare (annotate=true and labels=human of 01), or build it with hr_dir or label=mllm"
                 + f" (held_out_methods={','.join(held_out)})" * bool(held_out))
    if scale is None:
        scale = [np.sort([s for g in groups for s in labels.common_scores(g["labels"].get(a, {}))]) for a in AXES]
    cohorts, room = [], IN_MEMORY
    for group in tqdm(groups, desc=f"read {split}", disable=not dist.is_main()):
        lr, _, _ = data.group_images(folder, group | {"candidates": [], "hr": None})
        images = Stored(folder, [c["path"] for c in group["candidates"]], group.get("sha256", {}))
        if room > 0:
            images = list(images)
            room -= sum(image.nbytes for image in images)
        ranks, targets = np.full((2, len(images), 3), np.nan)
        for a, axis in enumerate(AXES):
            if axis in group["labels"]:
                ranks[:, a] = group["labels"][axis]["ranks"]
                targets[:, a] = digit_targets(group["labels"][axis], scale[a])
        hidden = [labels.has_method(candidate, held_out) for candidate in group["candidates"]]
        ranks[hidden] = targets[hidden] = np.nan
        cohorts.append(Cohort(group["id"], lr, images, [c["method"] for c in group["candidates"]], ranks, targets))
    return cohorts, scale


def digit_targets(label: dict, scale: np.ndarray) -> np.ndarray:
    """Targets 1..9: quantile of the label's score among all training scores; else by rank in the group, all tied: 5."""
    scores, ranks = labels.common_scores(label), np.asarray(label["ranks"], float)
    if scores and len(scale):
        below, upto = (np.searchsorted(scale, scores, side) for side in ("left", "right"))
        return 1 + 4 * (below + upto) / len(scale)
    low, high = ranks.min(), ranks.max()                # held_out_methods may have taken the best
    return np.full(len(ranks), 5.0) if low == high else 9 - 8 * (ranks - low) / (high - low)


def pick(cohorts: list[Cohort], seed: int, phase: str, step: int, count: int) -> list[Cohort]:
    """
    The cohorts of a step: a walk through reshuffled epochs, a function of (seed, phase, step) alone.

    A step that goes on in the next epoch passes over what it has: twins would be given the same random numbers.
    """
    epoch, at = divmod(step * count, len(cohorts))
    order, after = (run.np_rng(seed, phase, "epoch", e).permutation(len(cohorts)) for e in (epoch, epoch + 1))
    chosen = order[at:at + count]
    rest = after[~np.isin(after, chosen)][:count - len(chosen)]
    return [cohorts[i] for i in (*chosen, *rest)]


def require_enough(cohorts: list, cfg, *keys: str) -> None:
    """Stop with one line if a step would have more cohorts, by one of these settings, than there are."""
    for key in keys:
        if vars(cfg)[key] > len(cohorts):
            run.fail(f"{key}={vars(cfg)[key]} is more than the {len(cohorts)} training groups that can be used: lower "
                     "it, or build a larger set with 01_build_dataset.py")


def mine(items: list) -> list:
    """This rank's share of a list: contiguous, so that gather_rows restores the order."""
    return [items[i] for i in np.array_split(np.arange(len(items)), dist.world_size())[dist.rank()]]


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
