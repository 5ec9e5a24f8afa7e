"""
Compare the super-resolution policy before and after GRPO on the test photographs, with the same noise.

Reported are the reward that stage 04 optimized, fidelity (PSNR, SSIM, LR-PSNR), and gold: the proxy label that the
judge learned from, min(consistency, detail), which reads the ground truth. The policy was not trained on it, but 04
drops checkpoints that it finds worse, on validation photographs: it is not held out. ST-LPIPS, which nothing here
optimized or selected by, is measured where its weights are (`stlpips`). Bicubic and the ground truth are rows of every
table, as are two rivals that need no GRPO: the best of the base's samples by the judge, and (small policy) the
regressor's image sharpened. A published model is compared at guidance 1, as 04 tunes it; one sample of it as diffusers
runs it by default is a row, too. Intervals are paired bootstraps over test images.

With lr_dir it restores a folder of yours instead: pictures of any size, no ground truth.

Run     python 05_eval_sr.py configs/demo.yaml
        python 05_eval_sr.py configs/demo.yaml lr_dir=my_photos out=restored/
        torchrun --standalone --nproc_per_node=8 05_eval_sr.py configs/full.yaml
Reads   <run>/01_build_dataset/   the test split       <run>/02_train_reward/   judge/, or judge=
        <run>/04_train_sr_grpo/   base/ (before), policy/ (after), or policy=
        with lr_dir: your pictures and the policy; 01's groups and the judge if they are there, for scores
Writes  <run>/05_eval_sr/         report.html (open it in a browser)  results.json  table.md  per_image.jsonl
                                  crops.png (LR | bicubic | base | tuned | ground truth)  images/  manifest.json
        <run>/05_eval_sr_<name>/ or out=, for your folder: see common/restoring.py; open index.html in a browser
Expect  demo: see the table in README.md
"""
import html
import importlib.metadata
import re
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import degrade, dist, iqa, metrics, mllm, report, restoring, run, sr_pipelines, sr_policy, st_lpips
from common.config import fail, load_config
from common.groups import image_batch, judged_on, load_groups, require_one_size
from common.images import evenly, find, from_pixels, listed, luma, read_image, resize, sheet, to_pixels, write_png
from common.sr_policy import Policy

LONGEST_WAIT = timedelta(days=2)    # of ranks that are done for the one with the most of your pictures
LEAST_ZOOM = 0.5                    # of the large crops' photographs: pixels as sharp as those of 01's crops
VARIANTS = {                        # what is compared -> (name in the report, what it is)
    "bicubic": ("bicubic", "LR up-sampled"),
    "sharpened": ("regressor, sharpened", "a rival of one line: the small policy's regressor alone, and once more "
                  f"what a blur of {sr_policy.MAP_BOX} px takes from it"),
    "base": ("base", "the policy before GRPO"),
    "default": ("base, its own default", "the published model as diffusers runs it, with its own steps and guidance "
                "(which acts if stage 04 had a prompt): one sample"),
    "best_of_n": ("best of N", "of all the base's samples of an image the one that the judge scores highest, without "
                  "GRPO. As the judge picked it, its reward is optimistic; the other columns are fair"),
    "tuned": ("tuned", "the policy after GRPO"),
    "hr": ("ground truth", "the photograph itself")}
SHOWN = ("bicubic", "base", "tuned", "hr")      # of these, as images
METRICS = {                         # what is measured -> (name in the report, what it means)
    "reward": ("reward", "score of the stage-02 judge, 1 to 9. Stage 04 optimized it: its rise alone proves little"),
    "gold": ("gold", "min(consistency, naturalness), 0 to 1: the proxy label, which reads the ground truth, and from "
             "which a judge learns where there are no people's labels. Stage 04 did not optimize it (on validation "
             "photographs, it drops checkpoints that fall below the start); where the reward rises and gold falls, the "
             "judge is fooled"),
    "proxy_consistency": ("consistency", "first half of gold: agreement with the ground truth at the size of LR, "
                          "beyond what LR itself has wrong"),
    "proxy_naturalness": ("naturalness", "second half: the detail of each fineness, place by place, of "
                          "the ground truth. Blur and noise both lower it"),
    "psnr": ("PSNR, dB", "pixel by pixel likeness to the ground truth. It rewards blur"),
    "ssim": ("SSIM", "likeness of local structure to the ground truth, up to 1"),
    "stlpips": ("ST-LPIPS", "learned perceptual distance to the ground truth: lower is better. Nothing here optimized "
                "it or selected by it"),
    "lr_psnr": ("LR-PSNR, dB", "likeness of the down-sampled image to LR: the guard against invented content. "
                "The ground truth has a low one, too, as LR was degraded")}
IN_MANIFEST = {                     # results: of METRICS, which variants
    "psnr": SHOWN[:3], "ssim": SHOWN[:3], "stlpips": SHOWN[:3], "reward": SHOWN, "gold": ("base", "tuned"),
    "lr_psnr": SHOWN[1:]}


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    judge: str | None = None            # stage-02 folder of another run, a model folder or hub id, or the YAML file of
                                        # a prompt (configs/judge.yaml); none: as in stage 04
    policy: str | None = None           # stage-04 folder of another run, or a policy folder, compared with this run's
                                        # policy before GRPO; none: this run's
    seeds_per_image: int = 2            # samples (M) of each policy per LR image; the judge picks the best of as many
    images_per_gpu: int = 16            # LR images, or tiles of your pictures, at a time: memory only
    shown_images: int = 8               # test images in the report, evenly spaced by gain in reward; your pictures
    large_crops: int = 4                # larger crops of the test photographs, on crops.png; 0: none
    large_size: int = 192               # px, their side
    stlpips: str | None = None          # folder of the unpacked wheel with ST-LPIPS's weights, see common/st_lpips.py
    pyiqa_metrics: list[str] = field(default_factory=list)  # measured, too, if pyiqa is installed, e.g. musiq
    # restore a folder of yours, without ground truth: with lr_dir, the test split is not looked at --------------
    lr_dir: str | None = None           # folder of pictures, of any size
    out: str | None = None              # folder for the results; none: <run>/05_eval_sr_<name of lr_dir>
    variants: list[str] = field(default_factory=lambda: ["tuned"])      # tuned, base, or both
    tile: int = 64                      # LR px; larger pictures are restored in tiles of this side
    overlap: int = 16                   # LR px that neighboring tiles share at least
    color_fix: str = "auto"             # none, adain, wavelet; auto: none for policy pixel, wavelet for the others
    judge_crops: int = 16               # crops of a picture, evenly spread, that the judge scores; 0: no scores

    def __post_init__(self):
        assert min(self.seeds_per_image, self.images_per_gpu, self.shown_images) >= 1 and self.large_crops >= 0, \
            "seeds_per_image, images_per_gpu and shown_images should be at least 1, large_crops 0 or more"
        assert self.large_size >= 32, f"large_size={self.large_size}: should be at least 32"
        assert self.variants and set(self.variants) <= {"tuned", "base"}, \
            f"variants={self.variants}: should be tuned, base or both"
        assert self.tile >= 8 and 0 <= self.overlap <= self.tile / 2, \
            f"tile={self.tile}, overlap={self.overlap}: tile should be 8 or more, overlap 0 to half of it"
        assert self.color_fix in restoring.COLOR_FIXES, \
            f"color_fix={self.color_fix}: should be one of {', '.join(restoring.COLOR_FIXES)}"
        assert self.judge_crops >= 0, f"judge_crops={self.judge_crops}: should be 0 or more"
        assert self.lr_dir or not self.out, "out is for lr_dir; without it give run"


# what is compared -------------------------------------------------------------------------------------------

def policy_folders(cfg: Config) -> dict[str, Path]:
    """base, tuned -> folder of a policy: those of a stage 04, or `policy` itself and this run's policy before GRPO."""
    stage = Path(cfg.policy or f"{cfg.run}/04_train_sr_grpo")
    if (stage / "sampler.json").exists():                               # a policy folder
        return {"base": Path(cfg.run) / "04_train_sr_grpo" / "base", "tuned": stage}
    if cfg.policy and not (stage / "manifest.json").exists():
        fail(f"policy: {stage} is neither the folder of a finished stage 04 (it has no manifest.json) nor that of a "
             "policy (it has no sampler.json)")
    run.require(stage.parent, stage.name)
    return {"base": stage / "base", "tuned": stage / "policy"}


def load_policies(folders: dict[str, Path], device: torch.device, scale: int = 0) -> dict[str, Policy]:
    """Name -> policy; stops if one enlarges by another factor than `scale`, that of the test images, or the first."""
    policies = {name: sr_pipelines.load_policy(folder, device) for name, folder in folders.items()}
    for name, policy in policies.items():
        scale = scale or policy.sampler.scale
        if policy.sampler.scale != scale:
            fail(f"policy: {folders[name]} enlarges by {policy.sampler.scale}, here {scale} is needed: give another")
    return policies


def judge_folder(cfg: Config, tuned_by: Path) -> Path:
    """`judge`, or else the one that stage 04, in the folder tuned_by, optimized: by default the stage 02 beside it."""
    optimized = run.settings_of(tuned_by, "04_train_sr_grpo").get("judge")
    return Path(cfg.judge or optimized or tuned_by.parent / "02_train_reward")


def variants_of(policy: Policy) -> list[str]:
    """Of VARIANTS, those that there are: the small policy has a regressor, the others have a default of their own."""
    return [name for name in VARIANTS if name != ("default" if policy.kind == "pixel" else "sharpened")]


# restore and measure ----------------------------------------------------------------------------------------

def restore(policy: Policy, lr: Tensor, names: list[str], *, seed: int, samples: int) -> np.ndarray:
    """M samples of each LR [B, 3, h, w] in 0..1: uint8 [B, M, H, W, 3]. Noise depends on seed, name and m alone."""
    keys = [(seed, "test", name, m) for name in names for m in range(samples)]
    lr = lr.to(policy.times.device).repeat_interleave(samples, 0)
    seen = policy.observe(lr, keys)
    noise = sr_policy.draw_noise(keys, (policy.channels, *seen.shape[-2:]), lr.device)
    images = to_pixels(sr_policy.restore(policy, seen, noise))
    return images.reshape(len(names), samples, *images.shape[1:])


def bicubic(lr: Tensor, scale: int) -> np.ndarray:
    """[B, 3, h, w] in 0..1 -> uint8 [B, 1, H, W, 3]."""
    return to_pixels(sr_policy.upsample(lr, scale).clamp(0, 1))[:, None]


def sharpened(policy: Policy, lr: Tensor) -> np.ndarray:
    """The regressor's image of LR [B, 3, h, w] in 0..1, and what a box blurs away once more: uint8 [B, 1, H, W, 3]."""
    image = policy.mean(policy.observe(lr.to(policy.times.device)))
    return to_pixels(sr_policy.sharpen(image, 1.0).clamp(0, 1))[:, None]


def measure(image: np.ndarray, lr: np.ndarray, hr: np.ndarray, models: dict[str, torch.nn.Module],
            device: torch.device, stlpips: dict[str, Tensor] | None = None) -> list[float]:
    """METRICS but the reward (ST-LPIPS: with its weights), then pyiqa's, of one uint8 image [H, W, 3]."""
    values = [*metrics.gold(image, lr, hr), metrics.psnr(image, hr), metrics.ssim(image, hr)]
    if stlpips:
        x, y = (from_pixels(pixels).to(device) for pixels in (image, hr))
        values.append(float(st_lpips.distance(stlpips, x, y)))
    return [*values, metrics.lr_psnr(image, lr, len(hr) // len(lr)), *iqa.measure(models, image, hr, device)]


def measure_all(cfg: Config, policies: dict[str, Policy], judge: mllm.Judge, groups: list[dict], *, source: Path,
                rewarded: dict, models: dict[str, torch.nn.Module], pictures: Path,
                stlpips: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Restore and measure n test images; the images of the first seed are written to `pictures`.

    rewarded: settings of stage 04, so that the reward is the one that it optimized. Returns, as float64, values
    [n, variants_of, metrics] (means over seeds), wins [n] (share of seeds whose tuned sample has the higher reward,
    ties half), and the seconds that the tuned policy took.
    """
    weights = torch.tensor([rewarded[f"weight_{axis}"] for axis in metrics.AXES])
    variants, values, wins, seconds = variants_of(policies["base"]), [], [], torch.tensor(0.0, dtype=torch.float64)
    if "default" in variants:
        by_default = sr_pipelines.by_default(policies["base"].sampler, judge.device)
    for i in tqdm(range(0, len(groups), cfg.images_per_gpu), "restore and judge", disable=not dist.is_main()):
        batch = groups[i:i + cfg.images_per_gpu]
        names, lr, hr = [group["id"] for group in batch], *(image_batch(source, batch, key) for key in ("lr", "hr"))
        low, truth = to_pixels(lr), to_pixels(hr)
        before = restore(policies["base"], lr, names, seed=cfg.seed, samples=cfg.seeds_per_image)
        started = dist.clock(judge.device)
        after = restore(policies["tuned"], lr, names, seed=cfg.seed, samples=cfg.seeds_per_image)
        seconds += dist.clock(judge.device) - started
        parts = {"bicubic": bicubic(lr, batch[0]["scale"]), "base": before, "tuned": after, "hr": truth[:, None]}
        for variant in SHOWN:
            for name, image in zip(names, parts[variant]):
                write_png(pictures / f"{name}_{variant}.png", image[0])
        if "sharpened" in variants:
            parts["sharpened"] = sharpened(policies["base"], lr)
        if "default" in variants:
            parts["default"] = np.stack([by_default(one[None].to(judge.device), (cfg.seed, "test", name))
                                         for name, one in zip(names, lr)])[:, None]
        images = np.concatenate(list(parts.values()), 1)                            # [B, all, H, W, 3]
        rewards = mllm.scores_in_crops(judge, low, images, crop=rewarded["crop"],
                                       limit=rewarded["crops_per_image"]) @ weights
        fidelity = [[measure(image, *pair, models, judge.device, stlpips) for image in group]
                    for *pair, group in zip(low, truth, images)]
        table = torch.cat([rewards[..., None].double(), torch.tensor(fidelity, dtype=torch.float64)], 2)
        tables = dict(zip(parts, table.split([part.shape[1] for part in parts.values()], 1)))   # [B, 1 or M, metrics]
        picked = tables["base"][..., 0].argmax(1)
        tables["best_of_n"] = tables["base"][torch.arange(len(picked)), picked][:, None]
        values.append(torch.stack([tables[name].mean(1) for name in variants], 1))
        wins.append(((tables["tuned"] - tables["base"])[..., 0].sign() / 2 + 0.5).mean(1))
    return torch.cat(values), torch.cat(wins), seconds


# results ----------------------------------------------------------------------------------------------------

def summarize(values: np.ndarray, variants: list[str], names: list[str], seed: int) -> dict:
    """Means per variant, and mean and interval of tuned - base, from values [n, variants, metrics]."""
    gains = values[:, variants.index("tuned")] - values[:, variants.index("base")]              # [n, metrics]
    intervals = [[round(end, 4) for end in metrics.bootstrap_ci(column, seed)] for column in gains.T]
    return {"mean": {variant: dict(zip(names, values[:, v].mean(0).round(4).tolist()))
                     for v, variant in enumerate(variants)},
            "gain": dict(zip(names, gains.mean(0).round(4).tolist())), "gain_ci95": dict(zip(names, intervals))}


def table_rows(results: dict, names: dict[str, tuple]) -> list[list[str]]:
    """Head, a row for each variant, and tuned - base with its interval."""
    gains = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(results["gain"][name], *results["gain_ci95"][name]) for name in names]
    return [["", *(name for name, _ in names.values())],
            *([VARIANTS[variant][0], *(f"{mean[name]:.3f}" for name in names)]
              for variant, mean in results["mean"].items()),
            ["tuned - base", *gains]]


def write_results(folder: Path, results: dict, *, groups: list[dict], values: Tensor, wins: Tensor,
                  names: dict[str, tuple]) -> None:
    """results.json, table.md and per_image.jsonl."""
    run.write_lines(folder / "per_image.jsonl", [
        {"id": group["id"], "source": group["source"], "wins": win,
         **{variant: dict(zip(names, one)) for variant, one in zip(results["mean"], row)}}
        for group, row, win in zip(groups, values.tolist(), wins.tolist())])
    run.write_json(folder / "results.json", results)
    run.write_bytes(folder / "table.md", report.markdown([table_rows(results, names)]).encode())


# pictures and report ----------------------------------------------------------------------------------------

def examples(folder: Path, source: Path, groups: list[dict], values: dict[str, np.ndarray],
             count: int) -> list[tuple]:
    """
    (caption, name -> image, name -> scores) of test images, evenly spaced from smallest to largest gain.

    folder: of the images. values: of each variant, [n, metrics].
    """
    gains = values["tuned"][:, 0] - values["base"][:, 0]
    rows = []
    for i in np.argsort(gains, kind="stable")[evenly(len(gains), count)]:
        name = groups[i]["id"]
        images = {"LR": read_image(source / groups[i]["lr"])}
        images |= {VARIANTS[variant][0]: read_image(folder / f"{name}_{variant}.png") for variant in SHOWN}
        scores = {VARIANTS[variant][0]: "reward {:.2f}<br>gold {:.2f}".format(*values[variant][i])
                  for variant in SHOWN}
        rows.append((f"{name} ({groups[i]['source']}): reward {gains[i]:+.2f}", images, scores))
    return rows


def larger_crops(cfg: Config, policies: dict[str, Policy], sources: list[str], *, hr_dir: str | None,
                 degradation: str, scale: int) -> dict[str, dict[str, np.ndarray]]:
    """
    Caption -> name -> image: crops of the test photographs, larger than those that the policy was trained on.

    Of each photograph in turn, the part with the most detail (most_detailed) that is not yet there. {} if none are
    wanted, or there is no folder of photographs (any more), as after an import. hr_dir, degradation, scale: of 01.
    """
    if not cfg.large_crops or not hr_dir or not (hr_dir == "skimage" or listed(Path(hr_dir))):
        return {}
    found, crops, side, unit = [], {}, cfg.large_size, scale * policies["tuned"].multiple
    if side % unit:
        fail(f"large_size={side}: should be a multiple of {unit}, scale={scale} times {unit // scale}, of which "
             "sides of LR are multiples for this policy; or set large_crops=0")
    paths = dict(find(hr_dir, "hr_dir"))
    for source in sources:
        try:
            photo = read_image(paths[source])
        except (KeyError, ValueError) as error:
            dist.print0(f"no larger crop of {source}: its photograph is gone or broken ({error})")
            continue
        share = -(-cfg.large_crops // len(sources))
        found += enumerate((source, *place) for place in most_detailed(photo, side, share))
        if len(found) >= cfg.large_crops:
            break
    found = [place for _, place in sorted(found, key=lambda item: item[0])]
    for i, (source, where, hr) in enumerate(found[:cfg.large_crops]):
        rng = run.np_rng(cfg.seed, "large crop", i)
        low = degrade.apply(hr, degrade.sample_params(int(rng.integers(2**62)), degradation, scale))
        lr = from_pixels(low)
        images = {"bicubic": bicubic(lr, scale)[0, 0], "hr": hr} | {
            name: restore(policy, lr, [f"large {i}"], seed=cfg.seed, samples=1)[0, 0]
            for name, policy in policies.items()}
        crops[f"{source}, {where}"] = {"LR": low} | {VARIANTS[variant][0]: images[variant] for variant in SHOWN}
    return crops


def most_detailed(photo: np.ndarray, side: int, count: int) -> list[tuple[str, np.ndarray]]:
    """
    (where, crop [side, side, 3]) of a photograph, at most `count`, those with the most detail first.

    The photograph is shrunk, to LEAST_ZOOM at most, as far as it still holds `count` crops beside each other, and cut
    into such crops. Detail: mean difference of neighboring pixels' luma.
    """
    for zoom in np.linspace(LEAST_ZOOM, 1, 26):
        small = resize(photo, tuple(round(zoom * length) for length in photo.shape[1::-1]), "bicubic")
        rows, columns = (length // side for length in small.shape[:2])
        if rows * columns >= count:
            break
    down, across = ([(length - side * n) // 2 + side * i for i in range(n)]
                    for length, n in zip(small.shape[:2], (rows, columns)))
    crops = {f"{side} x {side} px at {x}, {y} of the photograph at {zoom:.0%} of its size":
             np.ascontiguousarray(small[y:y + side, x:x + side]) for y in down for x in across}
    return sorted(crops.items(), key=lambda item: -sum(np.abs(np.diff(luma(item[1]), axis=axis)).mean()
                                                       for axis in (0, 1)))[:count]


def crops_sheet(crops: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """The larger crops under each other, with PSNR and SSIM below each image."""
    columns, rows = list(next(iter(crops.values()))), [list(images.values()) for images in crops.values()]
    below = [["", *(f"{metrics.psnr(image, hr):.2f} dB, SSIM {metrics.ssim(image, hr):.3f}" for image in images), ""]
             for _, *images, hr in rows]
    return sheet(rows, columns, cell=len(rows[0][-1]), below=below)


def report_page(results: dict, names: dict[str, tuple], rows: list[tuple], large: dict[str, dict],
                log: Path) -> str:
    """report.html, with everything inside. rows: of examples; large: caption -> images; log: 04's metrics.jsonl."""
    def from_to(name: str, digits: str) -> tuple[str, str]:
        before, after = (format(results["mean"][variant][name], digits) for variant in ("base", "tuned"))
        low, high = results["gain_ci95"][name]
        return f"{before} -> {after}", f"95 % interval of the gain [{low:+.3f}, {high:+.3f}]"

    parts = [f"<p>A diffusion policy for super-resolution before and after GRPO on the score of a reward model that "
             f"sees the low-resolution (LR) image. {results['images']} test images, cut from photographs that no stage "
             f"was trained on; {results['seeds_per_image']} samples each, with the same noise.</p>"]
    caption, images = [*large.items(), rows[-1][:2]][0]
    not_measured = [] if "stlpips" in names else [
        "<li><b>ST-LPIPS</b> was not measured. Where there is network: <code>"
        f"{html.escape(st_lpips.HOW_TO_GET)}</code>, delete this folder, and run 05 with stlpips=stlpips.</li>"]
    parts.append(report.figure(report.compare(images["base"], images["tuned"]),
                               f"Drag: before GRPO on the left, after GRPO on the right. {html.escape(caption)}."))
    parts += [
        report.cards([("reward", *from_to("reward", ".2f")),
                      ("tuned sample preferred", f"{results['win_rate']:.0%}", "by the judge, same image and noise"),
                      ("gold", *from_to("gold", ".3f")), ("LR-PSNR, dB", *from_to("lr_psnr", ".1f"))]),
        "<h2>Measured</h2>", report.table(table_rows(results, names), "tuned"),
        "<ul>", *(f"<li><b>{name}</b>: {meaning}.</li>" for name, meaning in
                  (*names.values(), *(VARIANTS[variant] for variant in results["mean"]))), *not_measured, "</ul>",
        "<h2>Test images</h2><p>Not picked by eye: evenly spaced by gain, from the smallest on.</p>",
        *(report.figure(report.row(images, scores), html.escape(caption)) for caption, images, scores in rows)]
    if large:
        parts.append("<h2>Larger crops</h2><p>The same weights, on larger images than those of training. Not picked by "
                     "eye: the parts of the test photographs with the most detail, that do not overlap.</p>")
    parts += [report.figure(report.row(images, {}), html.escape(caption)) for caption, images in large.items()]
    parts += [
        "<h2>How the policy was tuned (stage 04)</h2><p>Validation images with fixed noise. The reward is to rise, "
        "LR-PSNR and gold not to fall, the KL to the policy before GRPO to stay small.</p>",
        report.curves(log, ("val_reward", "val_lr_psnr", "val_gold", "ref_kl")),
        "<h2>What this does not show</h2><p>Gold is a proxy computed from the ground truth, not people's votes. "
        "The intervals are over test images; these come from few photographs, so they say how sure the result is for "
        "such photographs, not for all.</p>"]
    return report.page("Super-resolution before and after GRPO", parts)


# a folder of yours ------------------------------------------------------------------------------------------

def load_folder_judge(cfg: Config, judged_by: Path, device: torch.device) -> tuple[mllm.Judge | None, int]:
    """The judge and the side (px of SR) of the crops that it learned on; none if it or stage 01 is missing."""
    sources = [parent / "01_build_dataset" for parent in (judged_by.parent, Path(cfg.run))]
    sources = [source for source in sources if (source / "groups.jsonl").exists()]
    missing = judged_by.name == "02_train_reward" and not (judged_by / "manifest.json").exists()
    if not cfg.judge_crops or not sources or missing:
        return None, 0
    return mllm.load_judge(judged_by, device), judged_on(sources[0])["hr_size"]


def restore_folder(cfg: Config) -> None:
    """Restore the pictures of lr_dir, in a folder of its own; those that are done already stay as they are."""
    started, device, folders = time.time(), dist.init(timeout=LONGEST_WAIT), policy_folders(cfg)
    name = re.sub(r"[^\w.-]+", "_", Path(cfg.lr_dir).resolve().name)[:80]
    out = Path(cfg.out or f"{cfg.run}/{Path(__file__).stem}_{name}")
    pictures = restoring.find_pictures(cfg.lr_dir, out)
    folder = run.open_stage(cfg, __file__, out, free=("images_per_gpu", "shown_images"), go_on=True)
    if dist.is_main():
        run.lock(folder)                                                # open_stage locks unfinished folders only
        (folder / "manifest.json").unlink(missing_ok=True)              # there may be new pictures to restore
    chosen = {name: folders[name] for name in cfg.variants}
    policies, policies_sha256 = load_policies(chosen, device), restoring.checksum(list(chosen.values()))
    judge, side = load_folder_judge(cfg, judge_folder(cfg, folders["base"].parent), device)
    dist.print0(f"{len(pictures)} pictures, restored by: {', '.join(cfg.variants)}; "
                + ("scored by the judge" if judge else "no scores: judge_crops=0, or stage 01 or 02 is missing"))
    count, clock = torch.tensor(0), time.time()
    for picture in tqdm(pictures[dist.rank()::dist.world_size()], "restore", disable=not dist.is_main()):
        if not restoring.is_done(folder, picture, policies_sha256):
            count += restoring.restore_picture(
                folder, picture, policies, policies_sha256=policies_sha256, seed=cfg.seed, tile=cfg.tile,
                overlap=cfg.overlap, batch=cfg.images_per_gpu, color_fix=cfg.color_fix, judge=judge, judge_side=side,
                judge_crops=cfg.judge_crops)
    count, seconds = int(dist.all_sum(count)), time.time() - clock      # and every rank is done
    if dist.is_main():
        records = restoring.write_page(folder, pictures, lr_dir=cfg.lr_dir, variants=cfg.variants,
                                       scale=policies[cfg.variants[0]].sampler.scale, shown_images=cfg.shown_images)
        restored = sum("reason" not in record for record in records)
        dist.print0(f"open {folder / 'index.html'} in a browser")
        run.write_manifest(folder, script=__file__, started=started, inputs=[folders["tuned"].parent], results={
            "pictures": restored, "restored_now": count, "files_left_out": len(records) - restored,
            "seconds_per_picture": round(seconds / count, 3) if count else None})
    dist.finish()


@run.explained()
def main(cfg: Config) -> None:
    if cfg.lr_dir:
        return restore_folder(cfg)
    started = time.time()
    device = dist.init()
    folder = run.open_stage(cfg, __file__, free=("images_per_gpu", "large_crops", "large_size"))

    # 1. test images, the judge, and the policies before and after GRPO
    source, folders = run.require(cfg.run, "01_build_dataset"), policy_folders(cfg)
    tuned_by = folders["base"].parent                                   # its settings say what the reward is
    judged_by = judge_folder(cfg, tuned_by)
    if judged_by == tuned_by.parent / "02_train_reward":                # another may be a bare model
        run.require(tuned_by.parent, "02_train_reward")
    groups = [group for group in load_groups(source, "test") if group["hr"]]
    if len(groups) < max(2, dist.world_size()):
        fail(f"{source}: {len(groups)} test images have HR, too few to compare on: give stage 01 more test_groups, or "
             "this stage fewer processes")
    require_one_size(source, groups)
    sources, made_with = sorted({group["source"] for group in groups}), run.settings_of(source, "01_build_dataset")
    dist.print0(f"{len(groups)} test images of {len(sources)} photographs, {cfg.seeds_per_image} seeds each")
    judge, models = mllm.load_judge(judged_by, device), iqa.load(cfg.pyiqa_metrics, device)
    stlpips = st_lpips.load(cfg.stlpips, device) if cfg.stlpips else None
    policies = load_policies(folders, device, groups[0]["scale"])
    large = larger_crops(cfg, policies, sources, hr_dir=made_with["hr_dir"], degradation=made_with["degradation"],
                         scale=made_with["scale"]) if dist.is_main() else {}

    # 2. restore and measure, every rank its share
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    values, wins, seconds = measure_all(cfg, policies, judge, dist.mine(groups), source=source,
                                        rewarded=run.settings_of(tuned_by, "04_train_sr_grpo"),
                                        models=models, pictures=pictures, stlpips=stlpips)
    values, wins, seconds = dist.gather_rows(values), dist.gather_rows(wins), dist.all_sum(seconds)
    read = values[..., 0].isfinite().all(1)                             # a reply of a PromptedJudge may not parse
    if not read.all():
        dist.print0(f"{int((~read).sum())} images are left out: a reply of the judge to them could not be read")
    groups, values, wins = [group for group, good in zip(groups, read) if good], values[read], wins[read]
    if len(groups) < 2:
        fail(f"{judged_by}: its replies can be read for {len(groups)} test images alone: change its prompt or pattern")

    # 3. results
    names = {name: text for name, text in METRICS.items() if name != "stlpips" or stlpips}
    names |= {name: (name, f"{'lower' if model.lower_better else 'higher'} is better; pyiqa "
                     f"{importlib.metadata.version('pyiqa')}") for name, model in models.items()}
    variants = variants_of(policies["base"])
    results = summarize(values.numpy(), variants, list(names), cfg.seed) | {
        "win_rate": round(float(wins.mean()), 4), "images": len(groups), "seeds_per_image": cfg.seeds_per_image,
        "denoise_steps": policies["tuned"].sampler.steps}
    headline = {f"{name}_{variant}": results["mean"][variant].get(name) for name, variants in IN_MANIFEST.items()
                for variant in variants}
    headline |= {f"{name}_gain_ci95": results["gain_ci95"][name] for name in ("reward", "gold")}
    headline |= {"win_rate": results["win_rate"],
                 "seconds_per_image": round(float(seconds) / (len(read) * cfg.seeds_per_image), 4)}

    # 4. pictures and report
    if dist.is_main():
        write_results(folder, results, groups=groups, values=values, wins=wins, names=names)
        by_variant = dict(zip(variants, values.transpose(0, 1).numpy()))
        rows = examples(pictures, source, groups, by_variant, cfg.shown_images)
        write_png(pictures / "contact_sheet.png", sheet([list(images.values()) for _, images, _ in rows],
                                                        list(rows[0][1])))
        if large:
            write_png(folder / "crops.png", crops_sheet(large))
        page = report_page(results, names, rows, large, folders["tuned"].parent / "metrics.jsonl")
        run.write_bytes(folder / "report.html", page.encode())
        dist.print0(f"open {folder / 'report.html'} in a browser")
    run.write_manifest(folder, script=__file__, started=started, inputs=[source, judged_by, tuned_by],
                       results=headline)
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
