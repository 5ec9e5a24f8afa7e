"""
Build the preference data set: photographs -> crops -> LR images -> several SR candidates per LR -> rankings.

Run     python 01_build_dataset.py configs/demo.yaml                         # two CPU cores, 4 min
        python 01_build_dataset.py configs/demo.yaml hr_dir=/my/photographs run=runs/mine
        python 01_build_dataset.py configs/demo.yaml annotate=true           # then people compare candidates
        python 01_build_dataset.py configs/demo.yaml labels=human            # and what they said becomes the labels
        torchrun --standalone --nproc_per_node=8 01_build_dataset.py configs/full.yaml   # hf: models on 8 GPUs
Reads   photographs (hr_dir), LR-only images (lr_dir), or a preference set that exists (import_from); outputs of other
        SR programs (candidates)
Writes  <run>/01_build_dataset/   groups.jsonl (one line per LR image)  hr/  lr/  candidates/  skipped.jsonl
                                  contact_sheet.png (look at it)
                                  base/ (base_steps: the SR policy whose samples are candidates, and 04's start)
                                  config.yaml  manifest.json (how many labels, what names alone explain, LR-PSNR of
                                  the ground truth)
                                  judgements.jsonl  annotation_report.md (if people judge)
Expect  demo: 3290 groups, 19740 candidates; a table of method means gets about 0.73 of the test pairs right.

The labels are a PROXY for human preference, computed with the ground truth (common/metrics.py): consistency
compares the down-sampled candidate with the down-sampled HR image; naturalness compares the local detail with the
natural image that the candidate was made from, before a fault was added; overall is the lower of consistency and
the same comparison of detail with the HR image.
"""
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import annotate, base_policy, candidates, degrade, dist, imports, metrics, run, sources
from common.config import fail, load_config, nearest
from common.groups import SPLITS, all_groups, label_arrays, method_prior
from common.images import TEXTURES, evenly, find, luma, read_image, resize, sheet, to_float, to_uint8, write_png
from common.metrics import AXES, OVERALL

ZOOM = 0.25, 0.5        # photographs are shrunk by a random factor: many scales, and each pixel as sharp as can be
MIN_DETAIL = 8.0        # std of the luma (of 255): in flatter crops, such as sky, all candidates look alike
CROP_TRIES = 20         # draws until a crop has that much detail; then the best of them is taken
TEXTURE_SHARE = 0.2     # of max_source_share, for photographs of scikit-image that are texture and no scene
DOUBLE_FAULT = 0.6      # probability of an unnatural fault on top of an inconsistent one: names then say less of a rank
PAINTED = 0.2           # probability that an image of the base policy is painted over
FAULT_ON_PARTIAL = 0.8  # probability that an unnatural fault starts from a partial image, not from the ground truth
DOUBLE_STRONGEST = 0.5  # two faults of up to this strength weigh about as much as one of up to 1 (measured)
PRIOR_LIMIT = 0.8       # more of the test pairs explained by method names alone gets a warning
SHEET_ROWS = 8          # groups on contact_sheet.png
TRUTH_IMAGES = 500      # ground truth whose LR-PSNR is measured, evenly spaced
CROPS_PER_JOB = 32      # of one photograph: enough to read it seldom, few enough for many cores
WAIT = timedelta(days=2)        # under torchrun, for the longest work that the main rank does alone
FREE = ("annotate", "annotate_host", "annotate_port", "annotate_show", "annotate_groups", "labels", "workers",
        "hf_batch")             # may change: use of a finished set, and speed


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    # photographs --------------------------------------------------------------------------------------------
    hr_dir: str | None = "skimage"      # folder; `skimage`: the photographs in scikit-image's and matplotlib's wheels
    lr_dir: str | None = None           # instead: folder of LR images without ground truth; no labels then
    hr_size: int = 512                  # px, side of a crop and of every candidate
    scale: int = 4                      # HR side / LR side
    degradation: str = "realesrgan"     # realesrgan, light, mild (ours, for tiny images) or bicubic
    max_source_share: float = 0.15      # most of the groups of its split that one photograph gives, textures a fifth of
                                        # it; in proportion more where the photographs are too few
    # instead: a preference set that exists; common/imports.py documents its two layouts ---------------------
    import_from: str | None = None      # a table (.csv, .jsonl), or a folder of numbered folders as in RefSR-18K
                                        # (hf download casyssong/RefSR-18K --repo-type dataset --local-dir FOLDER)
    import_roles: list[str] = field(default_factory=list)   # of such a folder: which file is what, as ROLE=PATTERN
    # groups: one LR image and its candidates ------------------------------------------------------------------
    train_groups: int = 20000           # LR images per split
    val_groups: int = 200               # the same for validation
    test_groups: int = 500              # and for the test
    val_sources: list[str] = field(default_factory=list)    # names without suffix; empty: val_fraction
    test_sources: list[str] = field(default_factory=list)   # the same for the test split
    val_fraction: float = 0.05          # part of the photographs, chosen by a hash of seed and name
    test_fraction: float = 0.1          # the same for the test split
    # candidates: one entry each: hr, resample, inconsistent, unnatural, base, partial (`a|b`: by chance),
    # folder:NAME=PATH (outputs of any SR program, matched by file name), hf:NAME=MODEL (id or path), perhaps followed
    # by ?seeds=2&steps=10+20&guidance=1+4 (all combinations, joined by + and not by commas); see common/sources.py
    candidates: list[str] = field(default_factory=lambda: list(sources.BUILT_IN))   # see above
    base_steps: int = 0                 # training steps of the base policy (common/base_policy.py); 0: none
    hf_prompt: str = ""                 # what hf: pipelines with text are told; guidance above 1 needs one
    hf_batch: int = 1                   # LR images at once through an hf: model: memory and speed, and rounding
    tie_margin: float = 0.05            # of scores in 0..1; smaller differences share a rank: nobody would see them
    # people, once the data set is built (see common/annotate.py) ----------------------------------------------
    annotate: bool = False              # serve the page on which people compare candidates
    annotate_host: str = "127.0.0.1"    # this machine alone; 0.0.0.0 lets others in who know the address
    annotate_port: int = 0              # 0: any free one
    annotate_show: int = 2              # candidates at once: 2 to pick from, or 4 to rank
    annotate_groups: int = 50           # LR images per split that the page asks about, evenly spaced; 0: all
    labels: str | None = None           # human: those from judgements.jsonl; proxy: as built; null: as they are
    # speed only ---------------------------------------------------------------------------------------------
    workers: int = 0                    # processes, 0: one per core that it may use; memory and speed

    def __post_init__(self):
        assert [self.hr_dir, self.lr_dir, self.import_from].count(None) == 2, \
            "set one of hr_dir and lr_dir and import_from, and the others to null"
        imports.parse_roles(self.import_roles)
        assert self.scale >= 1 and self.hr_size % self.scale == 0 and self.hr_size // self.scale >= 4, \
            f"hr_size {self.hr_size} should be a multiple of scale {self.scale} and at least 4 times as large"
        assert self.degradation in degrade.KINDS, \
            f"degradation should be one of {', '.join(degrade.KINDS)}, got {self.degradation!r}"
        assert self.max_source_share, "max_source_share should be above 0"
        for key in ("max_source_share", "val_fraction", "test_fraction", "tie_margin"):
            assert 0 <= vars(self)[key] <= 1, f"{key} should be in 0..1, got {vars(self)[key]}"
        least = {"train_groups": 1, "hf_batch": 1, "val_groups": 0, "test_groups": 0, "annotate_groups": 0,
                 "workers": 0, "base_steps": 0}
        for key, value in least.items():
            assert vars(self)[key] >= value, f"{key} should be {value} or more, got {vars(self)[key]}"
        assert self.annotate_show in (2, 4), f"annotate_show should be 2 or 4, got {self.annotate_show}"
        assert self.labels in (None, "human", "proxy"), f"labels should be human or proxy, got {self.labels!r}"
        assert 0 <= self.annotate_port < 2**16, f"annotate_port should be in 0..65535, got {self.annotate_port}"
        assert len(self.sources) >= 2, "candidates: at least two are needed to compare"
        for source in self.sources:
            assert not self.lr_dir or set(source.get("kinds", [])) <= {"resample"}, \
                "candidates: hr, inconsistent and unnatural need ground truth, which lr_dir has not"
            from_base = not self.import_from and {"base", "partial"} & set(source.get("kinds", []))
            assert not from_base or self.hr_dir and self.base_steps, \
                "candidates: base and partial need hr_dir, and base_steps above 0"
            assert self.hf_prompt or source.get("guidance", 1) <= 1, \
                "candidates: guidance compares with an empty prompt, so it needs hf_prompt"

    @property
    def sources(self) -> list[dict]:
        """The setting `candidates`, one dict per candidate of a group."""
        return sources.expand(self.candidates)

    @property
    def crop_size(self) -> int:
        return self.hr_size if self.hr_dir else self.hr_size // self.scale


# photographs and their splits --------------------------------------------------------------------------------

def usable_photographs(cfg: Config, folder: Path, pool: ProcessPoolExecutor | None) -> list[dict]:
    """[{source, path, area, sha256}] of what can be used; the others go to skipped.jsonl."""
    pictures = find(cfg.hr_dir or cfg.lr_dir, "hr_dir" if cfg.hr_dir else "lr_dir")
    jobs = [{"id": str(path), "files": [str(path)]} for _, path in pictures]
    facts = run_jobs(pool, partial(survey, cfg.crop_size), jobs, folder / "progress" / "survey.jsonl")
    usable, skipped, seen = [], [], {}
    for source, path in pictures:
        fact = facts[str(path)]
        if "reason" not in fact and fact["sha256"] in seen:                    # it could lie in two splits
            fact = {"reason": f"same pixels as {seen[fact['sha256']]}"}
        if "reason" in fact:
            skipped.append({"path": str(path), "reason": fact["reason"]})
        else:
            seen[fact["sha256"]] = str(path)
            usable.append({"source": source, "path": str(path)} | fact)
    run.write_lines(folder / "skipped.jsonl", skipped)
    print(f"{len(usable)} pictures, {len(skipped)} skipped" + (", see skipped.jsonl" if skipped else ""))
    if not usable:
        fail(f"{cfg.hr_dir or cfg.lr_dir}: none of {len(pictures)} pictures can be used, the first because "
             f"{skipped[0]['path']}: {skipped[0]['reason']}; give others")
    return usable


def survey(size: int, job: dict) -> dict:
    """
    {area, sha256 of the pixels} of the picture job["id"], or {reason} if it is unusable.

    area: px in tiles of size x size, the size of a crop, whose luma has a standard deviation of at least MIN_DETAIL.
    """
    try:
        image = read_image(job["id"])
    except ValueError as error:
        return {"reason": str(error)}
    height, width = image.shape[:2]
    if min(height, width) < size:
        return {"reason": f"{width}x{height} is smaller than one crop of {size}x{size}"}
    rows, columns = height // size, width // size
    tiles = luma(image)[:rows * size, :columns * size].reshape(rows, size, columns, size)
    lively = int((tiles.std(axis=(1, 3)) >= MIN_DETAIL).sum())
    if lively == 0:
        return {"reason": f"nearly flat everywhere (no tile has a standard deviation of {MIN_DETAIL:g} of 255)"}
    return {"area": lively * size**2, "sha256": hashlib.sha256(image.tobytes()).hexdigest()}


def split_sources(cfg: Config, names: list[str]) -> dict[str, str]:
    """
    Source name -> split: val_sources and test_sources, or where these are empty val_fraction and test_fraction of all
    sources (at least one, unless it is 0) in the order of a hash of seed and name. The rest is for training.
    """
    named = {"val": cfg.val_sources, "test": cfg.test_sources}
    fractions = {"test": cfg.test_fraction if cfg.test_groups else 0, "val": cfg.val_fraction if cfg.val_groups else 0}
    splits = {}
    for split, wanted in named.items():
        for name in wanted:
            if name not in names:
                fail(f"{split}_sources: there is no usable picture {name!r}; did you mean {nearest(name, names)!r}?")
            if name in splits:
                fail(f"{split}_sources: {name!r} is given twice: a picture has one split")
            splits[name] = split
    free = sorted((name for name in names if name not in splits),
                  key=lambda name: hashlib.sha256(f"{cfg.seed} {name}".encode(errors="surrogateescape")).digest())
    for split, fraction in fractions.items():
        count = max(1, round(fraction * len(names))) if fraction and not named[split] else 0
        splits |= dict.fromkeys(free[:count], split)
        free = free[count:]
    if not free:
        fail(f"{len(names)} usable picture(s) leave none for training: add some, or set val_groups=0 and test_groups=0")
    return splits | dict.fromkeys(free, "train")


def shares(photographs: list[dict], count: int, cap: float, textures: tuple[str, ...] = ()) -> list[int]:
    """
    `count` groups over photographs [{source, area}], in proportion to the area; what a source has above its share goes
    to the others. The share is `cap`, of `textures` TEXTURE_SHARE of it; all are lifted where there are few sources.
    """
    total = {}
    for photo in photographs:
        total[photo["source"]] = total.get(photo["source"], 0) + photo["area"]
    weight = {name: area / sum(total.values()) for name, area in total.items()}
    caps = {name: cap * (TEXTURE_SHARE if name in textures else 1) for name in total}
    lift = max(1, 1 / max(1e-9, sum(caps.values())))
    caps = {name: lift * share for name, share in caps.items()}
    full = set()
    while any(weight[name] > caps[name] + 1e-9 for name in weight):
        full |= {name for name in weight if weight[name] >= caps[name]}
        rest = sum(total[name] for name in weight if name not in full)
        left = 1 - sum(caps[name] for name in full)
        weight = {name: caps[name] if name in full else left * total[name] / rest for name in weight}
    ends = np.cumsum([count * weight[p["source"]] * p["area"] / total[p["source"]] for p in photographs])
    return np.diff(np.round(ends), prepend=0).astype(int).tolist()


def plan_groups(cfg: Config, photographs: list[dict]) -> list[dict]:
    """One {id, split, source, path, sha256, foreign} per LR image; foreign: id of a group to take content from."""
    splits, plan = split_sources(cfg, sorted({photo["source"] for photo in photographs})), []
    textures = TEXTURES if cfg.hr_dir == "skimage" else ()
    for split, count in zip(SPLITS, (cfg.train_groups, cfg.val_groups, cfg.test_groups)):
        members = [photo for photo in photographs if splits[photo["source"]] == split]
        if count and not members:
            fail(f"{split}_groups={count}, but no picture is for {split}: raise {split}_fraction")
        chosen = np.repeat(members, shares(members, count, cfg.max_source_share, textures)).tolist()
        groups = [{"id": f"{split}_{number:05d}", "split": split, "source": photo["source"], "path": photo["path"],
                   "sha256": photo["sha256"]} for number, photo in enumerate(chosen)]
        for group in groups:
            rng = run.np_rng(cfg.seed, "foreign", group["id"])
            for _ in range(20):                             # of another source, unless so many draws find none
                other = groups[rng.integers(len(groups))]
                if other["source"] != group["source"]:
                    break
            plan.append(group | {"foreign": other["id"]})
    return plan


def plan_import(cfg: Config) -> list[dict]:
    """The groups of import_from with id and split: the split that the set gives, else by source as for photographs."""
    groups = imports.read(Path(cfg.import_from), imports.parse_roles(cfg.import_roles))
    splits = {group["source"]: group["split"] for group in groups}
    if None in splits.values() and cfg.test_fraction == 1:                      # a set to measure with
        splits = dict.fromkeys(splits, "test")
    elif None in splits.values():
        splits = split_sources(cfg, sorted(splits))
    plan = []
    for split in SPLITS:
        members = [group for group in groups if splits[group["source"]] == split]
        plan += [group | {"split": split, "id": f"{split}_{number:05d}"} for number, group in enumerate(members)]
    print(f"{len(plan)} groups x {len(plan[0]['candidates'])} candidates of {cfg.import_from}, "
          f"{sum(bool(group['labels']) for group in plan)} of them labeled")
    if not any(group["labels"] for group in plan):
        print("no labels: name a column of the table overall, rank_overall or votes_overall (see common/imports.py), "
              "or let people compare (annotate=true)")
    return plan


def settle_plan(folder: Path, make_plan: Callable[[], list[dict]]) -> list[dict]:
    """The plan, kept in progress/plan.json; a folder that was begun with input that cannot be used is removed again."""
    path = folder / "progress" / "plan.json"
    begun_before = path.exists()
    try:
        plan = run.plain(make_plan())                       # a table may hold NaN, JSON may not
    except SystemExit:
        if not begun_before:                                # or corrected settings would be refused as others
            run.discard(folder)
        raise
    if begun_before and run.read_json(path) != plan:
        fail(f"the pictures changed since {folder} was begun: use another run= or delete the folder")
    run.write_json(path, plan)
    return plan


# crops and LR images -----------------------------------------------------------------------------------------

def cut_photograph(cfg: Config, job: dict) -> dict:
    """Write hr/ and lr/ (only lr/ without ground truth) of a photograph's groups; what was drawn, per group."""
    image, folder = read_image(job["path"]), Path(job["folder"])
    drawn = {}
    for name in job["groups"]:
        crop, place = draw_crop(cfg, image, name)
        params = {}
        if cfg.hr_dir:
            write_png(folder / "hr" / f"{name}.png", crop)
            seed = int(run.np_rng(cfg.seed, "degrade", name).integers(2**63))
            params = degrade.sample_params(seed, cfg.degradation, cfg.scale)
            crop = degrade.apply(crop, params)
        write_png(folder / "lr" / f"{name}.png", crop)
        drawn[name] = {"crop": {"picture": Path(job["path"]).name} | place, "degradation": params}
    return drawn


def draw_crop(cfg: Config, image: np.ndarray, name: str) -> tuple[np.ndarray, dict]:
    """A random square of the picture, shrunk to the crop size; flat ones are drawn again."""
    rng = run.np_rng(cfg.seed, "crop", name)
    size, (height, width) = cfg.crop_size, image.shape[:2]
    low, high = ZOOM if cfg.hr_dir else (1.0, 1.0)
    best = -1.0, None, None
    for _ in range(CROP_TRIES):
        side = min(round(size / (low * (high / low) ** rng.random())), height, width)      # log-uniform
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        flip = bool(rng.integers(2))
        crop = resize(image[y:y + side, x:x + side], (size, size), "bicubic")
        contrast = float(luma(crop).std())
        if contrast > best[0]:
            best = contrast, crop[:, ::-1] if flip else crop, {"x": x, "y": y, "side": side, "flipped": flip}
        if contrast >= MIN_DETAIL:
            break
    return np.ascontiguousarray(best[1]), best[2]


# candidates and labels -----------------------------------------------------------------------------------

def make_outputs(cfg: Config, folder: Path, device: torch.device) -> None:
    """The base policy, and SR images by hf: models; every rank calls this and makes its share."""
    dist.barrier()                                          # all LR images are there
    plan = run.read_json(folder / "progress" / "plan.json")
    names = [group["id"] for group in plan]
    if cfg.hr_dir and cfg.base_steps:
        training = [group["id"] for group in plan if group["split"] == "train"]
        base_policy.train(folder / "base", folder, training, steps=cfg.base_steps, seed=cfg.seed, device=device)
    sources.run_models(cfg.sources, folder, names, seed=cfg.seed, prompt=cfg.hf_prompt, batch=cfg.hf_batch,
                       device=device)
    dist.barrier()


def build_group(cfg: Config, job: dict) -> dict:
    """Candidates, their proxy scores and the finished line of groups.jsonl for one LR image."""
    folder, name = Path(job["folder"]), job["id"]
    lr, hr, foreign = read_image(folder / "lr" / f"{name}.png"), None, None
    if cfg.hr_dir:
        hr, foreign = (read_image(folder / "hr" / f"{group}.png") for group in (name, job["foreign"]))
    rng = run.np_rng(cfg.seed, "candidates", name)
    records, scores = [], {axis: [] for axis in AXES}
    for index, number in enumerate(rng.permutation(len(cfg.sources))):
        source, path = cfg.sources[number], f"candidates/{name}_{index}.png"
        if "kinds" in source:
            kind = str(rng.choice(source["kinds"]))
            image, natural, record = make_candidate(cfg, folder, kind, rng, lr=lr, hr=hr, foreign=foreign)
        else:
            image, natural = sources.read_output(job["outputs"][number], cfg.hr_size), hr
            record = sources.record(source)
        write_png(folder / path, image)
        records.append({"id": f"{name}_{index}", "path": path} | record)
        if hr is not None:
            overall, consistency, naturalness = metrics.gold(image, lr, hr)
            if image is natural:
                naturalness = 1.0
            elif natural is not hr:                     # other content, before a fault
                naturalness = metrics.detail_score(image, natural)
            for axis, score in zip(AXES, (consistency, naturalness, overall)):
                scores[axis].append(round(score, 4))
    labels = {axis: {"ranks": metrics.ranks(values, cfg.tie_margin), "scores": values, "source": "proxy",
                     "votes": None} for axis, values in scores.items() if values}
    lr_path, hr_path = f"lr/{name}.png", f"hr/{name}.png" if cfg.hr_dir else None
    files = [path for path in (lr_path, hr_path, *(record["path"] for record in records)) if path]
    return {"id": name, "split": job["split"], "source": job["source"], "scale": cfg.scale, "lr": lr_path,
            "hr": hr_path, "crop": job["crop"], "degradation": job["degradation"], "candidates": records,
            "labels": labels, "sha256": {file: run.sha256(folder / file) for file in files}}


def make_candidate(cfg: Config, folder: Path, kind: str, rng: np.random.Generator, *, lr: np.ndarray,
                   hr: np.ndarray | None, foreign: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """(candidate, the natural image that it was made from, record); images uint8 [H, W, 3]."""
    image = None if hr is None else to_float(hr)
    if kind == "hr":
        return hr, hr, {"method": "hr", "strength": 0.0}
    if kind == "resample":
        image, record = candidates.resampled(to_float(lr), (cfg.hr_size, cfg.hr_size), rng)
        return to_uint8(image), hr, record
    if kind in ("base", "partial"):
        image, record = from_base(folder, rng, lr=lr, hr=image if kind == "partial" else None)
        return to_uint8(image), hr, record
    if kind == "unnatural":
        start = None
        if cfg.base_steps and rng.random() < FAULT_ON_PARTIAL:
            image, start = from_base(folder, rng, lr=lr, hr=image)
        image, record = candidates.unnatural(image, to_float(foreign), cfg.scale, rng)
        if start:
            record["start"] = start
        return to_uint8(image), hr, record
    double = rng.random() < DOUBLE_FAULT
    strongest = DOUBLE_STRONGEST if double else 1.0
    image, record = candidates.inconsistent(image, to_float(foreign), rng, strongest=strongest)
    natural = to_uint8(image)
    if not double:
        return natural, natural, record
    image, fault = candidates.unnatural(image, to_float(foreign), cfg.scale, rng, strongest=strongest)
    record |= {"method": f"{record['method']}+{fault['method']}", "second": fault}
    return to_uint8(image), natural, record


def from_base(folder: Path, rng: np.random.Generator, *, lr: np.ndarray,
              hr: np.ndarray | None) -> tuple[np.ndarray, dict]:
    """
    What the base policy makes of LR, perhaps painted over: (float [H, W, 3], record).

    hr: half of the times, a random share of what the image lacks to it is added; None: nothing is.
    """
    image, record = base_policy.candidate(folder / "base", lr, rng)
    image, share = to_float(image), 0.0
    if hr is not None and rng.random() < 0.5:
        share = float(rng.random())
    if rng.random() < PAINTED:
        image, record["strength"] = candidates.painted(image, rng)
        record["method"] = "painted"
    if share:
        image = image + share * (hr - image)
    return image, record | {"share": round(share, 3)}


# is the set worth training on ----------------------------------------------------------------------------

def contact_sheet(folder: Path, groups: list[dict]) -> None:
    """PNG, a row per group: LR, HR, candidates with method, strength, rank (1 = best) and score per axis."""
    rows, below = [], []
    for group in groups:
        lr = read_image(folder / group["lr"])
        hr = read_image(folder / group["hr"]) if group["hr"] else np.full_like(lr, 255)
        rows.append([lr, hr, *(read_image(folder / candidate["path"]) for candidate in group["candidates"])])
        below.append([f"{group['id']}\n{group['source'][-22:]}\n{group['degradation'].get('kind', '')}", ""])
        for index, candidate in enumerate(group["candidates"]):
            lines = [candidate["method"]]
            lines += [f"strength {candidate['strength']:.2f}"] if "strength" in candidate else []
            for axis, label in group["labels"].items():
                score = f"  ({label['scores'][index]:.2f})" if label.get("scores") else ""      # people give ranks only
                lines.append(f"{axis} {label['ranks'][index]:g}{score}")
            below[-1].append("\n".join(lines))
    titles = ["LR", "HR", *(f"candidate {index}" for index in range(len(groups[0]["candidates"])))]
    write_png(folder / "contact_sheet.png", sheet(rows, titles, 160, below))


def quality(groups: list[dict]) -> dict:
    """
    For manifest.json: how many labels there are, and what a table of method names makes of them.

    The method prior orders candidates by the mean training label of their method and sees no pixel. Where it is right
    about nearly all pairs of the test split, the labels say little but the names of the methods, and so will a model
    learn. axis_correlation: Pearson's, of consistency and naturalness (of minus the ranks where there are no scores).
    """
    labeled = [group for group in groups if group["labels"]]
    train, test = ([group for group in labeled if group["split"] == split] for split in ("train", "test"))
    labels, prior = label_arrays(labeled), dict.fromkeys(AXES, math.nan)
    pairs = [int(metrics.pair_accuracy(ranks, ranks)[2].sum()) for ranks in np.moveaxis(labels.ranks, 2, 0)]
    if train and test:
        guesses, ranks = method_prior(test, train), label_arrays(test).ranks
        for a, axis in enumerate(AXES):
            prior[axis] = round(metrics.pair_accuracy(guesses[..., a], ranks[..., a])[0], 4)
    values = np.where(np.isnan(labels.scores).any((0, 1)), -labels.ranks, labels.scores)[..., :2].reshape(-1, 2)
    values = values[~np.isnan(values).any(1)]
    correlation = np.corrcoef(values.T)[0, 1] if len(values) > 1 and values.std(0).all() else math.nan

    for split in SPLITS:
        if not any(group["split"] == split for group in groups):
            stage = "03 cannot evaluate on" if split == "test" else "02 cannot train on"
            print(f"warning: no {split} groups: {stage} this set")
    if not labeled:
        print("warning: no labels: stage 02 cannot train on this set")
    if prior["overall"] > PRIOR_LIMIT:
        print(f"warning: labels mostly encode method names: the name alone orders {prior['overall']:.0%} of the test "
              "pairs rightly; mix strengths, settings or seeds in a method")
    kinds = sorted({label["source"] for group in labeled for label in group["labels"].values()})
    results = {"groups": len(groups), "candidates": sum(len(group["candidates"]) for group in groups),
               "pairs": pairs[OVERALL] or max(pairs), "label_source": ", ".join(kinds) or "none"}
    return results | ({"method_prior": prior, "axis_correlation": round(float(correlation), 4)} if labeled else {})


def publish(folder: Path, groups: list[dict]) -> dict:
    """Write the data set and a picture of it; what manifest.json says of it."""
    run.write_lines(folder / "groups.jsonl", groups)
    contact_sheet(folder, [groups[i] for i in evenly(len(groups), SHEET_ROWS)])
    return quality(groups) | {"lr_psnr_hr": lr_psnr_of_truth(folder, [
        group for group in groups if group["hr"] and group["split"] != "test"])}


def lr_psnr_of_truth(folder: Path, groups: list[dict]) -> float | None:
    """
    dB: median LR-PSNR of the ground truth, what the degradation takes from it; None without groups.

    An SR image below it has invented what LR does not show: the guard of 04.
    """
    pairs = ([read_image(folder / groups[i][key]) for key in ("hr", "lr")] for i in evenly(len(groups), TRUTH_IMAGES))
    values = [metrics.lr_psnr(hr, lr, len(hr) // len(lr)) for hr, lr in pairs]
    return round(float(np.median(values)), 3) if values else None


# people, once the data set is complete -----------------------------------------------------------------------

def ask_people(cfg: Config, folder: Path) -> None:
    """What the settings `labels` and `annotate` ask for."""
    if cfg.labels:
        set_labels(folder, cfg.labels)
    if cfg.annotate:
        annotate.serve(folder, all_groups(folder), host=cfg.annotate_host, port=cfg.annotate_port, seed=cfg.seed,
                       shown=cfg.annotate_show, per_split=cfg.annotate_groups)


def set_labels(folder: Path, kind: str) -> None:
    """Make people's labels, or those that were built (`proxy`), the ones that count; the built ones are never lost."""
    groups = all_groups(folder)
    if kind == "human":
        judged = annotate.live(annotate.read_log(folder / annotate.LOG, groups))
        labels = annotate.human_labels(groups, judged)
        if not any(labels.values()):
            fail(f"{folder / annotate.LOG}: no LR image has enough judgements yet to rank its candidates: go on with "
                 f"`{run.command(folder.name)} annotate=true`")
        run.write_bytes(folder / "annotation_report.md", annotate.report(groups, judged, labels).encode())
        for group in groups:
            group.setdefault("proxy_labels", group["labels"])
            group["labels"] = labels[group["id"]]
    else:
        for group in groups:
            group["labels"] = group.pop("proxy_labels", group["labels"])
    results = publish(folder, groups)
    run.write_json(folder / "manifest.json", run.read_json(folder / "manifest.json") | {"results": results})
    print(f"labels: {kind}, " + json.dumps(results))
    for stem in ("02_train_reward", "02_train_reward_blind", "03_eval_reward"):
        if (folder.parent / stem / "config.yaml").exists():
            print(f"{folder.parent / stem} was made with the labels as they were: use another run= or delete it")


# many small jobs over the CPU cores ------------------------------------------------------------------------

def start_pool(workers: int) -> ProcessPoolExecutor | None:
    """Worker processes (0: one per usable core), or None when one is asked for: then this process does the work."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()   # not on macOS
    workers = workers or usable
    spawn = multiprocessing.get_context("spawn")            # a fork of a process with threads may hang
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) if workers > 1 else None


def end_with_parent() -> None:
    """In a worker: leave as soon as the main process is gone, also by SIGKILL, instead of waiting for jobs for ever."""
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_jobs(pool: ProcessPoolExecutor | None, function: Callable[[dict], dict], jobs: list[dict],
             log: Path) -> dict[str, dict]:
    """
    {job["id"]: function(job)}. Results are JSON and are appended to `log`, so that a killed run does only the rest; a
    job is done again when one of the files in job["files"] has changed. The function may stop the run with `fail`.
    """
    stamps = {job["id"]: [stamp(path) for path in job.get("files", [])] for job in jobs}
    done = {}
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):               # half a line of a killed run: that job is done again
            record = json.loads(line)
            if record["stamps"] == stamps.get(record["id"]):
                done[record["id"]] = record["result"]
    left = [job for job in jobs if job["id"] not in done]
    results = pool.map(function, left) if pool else map(function, left)
    try:
        with open(log, "a", encoding="utf-8") as file:
            bar = tqdm(left, desc=log.stem, mininterval=1, disable=not left)
            for job, result in zip(bar, results):
                record = {"id": job["id"], "stamps": stamps[job["id"]], "result": result}
                file.write("\n" + json.dumps(record))       # the line feed comes first: it ends half a line
                file.flush()
                done[job["id"]] = result
    except BrokenProcessPool:
        fail("a worker process died, perhaps for want of memory: run again with workers=1")
    return done


def stamp(path: str) -> list:
    """[path, bytes, ns of the last change], which differs once the file is written again."""
    facts = os.stat(path) if os.path.exists(path) else None             # it may be a broken link
    return [path, facts and facts.st_size, facts and facts.st_mtime_ns]


@run.explained()
def main(cfg: Config) -> None:
    started = time.time()
    device, main_rank = dist.init(timeout=WAIT), dist.is_main()
    folder = run.open_stage(cfg, __file__, free=FREE, go_on=cfg.annotate or cfg.labels is not None)
    if (folder / "manifest.json").exists():
        dist.finish()                                     # people may take days: no rank waits for them
        return ask_people(cfg, folder) if main_rank else None
    progress = folder / "progress"                        # what a killed run has done; removed at the end
    for path in (folder / "hr", folder / "lr", folder / "candidates", progress):
        path.mkdir(exist_ok=True)
    if not main_rank:                                     # torchrun: the other ranks run hf: models
        if not cfg.import_from:
            make_outputs(cfg, folder, device)
        return dist.finish()
    pool = start_pool(cfg.workers)

    if cfg.import_from:
        # a set that exists: its groups, their splits, and copies of its pictures
        plan = settle_plan(folder, lambda: plan_import(cfg))
        groups = run_jobs(pool, partial(imports.copy_group, folder), plan, progress / "import.jsonl")
    else:
        # 1. photographs -> splits: which photograph each group is cut from
        plan = settle_plan(folder, lambda: plan_groups(cfg, usable_photographs(cfg, folder, pool)))
        print(f"{len(plan)} groups x {len(cfg.sources)} candidates of {cfg.hr_size} px")

        # 2. crops -> LR images
        by_path = {}
        for group in plan:
            by_path.setdefault(group["path"], []).append(group["id"])
        jobs = [{"id": f"{path} {start}", "path": path, "groups": ids[start:start + CROPS_PER_JOB],
                 "folder": str(folder)} for path, ids in by_path.items() for start in range(0, len(ids), CROPS_PER_JOB)]
        cut = run_jobs(pool, partial(cut_photograph, cfg), jobs, progress / "crops.jsonl")
        drawn = {name: facts for result in cut.values() for name, facts in result.items()}

        # 3. the base policy and candidates of pretrained models, on all ranks
        make_outputs(cfg, folder, device)

        # 4. candidates and labels: one job per group; first a few, to look at while the rest is made
        outputs = sources.output_files(cfg.sources, folder, [group["id"] for group in plan], cfg.scale)
        jobs = [group | drawn[group["id"]] | {"folder": str(folder), "outputs": paths,
                                              "files": [path for path in paths if path]}
                for group, paths in zip(plan, outputs)]
        build = partial(run_jobs, pool, partial(build_group, cfg), log=progress / "groups.jsonl")
        contact_sheet(folder, list(build([jobs[i] for i in evenly(len(jobs), SHEET_ROWS)]).values()))
        print(f"first picture: {folder / 'contact_sheet.png'}", flush=True)
        groups = build(jobs)
    if pool:
        pool.shutdown()

    # 5. the data set, a picture of it, and whether it is worth training on
    results = publish(folder, [groups[group["id"]] for group in plan])
    shutil.rmtree(progress)
    run.write_manifest(folder, script=__file__, started=started, inputs=[], results=results)
    dist.finish()
    ask_people(cfg, folder)


if __name__ == "__main__":
    main(load_config(Config, __file__))
