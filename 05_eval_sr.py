"""
Compare the super-resolution policy before and after GRPO on the test photographs, with the same seeds.

Reported are the reward that stage 04 optimized, fidelity (PSNR, SSIM, LR-PSNR), and a held-out judge that 04 did
not optimize: the proxy label, sqrt(consistency * naturalness), which compares with the ground truth (04 only drops
checkpoints that it finds worse, on validation photographs). Bicubic up-sampling and the ground truth are reference
rows. Intervals are paired bootstraps over test images.

With lr_dir it restores a folder of yours instead: pictures of any size, no ground truth.

Run     python 05_eval_sr.py configs/demo.yaml
        python 05_eval_sr.py configs/demo.yaml lr_dir=my_photos out=restored/
        torchrun --standalone --nproc_per_node=8 05_eval_sr.py configs/full.yaml
Reads   <run>/01_build_dataset/   the test split       <run>/02_train_reward/   judge/, metrics.jsonl
        <run>/04_train_sr_grpo/   cold_start/ (before), policy/ (after), metrics.jsonl
        <run>/03_eval_reward/     table.md, shown in the report if it is there
        with lr_dir: your pictures and 04; 01's groups and 02's judge if they are there, for scores
Writes  <run>/05_eval_sr/         report.html (open it in a browser)  results.json  table.md  per_image.jsonl
                                  images/ (PNG)  manifest.json
        <run>/05_eval_sr_<name>/ or out=, for your folder: tuned/ (and base/, hybrid/: PNG, sub-folders kept)
                                  index.html (open it in a browser)  contact_sheet.png  scores.csv  restored.jsonl
                                  skipped.jsonl  manifest.json
Expect  demo: see the table in README.md
"""
import json
import re
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import (color_fix, degrade, dist, iqa, metrics, mllm, restored_page, restoring, run, sr_policy,
                    sr_report, sr_reward, sr_statistics, sr_variants)
from common.config import fail, load_config, read_yaml
from common.dist import mine
from common.groups import image_batch, judged_on, load_groups, require_one_size
from common.images import find, listed, read_image, sheet, to_pixels, write_png
from common.metrics import held_out
from common.sr_policy import Policy
from common.sr_report import COMPARED
from common.sr_variants import Clocked

WAIT = timedelta(days=2)            # for the rank with the most to restore of your pictures
POLICIES = ("base", "tuned", "hybrid")
METRICS = {                         # what is measured -> (name in the report, what it means)
    "reward": ("reward", "score of the stage-02 judge, 1 to 9. Stage 04 optimized it: its rise alone proves little"),
    "heldout": ("held-out judge", "sqrt(consistency x naturalness), 0 to 1: the proxy label, which reads the "
                "ground truth. Stage 04 did not optimize it (on validation photographs, it drops checkpoints that "
                "fall below the start); it should rise with the reward, or at least not fall"),
    "proxy_consistency": ("consistency", "first half of the held-out judge: agreement with the ground truth at "
                          "the size of LR, beyond what LR itself has wrong"),
    "proxy_naturalness": ("naturalness", "second half: as much detail of each fineness, place by place, as in "
                          "the ground truth. Blur and noise both lower it"),
    "psnr": ("PSNR, dB", "pixel by pixel likeness to the ground truth. It rewards blur"),
    "ssim": ("SSIM", "likeness of local structure to the ground truth, up to 1"),
    "lr_psnr": ("LR-PSNR, dB", "likeness of the down-sampled image to LR: the guard against invented content. "
                "The ground truth has a low one, too, as LR was degraded")}


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    seeds_per_image: int = 2            # samples (M) of each policy per LR image
    images_per_gpu: int = 16            # LR images, or tiles of your pictures, at a time: memory only
    shown_images: int = 8               # test images in the report, evenly spaced by gain in reward; your pictures
    large_crops: int = 4                # larger crops of the test photographs in the report; 0: none
    large_size: int = 256               # px, their side
    hybrid: float = 0.0                 # above 0, also: tuned weights for this share of the steps, then those of base
    eval_steps: list[int] = field(default_factory=list)     # other numbers of denoising steps to compare at, too
    pyiqa_metrics: list[str] = field(default_factory=list)  # measured, too, if pyiqa is installed, e.g. musiq
    # restore a folder of yours, without ground truth: with lr_dir, the test split is not looked at --------------
    lr_dir: str | None = None           # folder of pictures, of any size
    out: str | None = None              # folder for the results; none: <run>/05_eval_sr_<name of lr_dir>
    policy: list[str] = field(default_factory=lambda: ["tuned"])    # any of tuned, base, hybrid
    tile: int = 64                      # LR px; larger pictures are restored in tiles of this side
    overlap: int = 16                   # LR px that neighboring tiles share at least
    color_fix: str = "auto"             # none, adain, wavelet; auto: none for policy pixel, wavelet for the others
    judge_crops: int = 16               # crops of a picture, evenly spread, that the judge scores; 0: no scores

    def __post_init__(self):
        assert min(self.seeds_per_image, self.images_per_gpu, self.shown_images) >= 1 and self.large_crops >= 0, \
            "seeds_per_image, images_per_gpu and shown_images should be at least 1, large_crops 0 or more"
        assert self.large_size >= 32, f"large_size={self.large_size}: should be at least 32"
        assert 0 <= self.hybrid < 1, f"hybrid={self.hybrid}: should be a share from 0 to below 1"
        assert min(self.eval_steps, default=1) >= 1, f"eval_steps={self.eval_steps}: each should be at least 1"
        assert self.policy and set(self.policy) <= set(POLICIES) and len(set(self.policy)) == len(self.policy), \
            f"policy={self.policy}: should be some of {', '.join(POLICIES)}"
        assert self.hybrid or "hybrid" not in self.policy, "policy=hybrid needs a share, e.g. hybrid=0.8"
        assert self.tile >= 8 and 0 <= self.overlap <= self.tile / 2, \
            f"tile={self.tile}, overlap={self.overlap}: tile should be 8 or more, overlap 0 to half of it"
        assert self.color_fix in color_fix.KINDS, \
            f"color_fix={self.color_fix}: should be one of {', '.join(color_fix.KINDS)}"
        assert self.judge_crops >= 0, f"judge_crops={self.judge_crops}: should be 0 or more"
        assert self.lr_dir or not self.out, "out is for lr_dir; without it give run"


@dataclass
class Measured:                         # of n test images; variants: bicubic, policies, hr
    values: Tensor                      # float64 [n, variants, metrics], means over the M seeds
    samples: Tensor                     # float64 [n, policies, M, metrics]
    wins: Tensor                        # float64 [n] share of seeds whose tuned sample has the higher reward
    seconds: Tensor                     # float64 [3] denoising and decoding of the tuned policy, judging of its samples


# restore and measure ----------------------------------------------------------------------------------------

def restore(policy: Policy | Clocked, cfg: Config, lr: Tensor, *, names: list[str]) -> np.ndarray:
    """M samples of each LR [B, 3, h, w] in 0..1: uint8 [B, M, H, W, 3]. The noise depends on names alone."""
    keys = [(cfg.seed, "test", name, m) for name in names for m in range(cfg.seeds_per_image)]
    lr = lr.to(policy.times.device).repeat_interleave(cfg.seeds_per_image, 0)
    seen = policy.observe(lr, keys)
    noise = sr_policy.draw_noise(keys, (policy.channels, *seen.shape[-2:]), lr.device)
    pixels = to_pixels(sr_policy.restore(policy, seen, noise))
    return pixels.reshape(len(names), cfg.seeds_per_image, *pixels.shape[1:])


def bicubic(lr: Tensor, scale: int) -> np.ndarray:
    """[B, 3, h, w] in 0..1 -> uint8 [B, 1, H, W, 3]."""
    return to_pixels(sr_policy.upsample(lr, scale).clamp(0, 1))[:, None]


def measure(image: np.ndarray, lr: np.ndarray, hr: np.ndarray) -> list[float]:
    """METRICS but the reward, of one uint8 image [H, W, 3]."""
    return [*held_out(image, lr, hr), metrics.psnr(image, hr), metrics.ssim(image, hr),
            metrics.lr_psnr(image, lr, hr.shape[0] // lr.shape[0])]


def measure_all(cfg: Config, policies: dict[str, Policy], judge: mllm.Judge, *, rewarded: dict, source: Path,
                groups: list[dict], measures: list[iqa.Measure], folder: Path | None) -> Measured:
    """
    Restore and measure this rank's images; those of the first seed are written to `folder`, if there is one.

    rewarded: the settings of stage 04, so that the reward is the one that it optimized.
    """
    weights = torch.tensor([rewarded[f"weight_{axis}"] for axis in metrics.AXES])
    values, samples, wins, seconds, m = [], [], [], torch.zeros(3, dtype=torch.float64), cfg.seeds_per_image
    starts = range(0, len(groups), cfg.images_per_gpu)
    bar = tqdm(starts, "restore and judge", disable=not dist.is_main())
    for i in bar:
        batch = groups[i:i + cfg.images_per_gpu]
        lr, names, made = image_batch(source, batch, "lr"), [group["id"] for group in batch], {}
        made["bicubic"] = bicubic(lr, batch[0]["scale"])
        for key, policy in policies.items():
            clocked = Clocked(policy)
            made[key] = restore(clocked, cfg, lr, names=names)
            seconds[:2] += torch.tensor(clocked.seconds) if key == "tuned" else 0.0
        made["hr"] = to_pixels(image_batch(source, batch, "hr"))[:, None]
        images, low = np.concatenate(list(made.values()), 1), to_pixels(lr)     # [B, 1 + M + .. + M + 1, H, W, 3]
        clock = sr_variants.now()
        rewards = sr_reward.expected_scores(judge, low, images, crop=rewarded["crop"],
                                            limit=rewarded["crops_per_image"]) @ weights
        seconds[2] += (sr_variants.now() - clock) * m / images.shape[1]
        others = [[measure(image, small, group[-1]) + iqa.measure(measures, image, group[-1], judge.device)
                   for image in group] for group, small in zip(images, low)]
        table = torch.cat([rewards[..., None].double(), torch.tensor(others, dtype=torch.float64)], 2)
        parts = table.split([own.shape[1] for own in made.values()], 1)         # [B, 1 or M, metrics] each
        values.append(torch.stack([part.mean(1) for part in parts], 1))
        samples.append(torch.stack(parts[1:-1], 1))
        before, after = (samples[-1][:, list(policies).index(key), :, 0] for key in ("base", "tuned"))
        wins.append(((after - before).sign() / 2 + 0.5).mean(1))
        for name, *first in zip(names, *made.values()) if folder else ():
            for key, image in zip(made, first):
                write_png(folder / f"{name}_{key}.png", image[0])
    return Measured(torch.cat(values), torch.cat(samples), torch.cat(wins), seconds)


# results ----------------------------------------------------------------------------------------------------

def summarize(cfg: Config, found: Measured, names: list[str], variants: list[str]) -> dict:
    """results.json but `steps`; names: of the metrics; variants: bicubic, policies, hr."""
    values, policies, of = found.values.numpy(), variants[1:-1], variants.index
    mean = {variant: dict(zip(names, values[:, v].mean(0).round(4).tolist())) for v, variant in enumerate(variants)}
    gains = {variant: {name: sr_statistics.change(values[:, of("base"), k], values[:, of(variant), k], cfg.seed)
                       for k, name in enumerate(names)} for variant in policies[1:]}
    intervals = {name: change["ci95"] for name, change in gains["tuned"].items()}
    headline = {f"{name}_{key}": mean[key][name] for name in COMPARED for key in policies}
    headline |= {"reward_gain_ci95": intervals["reward"], "heldout_gain_ci95": intervals["heldout"],
                 "win_rate": round(float(found.wins.mean()), 4)}
    seconds = (found.seconds / (len(values) * cfg.seeds_per_image)).numpy().round(4).tolist()
    return {"headline": headline, "mean": mean,
            "gain": {name: change["gain"] for name, change in gains["tuned"].items()}, "gain_ci95": intervals,
            **{f"{variant}_gain": gains[variant] for variant in policies[2:]},
            "images": len(values), "seeds_per_image": cfg.seeds_per_image,
            "seconds_per_sample": dict(zip(("denoise", "decode", "judge"), seconds)),
            "draws": sr_statistics.by_draws(found.samples.numpy(), policies, names, cfg.seed),
            "by_strength": sr_statistics.by_strength(values[:, of("hr"), names.index("lr_psnr")], values[:, 1:-1],
                                                     policies, names, cfg.seed)}


def write_results(folder: Path, results: dict, *, groups: list[dict], found: Measured, names: dict[str, tuple],
                  variants: list[str]) -> None:
    """results.json, table.md and per_image.jsonl."""
    lines = [json.dumps({"id": group["id"], "source": group["source"], "wins": win,
                         **{variant: dict(zip(names, one)) for variant, one in zip(variants, row)}})
             for group, row, win in zip(groups, found.values.tolist(), found.wins.tolist())]
    run.write_bytes(folder / "per_image.jsonl", ("\n".join(lines) + "\n").encode())
    run.write_json(folder / "results.json", results)
    run.write_bytes(folder / "table.md", sr_report.markdown(results, names).encode())


# pictures ---------------------------------------------------------------------------------------------------

def examples(cfg: Config, source: Path, folder: Path, *, groups: list[dict], values: np.ndarray,
             variants: list[str]) -> list[tuple]:
    """(caption, images, line below each) of test images, evenly spaced from smallest to largest gain."""
    gain = values[:, variants.index("tuned"), 0] - values[:, variants.index("base"), 0]
    found, places = [], np.linspace(0, len(gain) - 1, min(cfg.shown_images, len(gain)))
    for i in np.argsort(gain, kind="stable")[places.astype(int)]:
        name = groups[i]["id"]
        images = {"LR": read_image(source / groups[i]["lr"])}
        images |= {key: read_image(folder / f"{name}_{key}.png") for key in variants}
        lines = (f"reward {row[0]:.2f}<br>held-out {row[1]:.2f}" for row in values[i])
        found.append((f"{name} ({groups[i]['source']}): reward {gain[i]:+.2f}", images, dict(zip(variants, lines))))
    return found


def photographs(cfg: Config, made_with: dict, policy: Policy) -> dict[str, Path]:
    """
    Source name -> photograph, where they still lie, to cut larger crops from; {} if none are wanted or it was imported.

    made_with: stage 01's settings. Stops if a crop has no size that the policy can restore.
    """
    hr_dir, scale = made_with["hr_dir"], made_with["scale"]
    if not cfg.large_crops or not hr_dir or not (hr_dir == "skimage" or listed(Path(hr_dir))):
        return {}
    unit, side = scale * policy.multiple, cfg.large_size // scale
    if cfg.large_size % unit:
        fail(f"large_size={cfg.large_size}: should be a multiple of {unit}, scale={scale} times {policy.multiple}, "
                 "of which sides of LR are multiples for this policy; or set large_crops=0")
    policy.observe(torch.zeros(1, 3, side, side, device=policy.times.device), [(cfg.seed,)])    # may be too large
    return dict(find(hr_dir, "hr_dir"))


def large_crops(cfg: Config, policies: dict[str, Policy], made_with: dict, *, found: dict[str, Path],
                sources: list[str]) -> dict[str, dict]:
    """Caption -> variant -> image, for crops larger than those of training, of photographs that were found."""
    crops, side, scale = {}, cfg.large_size, made_with["scale"]
    for i in range(cfg.large_crops if found else 0):
        source, rng = sources[i % len(sources)], run.np_rng(cfg.seed, "large crop", i)
        try:
            photo = read_image(found[source])
        except (KeyError, ValueError) as error:
            dist.print0(f"no larger crop of {source}: its photograph is gone or broken ({error})")
            continue
        if min(photo.shape[:2]) < side:
            continue
        y, x = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
        hr = np.ascontiguousarray(photo[y:y + side, x:x + side])
        params = degrade.sample_params(int(rng.integers(2**62)), made_with["degradation"], scale)
        low = degrade.apply(hr, params)
        lr = torch.from_numpy(low).permute(2, 0, 1)[None].float().div(255)
        crops[f"{source}, {side} x {side} px at {x}, {y}"] = {
            "LR": low, "bicubic": bicubic(lr, scale)[0, 0],
            **{key: restore(policy, cfg, lr, names=[f"large {i}"])[0, 0] for key, policy in policies.items()}, "hr": hr}
    return crops


# the stage --------------------------------------------------------------------------------------------------

def settings_of(stage: Path) -> dict:
    """The settings that a finished stage recorded."""
    return {key: value for _, key, value in read_yaml(str(stage / "config.yaml"), stage.name)}


def restore_folder(cfg: Config) -> None:
    """Restore the pictures of lr_dir, in a folder of its own; those that are done already stay as they are."""
    started = time.time()
    device, tuned = dist.init(timeout=WAIT), run.require(cfg.run, "04_train_sr_grpo")
    name = re.sub(r"[^\w.-]+", "_", Path(cfg.lr_dir).resolve().name)[:80]
    out = Path(cfg.out or f"{cfg.run}/{Path(__file__).stem}_{name}")
    pictures = restoring.find(cfg.lr_dir, out)
    folder = run.open_stage(cfg, __file__, out, free=("images_per_gpu", "shown_images"), go_on=True)
    if dist.is_main():
        run.lock(folder)                                                # open_stage locks unfinished folders only
        (folder / "manifest.json").unlink(missing_ok=True)              # there may be new pictures to restore
    policies = sr_variants.load(tuned, cfg.policy, device, hybrid=cfg.hybrid)
    source, judged_by, judge = Path(cfg.run) / "01_build_dataset", Path(cfg.run) / "02_train_reward", None
    if cfg.judge_crops and (source / "groups.jsonl").exists() and (judged_by / "manifest.json").exists():
        judge = mllm.load_judge(judged_by, device), judged_on(source)["hr_size"]
    dist.print0(f"{len(pictures)} pictures, restored by: {', '.join(cfg.policy)}; "
                + ("scored by the judge" if judge else "no scores: judge_crops=0, or stage 01 or 02 is missing"))
    clock = time.time()
    lines, count = restoring.restore_all(cfg, folder, pictures, settings=restoring.settings_hash(cfg, tuned),
                                         policies=policies, judge=judge)
    seconds, good = time.time() - clock, [line for line in lines if "reason" not in line]
    if dist.is_main():
        restored_page.write(folder, cfg, pictures, lines, next(iter(policies.values())).sampler.scale)
        dist.print0(f"open {folder / 'index.html'} in a browser")
    run.write_manifest(folder, script=__file__, started=started, inputs=[tuned], results={
        "pictures": len(good), "restored_now": count, "files_left_out": len(lines) - len(good),
        "seconds_per_picture": round(seconds / count, 3) if count else None})
    dist.finish()


@run.explained()
def main(cfg: Config) -> None:
    if cfg.lr_dir:
        return restore_folder(cfg)
    started = time.time()
    device = dist.init()
    folder = run.open_stage(cfg, __file__, free=("images_per_gpu", "large_crops", "large_size"))
    source, judged_by, tuned = (run.require(cfg.run, stem) for stem in
                                ("01_build_dataset", "02_train_reward", "04_train_sr_grpo"))
    groups = [group for group in load_groups(source, "test") if group["hr"]]
    if len(groups) < max(2, dist.world_size()):
        fail(f"{source}: {len(groups)} test images have HR, too few to compare on: give stage 01 more "
                 "test_groups, or this stage fewer processes")
    require_one_size(source, groups)
    sources = sorted({group["source"] for group in groups})
    dist.print0(f"{len(groups)} test images of {len(sources)} photographs, {cfg.seeds_per_image} seeds each")
    rewarded = settings_of(tuned)
    judge, measures = mllm.load_judge(judged_by, device), iqa.load(cfg.pyiqa_metrics, device)
    kinds = ["base", "tuned", *["hybrid"] * bool(cfg.hybrid)]
    for steps in cfg.eval_steps:
        sr_variants.check(tuned, kinds, hybrid=cfg.hybrid, steps=steps)
    policies = sr_variants.load(tuned, kinds, device, hybrid=cfg.hybrid)
    made_with = settings_of(source)
    uncut = photographs(cfg, made_with, policies["tuned"])
    names, variants = METRICS | iqa.describe(measures), ["bicubic", *kinds, "hr"]

    # 1. restore and measure, at the number of steps that it was tuned at and at others
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)

    def compared(policies: dict[str, Policy], folder: Path | None) -> Measured:
        own = measure_all(cfg, policies, judge, rewarded=rewarded, source=source, groups=mine(groups),
                          measures=measures, folder=folder)
        rows = (dist.gather_rows(part) for part in (own.values, own.samples, own.wins))
        return Measured(*rows, dist.all_sum(own.seconds))
    found = compared(policies, pictures)
    others = {steps: compared(sr_variants.load(tuned, kinds, device, hybrid=cfg.hybrid, steps=steps), None)
              for steps in cfg.eval_steps}

    # 2. results, and a report about them
    results, values = summarize(cfg, found, list(names), variants), found.values.numpy()
    results |= {"denoise_steps": policies["tuned"].sampler.steps, "steps": {
        steps: sr_statistics.compare(one.values.numpy()[:, 1:-1], kinds, list(names), cfg.seed)
        | {"draws": sr_statistics.by_draws(one.samples.numpy(), kinds, list(names), cfg.seed)}
        for steps, one in others.items()}}
    if dist.is_main():
        write_results(folder, results, groups=groups, found=found, names=names, variants=variants)
        rows = examples(cfg, source, pictures, groups=groups, values=values, variants=variants)
        columns = ["LR", *variants]
        write_png(pictures / "contact_sheet.png",
                       sheet([[images[key] for key in columns] for _, images, _ in rows], columns))
        large = large_crops(cfg, policies, made_with, found=uncut, sources=sources)
        sr_report.write(folder, results, names=names, variants=kinds, rows=rows, large=large)
        dist.print0(f"open {folder / 'report.html'} in a browser")
    cost = results["seconds_per_sample"]
    run.write_manifest(folder, script=__file__, started=started, inputs=[source, judged_by, tuned],
                       results=results["headline"] | {
                           "seconds_per_image": round(cost["denoise"] + cost["decode"], 4),
                           **{f"seconds_per_image_{part}": value for part, value in cost.items()}})
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
