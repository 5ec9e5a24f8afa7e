"""
Preference groups of stage 01: groups.jsonl, read with distrust, and the labels and cohorts that 02 and 03 make of it.

A line is a JSON object about one LR image and its candidates; paths are relative to the folder:

    id, split, source   unique text; train, val or test; the photograph, whose crops all share a split
    scale               pixels of a candidate per pixel of LR, along a side
    lr, hr              paths; hr is null where there is no ground truth
    degradation         how LR was made of HR (degrade.py), {} if not here
    candidates          C objects with id, path and method; the method "warp+blur" has two parts
    labels              axis -> {"ranks": C numbers, 1 is best, "scores": C numbers or null,
                        "source": proxy, human, import};
                        with "scale": "group" the scores compare inside the group only
    sha256              path -> hex digest of the file, checked whenever it is read

Shapes: G groups, C candidates of each, 3 axes as in AXES. Images are uint8 [H, W, 3].
"""
import hashlib
import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import dist, run
from common.config import fail, nearest
from common.images import from_pixels, read_image
from common.metrics import AXES, pair_hits

SPLITS = ("train", "val", "test")
TYPES = {"id": str, "split": str, "source": str, "scale": int, "lr": str, "hr": (str, type(None)), "degradation": dict,
         "candidates": list, "labels": dict}                        # of the keys that a group must have
REBUILD = "build the data set again with 01_build_dataset.py into another run= folder"
IN_MEMORY = 2 * 2**30                   # bytes of a split's candidates that a process keeps; the last group whole


# groups.jsonl ----------------------------------------------------------------------------------------------

def all_groups(folder: str | Path) -> list[dict]:
    """Groups of all splits of a finished stage 01, in file order; stops with one line if a group is not as above."""
    path, groups, ids = Path(folder) / "groups.jsonl", [], set()
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        fail(f"{path} is missing: {REBUILD}")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            group = json.loads(line, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            fail(f"{path} line {number} is not JSON ({error}): {REBUILD}")
        try:
            check_group(group, Path(folder))
            if group["id"] in ids:
                raise ValueError(f"the id {group['id']!r} is given twice")
        except ValueError as error:
            fail(f"{path} line {number}: {error}: {REBUILD}")
        ids.add(group["id"])
        groups.append(group)
    return groups


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")                        # NaN and Infinity, which Python would accept


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_group(group: object, folder: Path) -> None:
    """ValueError that says what is wrong with a line. Whether a file has its `sha256` shows when it is read."""
    need(isinstance(group, dict), "expected a JSON object")
    check_types(group, TYPES, "")
    need(group["split"] in SPLITS, f"split {group['split']!r} is not one of {', '.join(SPLITS)}")
    need(len(group["candidates"]) > 0, "no candidates")
    for candidate in group["candidates"]:
        need(isinstance(candidate, dict), "a candidate is not a JSON object")
        check_types(candidate, {"id": str, "path": str, "method": str}, " in a candidate")
    for axis, label in group["labels"].items():
        check_label(axis, label, len(group["candidates"]))
    need(isinstance(group.get("sha256", {}), dict), "sha256 should be an object")
    for name in files_of(group):
        path = PurePosixPath(name)
        need(not path.is_absolute() and ".." not in path.parts,
             f"the path {name!r} leads out of {folder}: paths are relative to it")
        need((folder / name).is_file(), f"{folder / name} is missing")


def check_types(record: dict, types: dict[str, type | tuple], where: str) -> None:
    """ValueError that names the key that the record lacks, or whose value is not of its type."""
    for key, kind in types.items():
        need(key in record, f"key {key!r} is missing{where}")
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        need(isinstance(record[key], kind) and not isinstance(record[key], bool),
             f"key {key!r} should be {names}, not {record[key]!r}{where}")


def check_label(axis: str, label: object, count: int) -> None:
    """ValueError that says what is wrong with the label of `count` candidates on an axis."""
    need(axis in AXES and isinstance(label, dict) and isinstance(label.get("ranks"), list),
         f"labels of {axis!r}: expected one of {', '.join(AXES)}, with a list of ranks")
    for key in ("ranks", "scores"):
        values = label.get(key)
        if values is not None:
            need(isinstance(values, list) and len(values) == count,
                 f"labels of {axis!r} do not fit the {count} candidates")
            need(all(type(value) in (int, float) and math.isfinite(value) for value in values),
                 f"labels of {axis!r}: {key} should be numbers, not {values!r}")


def load_groups(folder: str | Path, split: str) -> list[dict]:
    """Groups of one split of a finished stage 01, in file order; stops like all_groups, and if there are none."""
    return in_split(folder, all_groups(folder), split)


def in_split(folder: str | Path, groups: list[dict], split: str) -> list[dict]:
    """Those of `folder`'s groups that are in a split; stops with one line if there are none."""
    groups = [group for group in groups if group["split"] == split]
    if not groups:
        fail(f"{Path(folder) / 'groups.jsonl'} has no group in the split {split!r}: build one with more "
             "photographs or groups")
    return groups


# images ----------------------------------------------------------------------------------------------------

def files_of(group: dict) -> list[str]:
    """LR, candidates, and HR if there is one."""
    return [group["lr"], *(one["path"] for one in group["candidates"]), *([group["hr"]] if group["hr"] else [])]


def read_checked(path: Path, sha256: str | None) -> np.ndarray:
    """read_image of a file that has to have this digest; None: any. Stops with one line."""
    try:
        content = path.read_bytes()
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its checksum is not the one of groups.jsonl")
        return read_image(io.BytesIO(content))
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}): {REBUILD}")


def group_images(folder: str | Path, group: dict) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """(lr [h, w, 3], candidates C times [H, W, 3], hr [H, W, 3] or None) of one group, uint8."""
    sums = group.get("sha256", {})
    images = [read_checked(Path(folder) / name, sums.get(name)) for name in files_of(group)]
    count = len(group["candidates"])
    return images[0], images[1:1 + count], images[1 + count] if group["hr"] else None


def lr_image(folder: str | Path, group: dict) -> np.ndarray:
    """The LR image alone."""
    return read_checked(Path(folder) / group["lr"], group.get("sha256", {}).get(group["lr"]))


read_often = lru_cache(maxsize=4096)(read_checked)                  # training of 04 comes back to the same few


def image_batch(folder: Path, groups: list[dict], key: str) -> Tensor:
    """The "lr" or "hr" images of groups, all of one size: [B, 3, height, width] in 0..1."""
    pixels = np.stack([read_often(folder / group[key], group.get("sha256", {}).get(group[key])) for group in groups])
    return from_pixels(pixels).contiguous()


def require_one_size(folder: Path, groups: list[dict]) -> None:
    """Stop unless all LR images have one size and scale, as batches need; only imports can mix them."""
    first = None
    for group in groups:
        with Image.open(folder / group["lr"]) as image:             # the header alone
            size = f"{image.width}x{image.height}, scale {group['scale']}"
        first = first or size
        if size != first:
            fail(f"{folder / group['lr']} is {size}, but {groups[0]['lr']} is {first}: 04 and 05 need LR images of "
                 "one size and scale; import each into its own run=")


def shown_sizes(folder: Path, groups: list[dict], crop: int = 0) -> set[tuple[int, int]]:
    """(height, width) of the groups' candidates, or of what a crop of so many px leaves of them, px."""
    sizes = set()
    for group in groups:
        with Image.open(folder / group["lr"]) as image:             # the header alone
            sides, scale = (image.height, image.width), group["scale"]
        sizes.add(tuple(scale * min(side, max(1, crop // scale) if crop else side) for side in sides))
    return sizes


def judged_on(folder: Path) -> dict[str, int]:
    """hr_size (px) and scale of the images that the judge learned on, as they are: an import ignores the settings."""
    group = all_groups(folder)[0]                                   # any split: an import may have a test split only
    with Image.open(folder / group["lr"]) as image:
        return {"hr_size": image.width * group["scale"], "scale": group["scale"]}


# labels ----------------------------------------------------------------------------------------------------

@dataclass
class Labels:                           # NaN where a group has no label on an axis
    ranks: np.ndarray                   # [G, C, 3] 1 is best
    scores: np.ndarray                  # [G, C, 3] proxy score or MOS; NaN, too, where there are no common_scores


def common_scores(label: dict) -> list[float]:
    """
    A label's scores, if those of different groups compare; else [].

    Strengths from people's votes do not: one group's are spread wider than another's where more votes were cast.
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


def check_methods(folder: Path, groups: list[dict], names: list[str]) -> None:
    """Stop at a name in held_out_methods that no candidate of the data set in `folder` has."""
    methods = {candidate["method"] for group in groups for candidate in group["candidates"]}
    known = methods | {part for method in methods for part in method.split("+")}
    for name in names:
        if name not in known:
            fail(f"held_out_methods: {folder} has no candidate of method {name!r}; "
                 f"did you mean {nearest(name, known)!r}?")


def leave_out(groups: list[dict], names: list[str]) -> list[dict]:
    """The groups without candidates of these methods and their labels; what has less than two left is dropped."""
    result = []
    for group in groups:
        rest = [c for c, candidate in enumerate(group["candidates"]) if not has_method(candidate, names)]
        labels = {axis: label | {key: [label[key][c] for c in rest] for key in ("ranks", "scores", "votes")
                                 if isinstance(label.get(key), list)}
                  for axis, label in group["labels"].items()}
        if len(rest) > 1:
            result.append(group | {"candidates": [group["candidates"][c] for c in rest], "labels": labels})
    return result


def method_prior(groups: list[dict], train: list[dict]) -> np.ndarray:
    """
    [G, C, 3] what can be guessed without a look at the image: the mean label of a candidate's method in `train`; of an
    unseen method, the mean over methods. NaN on an axis without labels.

    Labels are scores, or minus the ranks on an axis where not every group of `train` has scores that compare.
    """
    table = {}                                                      # method -> labels [n, 3]
    for group in train:
        labels = label_arrays([group])
        for candidate, rank, score in zip(group["candidates"], labels.ranks[0], labels.scores[0]):
            table.setdefault(candidate["method"], []).append([-rank, score])
    has_scores = ~np.isnan([score for rows in table.values() for _, score in rows]).any(0)                      # [3]
    table = {method: mean_known([np.where(has_scores, score, rank) for rank, score in rows])
             for method, rows in table.items()}
    unseen = mean_known(list(table.values()))
    table = {method: np.where(np.isnan(values), unseen, values) for method, values in table.items()}
    return np.array([[table.get(candidate["method"], unseen) for candidate in group["candidates"]]
                     for group in groups])


def left_out_prior(groups: list[dict]) -> np.ndarray:
    """
    [G, C, 3] the same without training labels: minus the mean rank of a candidate's method over the *other* LR images;
    of a method that they lack, the mean over methods. NaN on an axis without labels.
    """
    names = sorted({candidate["method"] for group in groups for candidate in group["candidates"]})
    index = np.array([[names.index(candidate["method"]) for candidate in group["candidates"]] for group in groups])
    ranks = label_arrays(groups).ranks                                                      # [G, C, 3]
    sums, counts = np.zeros((2, len(groups), len(names), len(AXES)))
    for g in range(len(groups)):
        np.add.at(sums[g], index[g], np.nan_to_num(ranks[g]))
        np.add.at(counts[g], index[g], ~np.isnan(ranks[g]))
    with np.errstate(invalid="ignore"):                                                     # 0 / 0: they lack it
        means = (sums.sum(0) - sums) / (counts.sum(0) - counts)                             # [G, methods, 3]
    means = np.where(np.isnan(means), np.ma.masked_invalid(means).mean(1, keepdims=True).filled(np.nan), means)
    return -np.take_along_axis(means, index[..., None], 1)


def mean_known(rows: list[np.ndarray]) -> np.ndarray:
    """As np.nanmean, which warns where there is nothing but NaN."""
    return np.ma.masked_invalid(rows).mean(0).filled(np.nan)


# cohorts: what 02 trains on --------------------------------------------------------------------------------

@dataclass
class OnDisk:
    """Candidates that memory has no room for: each is read whenever it is asked for."""
    folder: Path
    paths: list[str]
    sums: dict[str, str]                # path -> sha256

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        return read_checked(self.folder / self.paths[i], self.sums.get(self.paths[i]))


@dataclass
class Cohort:                           # one LR image and its C candidates
    id: str
    lr: np.ndarray                      # uint8 [h, w, 3]
    images: list[np.ndarray] | OnDisk   # C x uint8 [H, W, 3]
    methods: list[str]
    ranks: np.ndarray                   # [C, 3] 1 is best; NaN where an axis has no label
    targets: np.ndarray                 # [C, 3] 1..9, what the cold start teaches; NaN likewise


def load_cohorts(folder: Path, groups: list[dict], split: str, scale: list[np.ndarray] | None = None,
                 held_out: list[str] = ()) -> tuple[list[Cohort], list[np.ndarray]]:
    """
    Labeled cohorts of a split of `folder`'s groups; `scale`: sorted label scores per axis, of this split if not given.

    All LR images stay in memory, and the first candidates (see IN_MEMORY); the others are read when they are asked for.
    held_out: methods whose candidates are left out of training; elsewhere they have no label here.
    """
    groups = [group for group in in_split(folder, groups, split) if group["labels"]]
    groups = leave_out(groups, held_out) if split == "train" and held_out else groups
    if not groups:
        fail(f"{folder}: the split {split} has no labels, so there is nothing to learn from: let people compare "
             "(annotate=true and labels=human of 01), or build it with hr_dir"
             + f" (held_out_methods={','.join(held_out)})" * bool(held_out))
    if scale is None:
        scale = [np.sort([s for group in groups for s in common_scores(group["labels"].get(axis, {}))])
                 for axis in AXES]
    cohorts, room = [], IN_MEMORY
    for group in tqdm(groups, desc=f"read {split}", disable=not dist.is_main()):
        images = OnDisk(folder, [candidate["path"] for candidate in group["candidates"]], group.get("sha256", {}))
        if room > 0:
            images = list(images)
            room -= sum(image.nbytes for image in images)
        ranks, targets = label_arrays([group]).ranks[0], np.full((len(images), len(AXES)), np.nan)
        for axis, label in group["labels"].items():
            targets[:, AXES.index(axis)] = digit_targets(label, scale[AXES.index(axis)])
        hidden = [has_method(candidate, held_out) for candidate in group["candidates"]]
        ranks[hidden] = targets[hidden] = np.nan
        methods = [candidate["method"] for candidate in group["candidates"]]
        cohorts.append(Cohort(group["id"], lr_image(folder, group), images, methods, ranks, targets))
    if not any(len(pair_hits(ranks, ranks)[0]) for cohort in cohorts for ranks in cohort.ranks.T):
        fail(f"{folder}: the labels of the split {split} tell no two candidates apart: add labels (annotate=true and "
             "labels=human of 01), lower tie_margin in another run=, or name fewer held_out_methods")
    return cohorts, scale


def digit_targets(label: dict, scale: np.ndarray) -> np.ndarray:
    """Targets 1..9: quantile of the label's score among all training scores; else by rank in the group, all tied: 5."""
    scores, ranks = common_scores(label), np.asarray(label["ranks"], float)
    if scores and len(scale):
        below, upto = (np.searchsorted(scale, scores, side) for side in ("left", "right"))
        return 1 + 4 * (below + upto) / len(scale)
    low, high = ranks.min(), ranks.max()                # held_out_methods may have taken the best
    return np.full(len(ranks), 5.0) if low == high else 9 - 8 * (ranks - low) / (high - low)


def pick(items: list, seed: int, phase: str, step: int, count: int) -> list:
    """
    The cohorts or groups of a step: a walk through reshuffled epochs, a function of (seed, phase, step) alone.

    A step that reaches into the next epoch skips what it already has there: an item would come twice, with the same
    random numbers.
    """
    epoch, at = divmod(step * count, len(items))
    order, after = (run.np_rng(seed, phase, "epoch", e).permutation(len(items)) for e in (epoch, epoch + 1))
    chosen = order[at:at + count]
    rest = after[~np.isin(after, chosen)][:count - len(chosen)]
    return [items[i] for i in (*chosen, *rest)]


def require_enough(count: int, **settings: int) -> None:
    """Stop with one line if a step would have more groups, by one of these settings, than the `count` there are."""
    for name, value in settings.items():
        if value > count:
            fail(f"{name}={value} is more than the {count} training groups that can be used: lower it, or build a "
                 "larger set with 01_build_dataset.py")
