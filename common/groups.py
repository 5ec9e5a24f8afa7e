"""
groups.jsonl of stage 01, read with distrust: types, numbers, ids, and files that lie inside the folder.

Images and preference groups on disk. Every image in memory is uint8 [H, W, 3], RGB.

Cohorts: one LR image and its candidates with labels, as the reward model trains and is evaluated on them.

Also what decides who works on which cohort: picks are functions of (seed, step), shares of (rank, world size).

LR and HR images of stage 01 as tensors, and pictures that show restorations side by side.

Labels of many groups as arrays, and what can be guessed of them from the names of the methods alone.
"""
import hashlib
import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import dist, run
from common.config import fail, nearest
from common.images import read_image
from common.metrics import AXES

SPLITS = ("train", "val", "test")
TYPES = {"id": str, "split": str, "source": str, "scale": int, "lr": str, "hr": (str, type(None)), "degradation": dict,
         "candidates": list, "labels": dict}                        # of the keys that a group must have
REBUILD = "build the data set again with 01_build_dataset.py into another run= folder"
IN_MEMORY = 2 * 2**30                   # bytes of a split's candidates that a process keeps; the last group whole


def read_groups(folder: Path) -> list[dict]:
    """The lines of folder/groups.jsonl; ValueError that names the line and what is wrong with it."""
    groups, ids = [], set()
    for number, line in enumerate((folder / "groups.jsonl").read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            group = json.loads(line, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if reason := wrong(group, folder):
            raise ValueError(f"line {number}: {reason}")
        if group["id"] in ids:
            raise ValueError(f"line {number}: the id {group['id']!r} is given twice")
        ids.add(group["id"])
        groups.append(group)
    return groups


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")                        # NaN and Infinity, which Python would accept


def files_of(group: dict) -> list[str]:
    """LR, candidates, and HR if there is one: paths relative to the folder of the set."""
    return [group["lr"], *(one["path"] for one in group["candidates"]), *([group["hr"]] if group["hr"] else [])]


def wrong(group: object, folder: Path) -> str | None:
    """What is wrong with a line of groups.jsonl, or None. Whether files are the ones of `sha256` shows on reading."""
    if reason := wrong_record(group):
        return reason
    for name in files_of(group):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return f"the path {name!r} leads out of {folder}: paths are relative to it"
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    return None


def wrong_record(group: object) -> str | None:
    """The same of the line alone, without a look at files."""
    if not isinstance(group, dict):
        return "expected a JSON object"
    if reason := wrong_types(group, TYPES):
        return reason
    if group["split"] not in SPLITS:
        return f"split {group['split']!r} is not one of {', '.join(SPLITS)}"
    if not group["candidates"]:
        return "no candidates"
    for candidate in group["candidates"]:
        if not isinstance(candidate, dict):
            return "a candidate is not a JSON object"
        if reason := wrong_types(candidate, {"id": str, "path": str, "method": str}):
            return f"{reason} in a candidate"
    for axis, label in group["labels"].items():
        if reason := wrong_label(axis, label, len(group["candidates"])):
            return reason
    if not isinstance(group.get("sha256", {}), dict):
        return "sha256 should be an object"
    more = set(group.get("sha256", {})) - set(files_of(group))
    return f"sha256 names {sorted(more)[0]!r}, which is no file of the group" if more else None


def wrong_types(record: dict, types: dict) -> str | None:
    for key, kind in types.items():
        if key not in record:
            return f"key {key!r} is missing"
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            return f"key {key!r} should be {names}, not {record[key]!r}"
    return None


def wrong_label(axis: str, label: object, count: int) -> str | None:
    """What is wrong with the label of `count` candidates on an axis, or None."""
    if axis not in AXES or not isinstance(label, dict) or not isinstance(label.get("ranks"), list):
        return f"labels of {axis!r}: expected one of {', '.join(AXES)}, with a list of ranks"
    for key in ("ranks", "scores"):
        values = label.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != count:
            return f"labels of {axis!r} do not fit the {count} candidates"
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            return f"labels of {axis!r}: {key} should be numbers, not {values!r}"
    return None


def load_groups(folder: str | Path, split: str) -> list[dict]:
    """
    Groups of one split ("train", "val", "test") of a finished stage 01, in file order. Stops with one line if
    groups.jsonl is damaged, a file is missing, or the split is empty.
    """
    assert split in SPLITS, split
    groups = [group for group in all_groups(folder) if group["split"] == split]
    if not groups:
        fail(f"{Path(folder) / 'groups.jsonl'} has no group in the split {split!r}: build one with more "
                 "photographs or groups")
    return groups


def all_groups(folder: str | Path) -> list[dict]:
    """Groups of all splits of a finished stage 01, in file order; stops like load_groups."""
    path = Path(folder) / "groups.jsonl"
    try:
        return read_groups(Path(folder))
    except FileNotFoundError:
        fail(f"{path} is missing: {REBUILD}")
    except ValueError as error:
        fail(f"{path} {error}: {REBUILD}")


def read_checked(path: Path, wanted: str | None) -> np.ndarray:
    """read_image of a file that has to have the sha256 `wanted`; stops with one line. None: any."""
    try:
        content = path.read_bytes()
        if wanted and hashlib.sha256(content).hexdigest() != wanted:
            raise ValueError("its checksum is not the one of groups.jsonl")
        return read_image(io.BytesIO(content))
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}): {REBUILD}")


def group_images(folder: str | Path, group: dict) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """(lr [h, w, 3], candidates K times [H, W, 3], hr [H, W, 3] or None) of one group, uint8."""
    folder, sums = Path(folder), group.get("sha256", {})
    images = [read_checked(folder / name, sums.get(name)) for name in files_of(group)]
    count = len(group["candidates"])
    return images[0], images[1:1 + count], images[1 + count] if group["hr"] else None


@lru_cache(maxsize=4096)
def read_pixels(path: Path, sha256: str | None) -> np.ndarray:
    return read_checked(path, sha256)


def image_batch(source: Path, groups: list[dict], key: str) -> Tensor:
    """The "lr" or "hr" images of stage 01's groups, all of one size: [B, 3, height, width] in 0..1."""
    pixels = np.stack([read_pixels(source / group[key], group.get("sha256", {}).get(group[key])) for group in groups])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()


def require_one_size(source: Path, groups: list[dict]) -> None:
    """Stop unless all LR images have one size and scale, as batches need; only imports can mix them."""
    first = None
    for group in groups:
        with Image.open(source / group["lr"]) as image:         # the header alone
            size = f"{image.width}x{image.height}, scale {group['scale']}"
        first = first or size
        if size != first:
            fail(f"{source / group['lr']} is {size}, but {groups[0]['lr']} is {first}: 04 and 05 need LR images of "
                     "one size and scale; import each into its own run=")


def judged_on(source: Path) -> dict[str, int]:
    """hr_size (px) and scale of the images that the judge learned on, as they are: an import ignores the settings."""
    group = load_groups(source, "train")[0]
    with Image.open(source / group["lr"]) as image:
        return {"hr_size": image.width * group["scale"], "scale": group["scale"]}


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
    methods = {candidate["method"] for group in all_groups(folder) for candidate in group["candidates"]}
    known = methods | {part for method in methods for part in method.split("+")}
    for name in names:
        if name not in known:
            fail(f"held_out_methods: {folder} has no candidate of method {name!r}; "
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
        return read_checked(self.folder / self.paths[i], self.sums.get(self.paths[i]))


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
    groups = [g for g in load_groups(folder, split) if g["labels"]]
    groups = leave_out(groups, held_out) if split == "train" and held_out else groups
    if not groups:
        fail(f"{folder}: the split {split} has no labels, so there is nothing to learn from: let people "
                 "compare (annotate=true and labels=human of 01), or build it with hr_dir"
                 + f" (held_out_methods={','.join(held_out)})" * bool(held_out))
    if scale is None:
        scale = [np.sort([s for g in groups for s in common_scores(g["labels"].get(a, {}))]) for a in AXES]
    cohorts, room = [], IN_MEMORY
    for group in tqdm(groups, desc=f"read {split}", disable=not dist.is_main()):
        lr, _, _ = group_images(folder, group | {"candidates": [], "hr": None})
        images = Stored(folder, [c["path"] for c in group["candidates"]], group.get("sha256", {}))
        if room > 0:
            images = list(images)
            room -= sum(image.nbytes for image in images)
        ranks, targets = np.full((2, len(images), 3), np.nan)
        for a, axis in enumerate(AXES):
            if axis in group["labels"]:
                ranks[:, a] = group["labels"][axis]["ranks"]
                targets[:, a] = digit_targets(group["labels"][axis], scale[a])
        hidden = [has_method(candidate, held_out) for candidate in group["candidates"]]
        ranks[hidden] = targets[hidden] = np.nan
        cohorts.append(Cohort(group["id"], lr, images, [c["method"] for c in group["candidates"]], ranks, targets))
    return cohorts, scale


def digit_targets(label: dict, scale: np.ndarray) -> np.ndarray:
    """Targets 1..9: quantile of the label's score among all training scores; else by rank in the group, all tied: 5."""
    scores, ranks = common_scores(label), np.asarray(label["ranks"], float)
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
            fail(f"{key}={vars(cfg)[key]} is more than the {len(cohorts)} training groups that can be used: lower "
                     "it, or build a larger set with 01_build_dataset.py")
