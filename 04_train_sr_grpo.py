"""
Improve a super-resolution diffusion policy with GRPO, scored by the reward model of stage 02.

The policy is the base policy of 01, or a published diffusion model (`policy`, `model`). One step of GRPO:

    roll out      K samples of each of G LR images: the small policy draws how much to sharpen where; then W denoising
                  steps add noise, the others are an ODE
    score         the judge's expected score, and LR-PSNR, which guards against a judge that is fooled
    advantages    scores are z-scored inside the K samples of an LR image (a group); every dB of LR-PSNR below the
                  floor costs guard_weight. The floor is about what the ground truth has: more likeness earns nothing
    learn         the clipped loss of these actions, map and random steps, and a KL to the policy before GRPO

Every `eval_every` steps the averaged weights are compared with the start, on validation images with fixed noise. They
become the best so far if the judge's score is the highest yet, unless one of two vetoes holds: LR-PSNR is below the
floor (and the start, which may be lower), or gold (the proxy label that 02 learned from, here of the policy's images;
it sees the ground truth) fell by more than is allowed. The best are kept; the last ones are reported beside them.

Training needs LR images and the judge alone. Ground truth, where there is any, sets the floor (01 measured it) and
gives gold, PSNR and a column of the sheets: of validation images is enough; without any, guard and vetoes are off.

What is left out of GRPO here: CFG (1 in rollout and training: half the cost, nothing to distill); the first latent as
an action (no signal is left in it, and the group shares it); with one update per rollout, the importance ratio (it is
exactly 1; the clip then never acts).

Run     python 04_train_sr_grpo.py configs/demo.yaml
        torchrun --standalone --nproc_per_node=8 04_train_sr_grpo.py configs/full.yaml
Reads   <run>/01_build_dataset/   groups.jsonl, LR and HR images, base/
        <run>/02_train_reward/    judge/ (or the judge of another run, see `judge`)
Writes  <run>/04_train_sr_grpo/   base/ (policy before GRPO)  policy/ (after: UNet2DModel, sampler.json, regressor,
                                  map; of a published model: the diffusers pipeline, LoRA by itself, a pointer before)
                                  samples/ (LR | before | now | HR)  metrics.jsonl  curves.png  checkpoints/
                                  manifest.json
Expect  demo: see the table in README.md
"""
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm

from common import dist, metrics, mllm, report, run, sr_pipelines, sr_policy
from common.config import fail, load_config
from common.dist import mine
from common.groups import all_groups, image_batch, in_split, pick, require_enough, require_one_size, shown_sizes
from common.grpo import gaussian_kl, group_advantages, grpo_loss
from common.images import sheet, to_pixels, write_png
from common.sr_pipelines import PIPELINES, Published
from common.sr_policy import Policy, Rollout, SAMPLERS
from common.training import (adapter_off, average, copied, count_bad_steps, named, resume, save_checkpoint,
                             swapped, trainable, update)

MAX_GRAD_NORM = 1.0                 # gradients are clipped to this norm
ADVANTAGE_CLIP = 5.0                # standard deviations
FLOOR_SLACK = 1.0                   # dB: the LR-PSNR floor is so much below the median of the ground truth
SHEET_ROWS = 8                      # of samples/step_*.png


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    judge: str | None = None            # stage-02 folder of another run, a model folder or hub id, or the YAML file of
                                        # a prompt (configs/judge.yaml); none: <run>/02_train_reward
    # policy ------------------------------------------------------------------------------------------------
    policy: str = "pixel"               # pixel: the base policy of 01; ldm, upscaler, sd3: `model`
    model: str = ""                     # of these: hub id or folder of the pipeline, safetensors only; pixel: a folder
    controlnet: str = ""                # sd3: hub id or folder of the tile ControlNet, if `model` does not hold one
    noise_level: int = 20               # upscaler: noise added to LR, as a time step of its training
    prompt: str = ""                    # upscaler, sd3: text that the network gets with every image, without guidance
    denoise_steps: int = 4              # T, divides 1000 (not so for sd3)
    gain: float = 0.15                  # pixel: share of the drawn detail that is added to the regressor's image
    sharpening: bool = True             # pixel: how much to sharpen where is an action, too
    # GRPO --------------------------------------------------------------------------------------------------
    steps: int = 60                     # GRPO steps
    inputs_per_step: int = 8            # LR images (G), over all GPUs: changes the result
    samples_per_input: int = 8          # K, the group size: changes the result
    samples_per_gpu: int = 32           # memory only
    gradient_checkpointing: bool = False    # memory only: activations are computed again, not kept
    updates_per_rollout: int = 1        # optimizer steps on the same samples; the map, of few elements, is clipped
                                        # after the first
    window_start: int = 0               # first random denoising step
    window_width: int = 3               # W, the random steps: of the denoising steps only they are trained
    sampler: str = "ddim"               # of the random steps: ddim, sde (Flow-GRPO's), cps (coefficients-preserving)
    eta: float = 1.0                    # their noise, see common/sr_policy.py; ddim at 1: as the forward process
    lr: float = 2e-3                    # AdamW
    warmup_steps: int = 10              # until lr is reached: Adam's first steps are mostly noise
    lora_rank: int = 4                  # 0: train all weights; the reference is then a frozen copy
    lora_alpha: int = 8                 # LoRA's scale is lora_alpha / lora_rank
    clip_range: float = 1e-4            # of the ratio; small, as a log-probability here is a mean over C h w elements
    kl_weight: float = 0.04             # KL between the means of the steps, to the policy before GRPO
    ema: float = 0.9                    # decay per step of the averaged weights, which are evaluated and kept
    ratio_tolerance: float = 1e-5       # |log ratio| of untrained samples beyond which the run does not start
    # reward ------------------------------------------------------------------------------------------------
    weight_consistency: float = 0.0     # of the judge's three axes in its score
    weight_naturalness: float = 0.0     # see above
    weight_overall: float = 1.0         # see above
    guard_weight: float = 1.0           # per dB of LR-PSNR below the floor; the z-scored judge has 1
    std_floor: float = 1e-3             # digits; groups whose scores spread less are left out of the update
    crop: int = 0                       # px of SR that the judge sees at once; 0: the whole image
    crops_per_image: int = 4            # at most, evenly spread; the score is their mean
    # evaluation --------------------------------------------------------------------------------------------
    eval_every: int = 20                # GRPO steps between evaluations, and candidates for the best
    eval_inputs: int = 60               # LR images of the val split, one fixed seed each; with ground truth, if any
    max_gold_drop: float = 0.0          # of gold (the proxy label, which sees the ground truth), from the start: a veto
    save_every: int = 10                # steps between checkpoints

    def __post_init__(self):
        for key in ("noise_level", "steps", "window_start", "warmup_steps", "lora_rank", "clip_range", "kl_weight",
                    "ratio_tolerance", "std_floor", "crop"):
            assert vars(self)[key] >= 0, f"{key}={vars(self)[key]}: should be at least 0"
        for key in ("denoise_steps", "inputs_per_step", "samples_per_gpu", "updates_per_rollout", "window_width",
                    "lora_alpha", "crops_per_image", "eval_every", "eval_inputs", "save_every"):
            assert vars(self)[key] >= 1, f"{key}={vars(self)[key]}: should be at least 1"
        assert self.samples_per_input >= 2, f"samples_per_input={self.samples_per_input}: should be at least 2"
        for key in ("lr", "gain"):
            assert vars(self)[key] > 0, f"{key}={vars(self)[key]}: should be above 0"
        assert 0 <= self.ema < 1, f"ema={self.ema}: should be from 0 to below 1"
        assert self.policy in ("pixel", *PIPELINES), f"policy={self.policy}: should be pixel, {', '.join(PIPELINES)}"
        assert self.model or self.policy == "pixel", f"model={self.model!r}: policy={self.policy} needs one"
        assert not self.controlnet or self.policy == "sd3", f"controlnet={self.controlnet}: policy=sd3 alone has one"
        assert not self.prompt or self.policy in ("upscaler", "sd3"), \
            f"prompt={self.prompt}: only policy=upscaler and sd3 read one"
        assert self.policy == "sd3" or 1000 % self.denoise_steps == 0, \
            f"denoise_steps={self.denoise_steps} should divide 1000"
        assert self.window_start + self.window_width < self.denoise_steps, \
            f"window_start + window_width should be in 1..{self.denoise_steps - 1}: the last step adds no noise"
        assert self.sampler in SAMPLERS, f"sampler={self.sampler}: should be {', '.join(SAMPLERS)}"
        assert 0 < self.eta <= (float("inf") if self.sampler == "sde" else 1), \
            f"eta={self.eta}: should be above 0, and at most 1 for ddim and cps"


# the policy before GRPO ------------------------------------------------------------------------------------------

def start_policy(cfg: Config, folder: Path, *, source: Path, scale: int) -> None:
    """Write the policy before GRPO to `folder`: the base policy of 01 at these settings, or a pointer to a model."""
    if cfg.policy != "pixel":
        return sr_pipelines.point_to(folder, Published(cfg.policy, cfg.model, scale, cfg.denoise_steps, cfg.noise_level,
                                                       cfg.controlnet, cfg.prompt))
    place = Path(cfg.model) if cfg.model else source / "base"
    if not (place / "sampler.json").exists():
        fail(f"policy: {place} holds no policy: build the set with base_steps above 0, or name the base/ of another "
             "run (model=) or a published policy (policy=, model=)")
    base = sr_policy.load_small(place, torch.device("cpu"))
    if base.sampler.scale != scale:
        fail(f"policy: {place} enlarges by {base.sampler.scale}, the images of {source} need {scale}: name another")
    if not cfg.sharpening:
        base.map = None
    elif base.map is None:
        torch.manual_seed(run.stable_seed(cfg.seed, "map"))             # networks start from torch's own generator
        base.map = sr_policy.SharpeningMap()
    if dist.is_main():
        folder.mkdir(exist_ok=True)
        sr_policy.with_sampling(base, steps=cfg.denoise_steps, gain=cfg.gain).save(folder)
    dist.barrier()


def with_reference(cfg: Config, policy: Policy) -> tuple[Policy, Policy]:
    """The policy to train, and the frozen one before GRPO: they share what is not trained, and a UNet that has LoRA."""
    if cfg.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    if cfg.lora_rank:
        torch.manual_seed(run.stable_seed(cfg.seed, "lora"))            # peft draws from torch's own generator
        policy.unet = get_peft_model(policy.unet, LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha,
                                                             target_modules=policy.lora_layers))
    own = ("map",) if cfg.lora_rank else ("map", "unet")                # the others: autoencoder, regressor, ..
    trained = copy.deepcopy(policy, {id(part): part for name, part in policy.named_children() if name not in own})
    for name in own:
        if getattr(trained, name) is not None:
            getattr(trained, name).requires_grad_(True)
    return trained, policy


# one step of GRPO ------------------------------------------------------------------------------------------------

def roll_out(policy: Policy, cfg: Config, lr: Tensor, *, ids: list[str], step: int) -> list[Rollout]:
    """K samples of each LR [g, 3, h, w], by group, in micro-batches; a group shares the first latent."""
    keys, k = [(cfg.seed, "rollout", step, name) for name in ids], cfg.samples_per_input
    seen = policy.observe(lr, keys).repeat_interleave(k, 0)             # by the group: with the same noise, if any
    shape = (policy.channels, *seen.shape[-2:])
    first = sr_policy.draw_noise(keys, (1, *shape), lr.device).repeat_interleave(k, 0)          # [g * K, 1, C, h, w]
    each = [(*key, i) for key in keys for i in range(k)]
    others = sr_policy.draw_noise(each, (cfg.window_width, *shape), lr.device)
    noise = torch.cat([first, others], 1)                                                   # [g * K, 1 + W, C, h, w]
    map_noise = None
    if policy.map is not None:
        map_noise = sr_policy.draw_noise([(*key, "map") for key in each], policy.map(seen[:1]).shape[1:], lr.device)
    return [sr_policy.sample(policy, seen[rows], noise[rows], map_noise=None if map_noise is None else map_noise[rows],
                             start=cfg.window_start, eta=cfg.eta, sampler=cfg.sampler)
            for rows in torch.arange(len(seen)).split(cfg.samples_per_gpu)]


def score(judge: mllm.Judge, cfg: Config, lr: Tensor, sr: Tensor) -> tuple[Tensor, Tensor]:
    """Score [g, k] (1..9) and LR-PSNR [g, k] (dB) of SR [g * k, 3, H, W] for LR [g, 3, h, w], in 0..1; or NaN."""
    finite = sr.flatten(1).isfinite().all(1).view(len(lr), -1).cpu()            # pixels cannot hold a NaN
    lrs, scale = to_pixels(lr), sr.shape[-1] // lr.shape[-1]
    srs = to_pixels(sr.nan_to_num()).reshape(len(lr), -1, *sr.shape[-2:], 3)
    axes = mllm.scores_in_crops(judge, lrs, srs, crop=cfg.crop, limit=cfg.crops_per_image,
                                images_per_forward=4 * cfg.samples_per_gpu)     # no gradient: more fit
    judged = axes @ torch.tensor([cfg.weight_consistency, cfg.weight_naturalness, cfg.weight_overall])
    fidelity = torch.tensor([[metrics.lr_psnr(image, low, scale) for image in group] for low, group in zip(lrs, srs)])
    return torch.where(finite, judged, torch.nan), torch.where(finite, fidelity, torch.nan)


def advantages_of(cfg: Config, judged: Tensor, fidelity: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """
    Advantages [g, K] of scores and LR-PSNRs [g, K], and whether the judge tells a group's samples apart [g].

    Scores are z-scored in the group. What LR-PSNR lacks to the floor (dB) is weighed as it is, less the group's mean.
    A group whose scores hardly differ gets 0, as does a sample for which one of the two is not finite.
    """
    valid = judged.isfinite() & fidelity.isfinite()
    judged, fidelity = (torch.where(valid, rewards, torch.nan) for rewards in (judged, fidelity))
    useful = spread(judged) > cfg.std_floor
    guard = (fidelity - floor).clamp(max=0)
    guard = (guard - guard.nanmean(1, keepdim=True)).nan_to_num()
    total = group_advantages(judged) + cfg.guard_weight * guard
    return total.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP) * useful[:, None], useful


def spread(rewards: Tensor) -> Tensor:
    """[g] population std of each row's numbers in rewards [g, K]; NaN are left out, and a row of NaN is NaN."""
    valid = ~rewards.isnan()
    filled = torch.where(valid, rewards, rewards.nanmean(1, keepdim=True))
    return filled.std(1, correction=0) * (rewards.shape[1] / valid.sum(1)).sqrt()


def learn(policy: Policy, reference: Policy, cfg: Config, *, rollouts: list[Rollout], advantages: Tensor,
          optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """
    Updates on a step's samples with advantages [g * K]; one without a finite loss and gradient changes nothing, on any
    rank. Returns what is logged.
    """
    weights = trainable(policy)
    old_logps, error, ratio_max, skipped_updates = [None] * len(rollouts), torch.zeros(()), torch.zeros(()), 0
    for _ in range(cfg.updates_per_rollout):
        sums = {}
        for i, (rollout, part) in enumerate(zip(rollouts, advantages.split(cfg.samples_per_gpu))):
            loss, logp, row = loss_of(policy, reference, cfg, rollout=rollout, advantages=part.to(rollout.seen.device),
                                      old_logp=old_logps[i])
            loss.backward()
            if old_logps[i] is None:                                    # the policy is still the one that sampled
                old_logps[i] = logp
                error = torch.maximum(error, (logp - rollout.logp).abs().max().cpu())
            ratio_max = torch.maximum(ratio_max, row.pop("ratio_max").cpu())
            sums = {name: sums.get(name, 0) + value.cpu() for name, value in row.items()}
        norm, skipped = update(weights, {"adamw": optimizer}, MAX_GRAD_NORM, bad=not sums["loss"].isfinite())
        skipped_updates += skipped
    totals = dict(zip(sums, dist.all_sum(torch.stack([*sums.values()])).tolist()))
    ratio_max, error = dist.gather_rows(torch.stack([ratio_max, error])[None]).max(0).values.tolist()
    return totals | {"grad_norm": norm, "skipped_updates": skipped_updates, "ratio_max": ratio_max,
                     "ratio_error": error}


def loss_of(policy: Policy, reference: Policy, cfg: Config, *, rollout: Rollout, advantages: Tensor,
            old_logp: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """
    Loss of a micro-batch of B samples with advantages [B]: its part of the mean over all actions of the step.

    old_logp: [B, A] log-probabilities under the policy that sampled; None: that is this one. Returns the loss, the
    log-probabilities now, and what is logged: parts that sum to means over the step, and ratio_max.
    """
    actions = sr_policy.replay(policy, rollout)
    logp = sr_policy.log_prob(rollout, actions)                                 # [B, A]
    count = cfg.inputs_per_step * cfg.samples_per_input * logp.shape[1]         # of the step, over all GPUs
    loss, stats = grpo_loss(logp, logp.detach() if old_logp is None else old_logp, advantages,
                            clip_low=cfg.clip_range, clip_high=cfg.clip_range, denominator=count)
    row = {"loss": loss.detach()}
    if cfg.kl_weight:                                                           # or else the reference is not asked
        with torch.no_grad(), adapter_off(reference.unet):
            before = sr_policy.replay(reference, rollout)
        ref_kl = sum(gaussian_kl(now.mean, ref.mean, now.std).sum() for now, ref in zip(actions, before)) / count
        loss, row["ref_kl"] = loss + cfg.kl_weight * ref_kl, ref_kl.detach()
    row |= {key: stats[key] * logp.numel() / count for key in ("policy_kl", "clip_frac_low", "clip_frac_high")}
    return loss, logp.detach(), row | {"ratio_max": stats["ratio_max"]}


def check_ratio(policy: Policy, cfg: Config, rollouts: list[Rollout]) -> float:
    """Largest |log ratio| between sampling and training with the same weights; stops the run if too large."""
    worst = torch.zeros(())
    with torch.no_grad():
        for rollout in rollouts:
            logp = sr_policy.log_prob(rollout, sr_policy.replay(policy, rollout))
            worst = torch.maximum(worst, (logp - rollout.logp).abs().max().cpu())
    worst = float(dist.gather_rows(worst[None]).max())
    if not worst <= cfg.ratio_tolerance:
        fail(f"ratio check: log-probabilities are {worst:.1e} off in training, more than ratio_tolerance="
             f"{cfg.ratio_tolerance}: is there dropout, or low precision, in the policy?")
    return worst


def summary(judged: Tensor, fidelity: Tensor, useful: Tensor) -> dict[str, Tensor]:
    """What is logged of a step's scores [g, K], LR-PSNRs [g, K] and useful [g], over all ranks, without NaN."""
    judged, fidelity = dist.gather_rows(judged), dist.gather_rows(fidelity)                     # [G, K]
    stds = spread(torch.where(judged.isfinite(), judged, torch.nan))
    mean = {name: values[values.isfinite()].mean() for name, values in
            (("reward_mean", judged), ("reward_std", stds), ("lr_psnr", fidelity))}
    return mean | {"zero_std_groups": dist.all_sum((~useful).sum()),
                   "bad_rewards": int((~(judged.isfinite() & fidelity.isfinite())).sum())}


# evaluate --------------------------------------------------------------------------------------------------------

def evaluate(policy: Policy, judge: mllm.Judge, cfg: Config, *, source: Path,
             groups: list[dict]) -> tuple[dict[str, float], np.ndarray]:
    """
    Mean score and LR-PSNR, with ground truth gold and PSNR, too, of one deterministic sample per LR image; the samples
    [n, H, W, 3].
    """
    policy.eval()
    groups, device = mine(groups), policy.times.device
    lr, keys = image_batch(source, groups, "lr"), [(cfg.seed, "evaluate", group["id"]) for group in groups]
    seen = policy.observe(lr.to(device), keys)
    noise = sr_policy.draw_noise(keys, (policy.channels, *seen.shape[-2:]), device)
    sr = torch.cat([sr_policy.restore(policy, seen[rows], noise[rows])
                    for rows in torch.arange(len(groups)).split(cfg.samples_per_gpu)])
    columns = list(score(judge, cfg, lr, sr))                                               # [n, 1] each
    sr = sr.nan_to_num()
    if groups[0]["hr"]:
        pairs = list(zip(to_pixels(sr), to_pixels(lr), to_pixels(image_batch(source, groups, "hr"))))
        rows = [[metrics.gold(*images)[0], metrics.psnr(images[0], images[2])] for images in pairs]
        columns.append(torch.tensor(rows).to(columns[0]))
    values = dist.gather_rows(torch.cat(columns, 1))
    unread = values[:, 0].isnan() & values[:, 1].isfinite()             # a reply of a PromptedJudge did not parse
    means = [values[~unread, 0].mean().item(), *values[:, 1:].mean(0).tolist()]
    return dict(zip(("val_reward", "val_lr_psnr", "val_gold", "val_psnr"), means)), to_pixels(dist.gather_rows(sr))


def is_best(cfg: Config, values: dict[str, float], *, start: dict[str, float], best: dict[str, float],
            floor: float) -> bool:
    """Whether an evaluation has the highest score so far and neither veto; NaN never has. floor: of LR-PSNR, dB."""
    faithful = values["val_lr_psnr"] >= min(floor, start["val_lr_psnr"])
    not_fooled = "val_gold" not in start or values["val_gold"] >= start["val_gold"] - cfg.max_gold_drop
    return faithful and not_fooled and values["val_reward"] > best["val_reward"]


def write_sheet(path: Path, *, source: Path, groups: list[dict], before: np.ndarray, now: np.ndarray) -> None:
    """The same inputs with the same seeds at every evaluation: LR | before | now | ground truth, if there is any."""
    if not dist.is_main():
        return
    shown = groups[:SHEET_ROWS]
    columns = {"LR": to_pixels(image_batch(source, shown, "lr")), "before GRPO": before, "now": now}
    if shown[0]["hr"]:
        columns["ground truth"] = to_pixels(image_batch(source, shown, "hr"))
    path.parent.mkdir(exist_ok=True)
    write_png(path, sheet([list(row) for row in zip(*columns.values())], list(columns)))


# the stage -------------------------------------------------------------------------------------------------------

def outcome(start: dict[str, float], best: dict[str, float], last: dict[str, float]) -> dict[str, float | None]:
    """Results: numbers of the evaluation at the start, of the best and of the last weights; null: no ground truth."""
    values = {"start": start, "end": best, "last": last}
    return {f"{name}_{when}": None if one.get(f"val_{name}") is None else round(one[f"val_{name}"], 4)
            for name in ("reward", "lr_psnr", "gold", "psnr") for when, one in values.items()}


@run.explained()
def main(cfg: Config) -> None:
    # 1. data
    started, device = time.time(), dist.init()
    folder = run.open_stage(cfg, __file__, free=("samples_per_gpu", "gradient_checkpointing", "save_every"))
    source = run.require(cfg.run, "01_build_dataset")
    judged_by = Path(cfg.judge) if cfg.judge else run.require(cfg.run, "02_train_reward")
    groups = all_groups(source)
    train, val = (in_split(source, groups, split) for split in ("train", "val"))
    val = [group for group in val if group["hr"]] or val
    require_one_size(source, train + val)
    require_enough(len(train), inputs_per_step=cfg.inputs_per_step)
    fixed = [val[i] for i in sorted(run.np_rng(cfg.seed, "evaluate").permutation(len(val))[:cfg.eval_inputs])]
    if min(cfg.inputs_per_step, len(fixed)) < dist.world_size():
        fail(f"{dist.world_size()} processes are more than inputs_per_step={cfg.inputs_per_step} or the {len(fixed)} "
             "validation images: start fewer")
    facts = run.read_json(source / "manifest.json")["results"]
    if "lr_psnr_hr" not in facts:
        fail(f"{source} was built before 01 measured the LR-PSNR of the ground truth: delete it and build it again")
    floor = -math.inf if facts["lr_psnr_hr"] is None else facts["lr_psnr_hr"] - FLOOR_SLACK
    dist.print0(f"read {source}: {len(train)} training images; {len(fixed)} of {len(val)} validation images\n"
                f"GRPO: {cfg.steps} steps of {cfg.inputs_per_step} x {cfg.samples_per_input} samples; "
                f"{cfg.window_width} of {cfg.denoise_steps} denoising steps are trained\n"
                + (f"LR-PSNR floor: {floor:.1f} dB" if math.isfinite(floor) else
                   "no ground truth: there is no LR-PSNR floor, and guard and vetoes are off"))
    judge = mllm.load_judge(judged_by, device)
    mllm.check_sizes(judge, shown_sizes(source, train[:1], cfg.crop), "set crop= so")

    # 2. the policy before GRPO
    start_policy(cfg, folder / "base", source=source, scale=train[0]["scale"])
    policy, reference = with_reference(cfg, sr_pipelines.load_policy(folder / "base", device))
    start, before = evaluate(policy, judge, cfg, source=source, groups=fixed)
    if not all(np.isfinite(list(start.values()))):
        fail(f"{folder}: the policy before GRPO scores {start}: look at base/ and at the judge of 02")
    write_sheet(folder / "samples" / "step_0000.png", source=source, groups=fixed, before=before, now=before)

    # 3. GRPO
    weights = trainable(policy)
    averaged, best = copied(weights), copied(weights)
    optimizer = torch.optim.AdamW(weights.values(), lr=cfg.lr, weight_decay=0.0)
    first, state = resume(folder, named(policy=weights, averaged=averaged, best=best), {"adamw": optimizer})
    state = state or {"best": start, "best_step": 0, "last": start, "bad": 0, "ratio_error": 0.0, "seconds": 0.0}
    run.trim_metrics(folder, first)
    bar = tqdm(range(first, cfg.steps), "GRPO", initial=first, total=cfg.steps, disable=not dist.is_main())
    for step in bar:
        times = [dist.clock(device)]
        groups = mine(pick(train, cfg.seed, "sr", step, cfg.inputs_per_step))
        lr, ids = image_batch(source, groups, "lr"), [group["id"] for group in groups]
        policy.eval()
        rollouts = roll_out(policy, cfg, lr.to(device), ids=ids, step=step)
        times.append(dist.clock(device))
        judged, fidelity = score(judge, cfg, lr, torch.cat([rollout.images for rollout in rollouts]))
        times.append(dist.clock(device))
        advantages, useful = advantages_of(cfg, judged, fidelity, floor)
        policy.train()
        if step == first:
            check_ratio(policy, cfg, rollouts)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps))
        row = learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages.flatten(), optimizer=optimizer)
        average(averaged, weights, cfg.ema)
        times.append(dist.clock(device))

        row |= summary(judged, fidelity, useful) | {
            f"seconds_{part}": seconds for part, seconds in zip(("sample", "score", "update"), np.diff(times).tolist())}
        row |= {"lr": optimizer.param_groups[0]["lr"], "peak_memory_gb": run.peak_memory_gb()}
        state["seconds"] += times[-1] - times[0]
        state["ratio_error"] = max(state["ratio_error"], row["ratio_error"])
        done = step + 1
        if done % cfg.eval_every == 0 or done == cfg.steps:
            with swapped(weights, averaged):
                values, now = evaluate(policy, judge, cfg, source=source, groups=fixed)
            write_sheet(folder / "samples" / f"step_{done:04d}.png", source=source, groups=fixed, before=before,
                        now=now)
            state["last"] = values
            if is_best(cfg, values, start=start, best=state["best"], floor=floor):
                state |= {"best": values, "best_step": done}
                average(best, averaged, 0.0)
            row |= values
            bar.set_postfix(reward=f"{values['val_reward']:.3f}", lr_psnr=f"{values['val_lr_psnr']:.2f}")
        report.log(folder, step, row)
        reason = f"a loss or gradient is not finite, {row['skipped_updates']} times" if row["skipped_updates"] else ""
        if row["bad_rewards"] == cfg.inputs_per_step * cfg.samples_per_input:
            reason = "no reward is finite"
        if reason:
            bar.clear()                                                 # or the message hangs on its line
        state["bad"] = count_bad_steps(state["bad"], reason, folder=folder, step=step)
        if done % cfg.save_every == 0:
            save_checkpoint(folder, done, weights=named(policy=weights, averaged=averaged, best=best),
                            optimizers={"adamw": optimizer}, state=state)

    # 4. the best weights and results
    average(weights, best, 0.0)
    if dist.is_main():
        policy.save(folder / "policy")
    samples = cfg.steps * cfg.inputs_per_step * cfg.samples_per_input
    dist.print0("policy/ holds the last averaged weights: they are the best" if state["best_step"] == cfg.steps else
                f"policy/ holds the averaged weights of step {state['best_step']}: the last, of step {cfg.steps}, are "
                "not better, or a veto holds")
    run.write_manifest(folder, script=__file__, started=started, inputs=[source, judged_by], results=outcome(
        start, state["best"], state["last"]) | {
        "lr_psnr_floor": round(floor, 3), "best_step": state["best_step"], "ratio_error_max": state["ratio_error"],
        "samples_per_second": round(samples / max(state["seconds"], 1e-9), 2)})
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
