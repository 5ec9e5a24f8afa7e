"""
Build the preference data set: photographs -> crops -> LR images -> several SR candidates per LR -> rankings.

Run     python 01_build_dataset.py configs/demo.yaml                         # two CPU cores, 1.4 min
        python 01_build_dataset.py configs/demo.yaml hr_dir=/my/photographs run=runs/mine
        python 01_build_dataset.py configs/demo.yaml annotate=true           # then people compare candidates
        python 01_build_dataset.py configs/demo.yaml labels=human            # and what they said becomes the labels
        torchrun --standalone --nproc_per_node=8 01_build_dataset.py configs/full.yaml   # hf: models on 8 GPUs
Reads   photographs (hr_dir), LR-only images (lr_dir), or a preference set that exists (import_from); outputs of other
        SR programs (candidates)
Writes  <run>/01_build_dataset/   groups.jsonl (one line per LR image)  hr/  lr/  candidates/  skipped.jsonl
                                  contact_sheet.png (look at it)  quality.json (statistics, leaks, what names tell)
                                  config.yaml  manifest.json
                                  judgements.jsonl  annotation_report.md  annotation_report.json (if people judge)
Expect  demo: 3290 groups, 19740 candidates; a table of method means gets about 0.67 of the test pairs right.

The labels are a PROXY for human preference, computed with the ground truth (common/metrics.py): consistency
compares the down-sampled candidate with the down-sampled HR image; naturalness compares the amount of local
detail with the natural image that the candidate was made from, before a fault was added; overall is their
geometric mean.
"""
import math
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np

from common import (annotate, candidates, degrade, dist, duplicates, imports, metrics, mllm_labels,
                    photos, quality, run, sources)
from common.config import fail, load_config
from common.contact_sheet import contact_sheet, rows_of
from common.groups import SPLITS
from common.images import find, luma, read_image, resize, to_float, to_uint8, write_png
from common.jobs import run_jobs, stamp, start_pool
from common.metrics import AXES

CROP_TRIES = 20
AT_ONCE = 32                    # crops of one picture in a job: enough to read it seldom, few enough for many cores
WAIT = timedelta(days=2)        # under torchrun, for the longest work that the main rank does alone
FREE = ("annotate", "annotate_host", "annotate_port", "annotate_show", "annotate_groups", "annotate_splits",
        "annotate_without", "labels", "workers", "hf_batch", "label_batch")  # use, and speed
DOUBLE_STRONGEST = 0.5  # two faults of up to this strength weigh about as much as one of up to 1 (measured)


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
    min_zoom: float = 0.3333            # photographs are shrunk by a random factor in min_zoom..1
    min_detail: float = 8.0             # crops with a smaller std of the luma (of 255) are drawn again
    max_source_share: float = 0.15      # no source gives more than this part of the groups of its split
    # instead: a preference set that exists; common/imports.py documents its two layouts ---------------------
    import_from: str | None = None      # a table (.csv, .jsonl), or a folder of numbered folders as in RefSR-18K
    import_roles: list[str] = field(default_factory=list)   # of such a folder: which file is what, as ROLE=PATTERN
    strict: bool = False                # stop at the first bad image and do not skip it; imports always do
    # groups -------------------------------------------------------------------------------------------------
    train_groups: int = 20000           # LR images per split
    val_groups: int = 200               # the same for validation
    test_groups: int = 500              # and for the test
    val_sources: list[str] = field(default_factory=list)    # names without suffix; empty: val_fraction
    test_sources: list[str] = field(default_factory=list)   # the same for the test split
    val_fraction: float = 0.05          # part of the pictures, chosen by a hash of seed and name
    test_fraction: float = 0.1          # the same for the test split
    # candidates: one entry each: hr, resample, inconsistent, unnatural (`a|b`: one of them by chance),
    # folder:NAME=PATH (outputs of any SR program, matched by file name), hf:NAME=MODEL (id or path), perhaps followed
    # by ?seeds=2&steps=10+20&guidance=1+4 (all combinations, joined by + and not by commas)
    candidates: list[str] = field(default_factory=lambda: ["hr", "resample", "inconsistent", "unnatural"]) # see above
    double_fault: float = 0.6           # probability of an unnatural fault on top of an inconsistent one
    tie_margin: float = 0.05            # of scores in 0..1; smaller differences share a rank: nobody would see them
    hf_steps: int = 50                  # denoising steps of an hf: diffusion pipeline that names none
    hf_prompt: str = ""                 # what hf: pipelines with text are told; guidance above 1 needs one
    hf_batch: int = 1                   # LR images at once through an hf: model: memory and speed, and rounding
    label: str = "proxy"                # proxy, or mllm: label_model is asked for each pair in both orders
    label_model: str | None = None      # hub id or folder of any image-text-to-text model of transformers
    label_batch: int = 8                # questions at once: memory and speed, and rounding
    # people, once the data set is built (see README) ----------------------------------------------------------
    annotate: bool = False              # serve the page on which people compare candidates
    annotate_host: str = "127.0.0.1"    # this machine alone; 0.0.0.0 lets others in who know the address
    annotate_port: int = 0              # 0: any free one
    annotate_show: int = 2              # candidates at once: 2 to pick from, or 4 to rank
    annotate_groups: int = 50           # LR images per split that the page asks about, evenly spaced; 0: all
    annotate_splits: list[str] = field(default_factory=lambda: list(SPLITS))    # the page asks about these
    annotate_without: list[str] = field(default_factory=list)   # annotators whose judgements do not become labels
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
        for key in ("min_zoom", "max_source_share"):
            assert 0 < vars(self)[key] <= 1, f"{key} should be in (0, 1], got {vars(self)[key]}"
        for key in ("val_fraction", "test_fraction", "double_fault", "tie_margin"):
            assert 0 <= vars(self)[key] <= 1, f"{key} should be in 0..1, got {vars(self)[key]}"
        assert self.annotate_splits and set(self.annotate_splits) <= set(SPLITS), \
            f"annotate_splits should be some of {', '.join(SPLITS)}, got {self.annotate_splits}"
        assert self.annotate_show in (2, 4), f"annotate_show should be 2 or 4, got {self.annotate_show}"
        assert self.labels in (None, "human", "proxy"), f"labels should be human or proxy, got {self.labels!r}"
        assert 0 <= self.annotate_port < 2**16, f"annotate_port should be in 0..65535, got {self.annotate_port}"
        may_be_0 = ("val_groups", "test_groups", "annotate_groups", "workers")
        for key in (*may_be_0, "train_groups", "hf_steps", "hf_batch", "label_batch"):
            assert vars(self)[key] >= (key not in may_be_0), f"{key} {vars(self)[key]} is too small"
        sources.check(self.candidates, self.lr_dir is None, self.hf_prompt)
        assert self.label in ("proxy", "mllm"), f"label should be proxy or mllm, got {self.label!r}"
        assert (self.label == "mllm") == bool(self.label_model), "label: mllm and label_model belong together"
        assert self.label == "proxy" or not self.import_from, "label: mllm does not go with import_from"


# data: photographs, crops, LR images ---------------------------------------------------------------------

def usable_pictures(cfg: Config, folder: Path, pool: ProcessPoolExecutor | None) -> list[dict]:
    """[{source, path, area, sha256, hash}] of what can be used; the others go to skipped.jsonl."""
    found = find(cfg.hr_dir or cfg.lr_dir, "hr_dir" if cfg.hr_dir else "lr_dir")
    jobs = [{"id": path, "path": path, "key": stamp([path])} for path in (str(own) for _, own in found)]
    survey = partial(photos.survey, crop_size(cfg), cfg.min_detail)
    facts = run_jobs(pool, survey, jobs, log=folder / "progress" / "survey.jsonl")
    usable, skipped, seen = [], [], {}
    for source, path in found:
        fact = facts[str(path)]
        if "reason" not in fact and fact["sha256"] in seen:                    # it could lie in two splits
            fact = {"reason": f"same pixels as {seen[fact['sha256']]}"}
        if "reason" in fact:
            skipped.append({"path": str(path), "reason": fact["reason"]})
            continue
        seen[fact["sha256"]] = str(path)
        usable.append({"source": source, "path": str(path)} | fact)
    if skipped and cfg.strict:
        fail(f"{skipped[0]['path']}: {skipped[0]['reason']}: repair or remove it, or set strict=false")
    run.write_lines(folder / "skipped.jsonl", skipped)
    print(f"{len(usable)} pictures, {len(skipped)} skipped" + (", see skipped.jsonl" if skipped else ""))
    if not usable:
        fail(f"{cfg.hr_dir or cfg.lr_dir}: none of {len(found)} pictures can be used, the first because "
                 f"{skipped[0]['path']}: {skipped[0]['reason']}; give others")
    return usable


def plan_groups(cfg: Config, pictures: list[dict], near: list[dict]) -> list[dict]:
    """
    One {id, split, source, path, sha256, foreign} per LR image; foreign: id of a group to take content from.

    near: sources that look alike, such as photographs of one burst; they are put into one split.
    """
    counts = dict(zip(SPLITS, (cfg.train_groups, cfg.val_groups, cfg.test_groups)))
    named = {"val": cfg.val_sources, "test": cfg.test_sources}
    fractions = {"test": cfg.test_fraction if cfg.test_groups else 0,
                 "val": cfg.val_fraction if cfg.val_groups else 0}
    splits = photos.split_families(sorted({p["source"] for p in pictures}), near, named, fractions, seed=cfg.seed)
    plan = []
    for split in SPLITS:
        own = [picture for picture in pictures if splits[picture["source"]] == split]
        if counts[split] and not own:
            fail(f"{split}_groups={counts[split]}, but no picture is for {split}: raise {split}_fraction")
        given = photos.shares(own, counts[split], cfg.max_source_share)
        chosen = [picture for picture, count in zip(own, given) for _ in range(count)]
        members = [{"id": f"{split}_{number:05d}", "split": split, "source": picture["source"],
                    "path": picture["path"], "sha256": picture["sha256"]} for number, picture in enumerate(chosen)]
        plan += [group | {"foreign": choose_foreign(cfg, group, members)} for group in members]
    return plan


def choose_foreign(cfg: Config, group: dict, members: list[dict]) -> str:
    """A group of the same split, of another source unless 20 draws find none."""
    rng = run.np_rng(cfg.seed, "foreign", group["id"])
    for _ in range(20):
        other = members[rng.integers(len(members))]
        if other["source"] != group["source"]:
            break
    return other["id"]


def cut_picture(cfg: Config, job: dict) -> dict:
    """Write hr/ and lr/ (only lr/ without ground truth) of a picture's groups; what was drawn, per group."""
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
    size, (height, width) = crop_size(cfg), image.shape[:2]
    smallest = max(cfg.min_zoom, size / min(height, width)) if cfg.hr_dir else 1.0
    best = -1.0, None, None
    for _ in range(CROP_TRIES):
        side = min(round(size / smallest ** rng.random()), height, width)      # the zoom is log-uniform
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        flip = bool(rng.integers(2))
        crop = resize(image[y:y + side, x:x + side], (size, size), "bicubic")
        contrast = float(luma(crop).std())
        if contrast > best[0]:
            best = contrast, crop[:, ::-1] if flip else crop, {"x": x, "y": y, "side": side, "flipped": flip}
        if contrast >= cfg.min_detail:
            break
    return np.ascontiguousarray(best[1]), best[2]


def crop_size(cfg: Config) -> int:
    return cfg.hr_size if cfg.hr_dir else cfg.hr_size // cfg.scale


# instead: a preference set that exists -------------------------------------------------------------------

def import_groups(cfg: Config, folder: Path, pool: ProcessPoolExecutor | None) -> list[dict]:
    """Copy what import_from names; what is not sound leaves no folder behind, unless copying has begun."""
    plan_file = folder / "progress" / "plan.json"
    begun_before = plan_file.exists()
    try:
        plan = plan_import(cfg)
    except SystemExit:
        if not begun_before:
            run.discard(folder)
        raise
    if begun_before and run.read_json(plan_file) != plan:
        fail(f"{cfg.import_from} changed since {folder} was begun: use another run= or delete the folder")
    run.write_json(plan_file, plan)
    print(f"{len(plan)} groups x {len(plan[0]['candidates'])} candidates of {cfg.import_from}, "
          f"{sum(bool(group['labels']) for group in plan)} of them labeled")
    jobs = [group | {"key": stamp(imports.files_of(group))} for group in plan]
    lines = run_jobs(pool, partial(imports.copy_group, folder), jobs, log=folder / "progress" / "import.jsonl")
    return [lines[group["id"]] for group in plan]


def plan_import(cfg: Config) -> list[dict]:
    """The groups with split and id. The set's splits are taken as they are; else they go by source, as photographs."""
    groups = imports.read(Path(cfg.import_from), imports.parse_roles(cfg.import_roles))
    splits = {group["source"]: group["split"] for group in groups}
    if None in splits.values() and cfg.test_fraction == 1:                     # a set to measure with
        splits = dict.fromkeys(splits, "test")
    elif None in splits.values():
        named = {"val": cfg.val_sources, "test": cfg.test_sources}
        splits = photos.split_sources(sorted(splits), named, {"test": cfg.test_fraction, "val": cfg.val_fraction},
                                      seed=cfg.seed)
    plan = []
    for split in SPLITS:
        members = [group for group in groups if splits[group["source"]] == split]
        plan += [group | {"split": split, "id": f"{split}_{number:05d}"} for number, group in enumerate(members)]
    return plan


# candidates and labels -----------------------------------------------------------------------------------

def build_group(cfg: Config, job: dict) -> dict:
    """Candidates, their proxy scores and the finished line of groups.jsonl for one LR image."""
    folder, name = Path(job["folder"]), job["id"]
    lr, hr, foreign = read_image(folder / "lr" / f"{name}.png"), None, None
    if cfg.hr_dir:
        hr, foreign = (read_image(folder / "hr" / f"{which}.png") for which in (name, job["foreign"]))
    rng = run.np_rng(cfg.seed, "candidates", name)
    listed, scores = [], {axis: [] for axis in AXES}
    entries = sources.expand(cfg.candidates)
    for index, which in enumerate(rng.permutation(len(entries))):
        entry, path = entries[which], f"candidates/{name}_{index}.png"
        if sources.is_external(entry):
            image, pristine = sources.read_external(cfg, entry, job["external"][entry]), hr
            record = sources.record(entry)
        else:
            kind = str(rng.choice(entry.split("|")))
            image, pristine, record = make_candidate(cfg, kind, rng, lr=lr, hr=hr, foreign=foreign)
        write_png(folder / path, image)
        listed.append({"id": f"{name}_{index}", "path": path} | record)
        if hr is not None and cfg.label == "proxy":
            consistency = metrics.proxy_consistency(image, hr, lr)
            naturalness = 1.0 if image is pristine else metrics.proxy_naturalness(image, pristine)
            for axis, score in zip(AXES, (consistency, naturalness, math.sqrt(consistency * naturalness))):
                scores[axis].append(round(score, 4))
    labels = {axis: {"ranks": metrics.ranks(values, cfg.tie_margin), "scores": values, "source": "proxy",
                     "votes": None} for axis, values in scores.items() if values}
    lr_path, hr_path = f"lr/{name}.png", f"hr/{name}.png" if cfg.hr_dir else None
    files = [path for path in (lr_path, hr_path, *(candidate["path"] for candidate in listed)) if path]
    return {"id": name, "split": job["split"], "source": job["source"], "scale": cfg.scale, "lr": lr_path,
            "hr": hr_path, "crop": job["crop"], "degradation": job["degradation"], "candidates": listed,
            "labels": labels, "sha256": {file: run.sha256(folder / file) for file in files}}


def make_candidate(cfg: Config, kind: str, rng: np.random.Generator, *, lr: np.ndarray, hr: np.ndarray | None,
                   foreign: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """(candidate, the natural image that it was made from, record); images uint8 [H, W, 3]."""
    image = None if hr is None else to_float(hr)
    if kind == "hr":
        return hr, hr, {"method": "hr", "strength": 0.0}
    if kind == "resample":
        image, record = candidates.resampled(to_float(lr), (cfg.hr_size, cfg.hr_size), rng, hr=image)
        return to_uint8(image), hr, record
    if kind == "unnatural":
        image, record = candidates.unnatural(image, cfg.scale, rng)
        return to_uint8(image), hr, record
    double = rng.random() < cfg.double_fault
    strongest = DOUBLE_STRONGEST if double else 1.0
    image, record = candidates.inconsistent(image, to_float(foreign), rng, strongest=strongest)
    natural = to_uint8(image)
    if not double:
        return natural, natural, record
    image, fault = candidates.unnatural(image, cfg.scale, rng, strongest=strongest)
    record |= {"method": f"{record['method']}+{fault['method']}", "second": fault}
    return to_uint8(image), natural, record


# evaluate ------------------------------------------------------------------------------------------------

def finish(folder: Path, groups: list[dict], near: list[dict], *, started: float, answers: dict | None) -> None:
    """The data set, a picture of it, its quality, and the headline numbers. answers: of the label model."""
    run.write_lines(folder / "groups.jsonl", groups)
    contact_sheet(folder, groups)
    results = {"groups": len(groups), "candidates": sum(len(group["candidates"]) for group in groups)}
    found = quality.check(groups, near, answers)
    run.write_json(folder / "quality.json", found)
    quality.show(found)
    results |= quality.headline(found)
    shutil.rmtree(folder / "progress")
    run.write_manifest(folder, script=__file__, started=started, inputs=[], results=results)


def prepare(cfg: Config, folder: Path, pool: ProcessPoolExecutor | None) -> tuple[list[dict], dict, list[dict]]:
    """Write hr/ and lr/; returns the plan, what was drawn per group, and sources that look alike."""
    # 1. which pictures can be used, and how many groups each gives
    progress = folder / "progress"
    begun_before = (progress / "plan.json").exists()
    try:
        pictures = usable_pictures(cfg, folder, pool)
        near = duplicates.near_pairs(pictures)
        plan = plan_groups(cfg, pictures, near)
    except SystemExit:
        if not begun_before:                              # or corrected settings would be refused as others
            run.discard(folder)
        raise
    if begun_before and run.read_json(progress / "plan.json") != plan:
        fail(f"the pictures changed since {folder} was begun: use another run= or delete the folder")
    run.write_json(progress / "plan.json", plan)
    print(f"{len(plan)} groups x {len(sources.expand(cfg.candidates))} candidates of {cfg.hr_size} px")

    # 2. crops and LR images: a picture is read once for up to AT_ONCE of them
    by_path = {}
    for group in plan:
        by_path.setdefault(group["path"], []).append(group["id"])
    jobs = [{"id": f"{path} {start}", "path": path, "groups": names[start:start + AT_ONCE], "folder": str(folder)}
            for path, names in by_path.items() for start in range(0, len(names), AT_ONCE)]
    cut = run_jobs(pool, partial(cut_picture, cfg), jobs, log=progress / "crops.jsonl", unit="LR images",
                   size=lambda job: len(job["groups"]))
    return plan, {name: facts for result in cut.values() for name, facts in result.items()}, near


@run.explained()
def main(cfg: Config) -> None:
    started = time.time()
    device, main_rank = dist.init(timeout=WAIT), dist.is_main()      # torchrun: hf: and label models run on all ranks
    if cfg.label == "mllm":
        pass                    # slow to import: only runs that ask a model pay
        if not (Path(cfg.run) / Path(__file__).stem / "manifest.json").exists():
            mllm_labels.find(cfg.label_model)             # a wrong name should not wait for all pictures
    folder = run.open_stage(cfg, __file__, free=FREE, go_on=cfg.annotate or cfg.labels is not None)
    if (folder / "manifest.json").exists():
        dist.finish()                                     # people may take days: no rank waits for them
        return annotate.ask_people(cfg, folder) if main_rank else None
    progress = folder / "progress"                        # what a killed run has done; removed at the end
    for path in (folder / "hr", folder / "lr", folder / "candidates", progress):
        path.mkdir(exist_ok=True)
    pool, near, groups = start_pool(cfg.workers) if dist.is_main() else None, [], []

    # 1. and 2. pictures, crops and LR images, or a set that exists
    if dist.is_main() and cfg.import_from:
        groups = import_groups(cfg, folder, pool)
    elif dist.is_main():
        plan, drawn, near = prepare(cfg, folder, pool)
    dist.barrier()

    # 3. candidates and labels: one job per group
    if not cfg.import_from:
        names = [group["id"] for group in run.read_json(progress / "plan.json")]
        sources.run_models(cfg, folder, names)
        dist.barrier()
    if dist.is_main() and not cfg.import_from:
        outputs = sources.external_files(cfg, folder, names)
        jobs = [group | drawn[group["id"]] | {"external": own, "key": stamp(own.values()), "folder": str(folder)}
                for group, own in zip(plan, outputs.values())]
        per_group = len(sources.expand(cfg.candidates))
        build = partial(run_jobs, pool, partial(build_group, cfg), log=progress / "groups.jsonl", unit="candidates")
        early = build(rows_of(jobs))                      # a picture to look at while the rest is made
        contact_sheet(folder, [early[job["id"]] for job in rows_of(jobs)])
        print(f"first picture: {folder / 'contact_sheet.png'}", flush=True)
        made = build(jobs, size=lambda job: per_group)
        groups = [made[name] for name in names]
    if pool:
        pool.shutdown()
    answers = None
    if cfg.label == "mllm":
        if dist.is_main():
            run.write_lines(folder / "groups.jsonl", groups)  # for the other ranks
        dist.barrier()
        mllm_labels.ask_all(cfg, folder, device)
        dist.barrier()
        answers = mllm_labels.collect(cfg, folder, groups) if dist.is_main() else None

    # 4. the data set, a picture of it, its quality, and the headline numbers
    if main_rank:
        finish(folder, groups, near, started=started, answers=answers)
    dist.finish()
    if main_rank:
        annotate.ask_people(cfg, folder)


if __name__ == "__main__":
    main(load_config(Config, __file__))
