"""
Improve a super-resolution diffusion policy with GRPO, scored by the reward model of stage 02.

The policy is first trained from nothing on the training photographs ("cold start", made once), or is a published
latent diffusion model (`policy`, `model`). Then it draws K samples for each of G LR images a step. The judge's
expected score and a sample's fidelity to LR (the guard against a judge that is fooled) are z-scored inside the group;
their sum trains the early denoising steps. Weights for which LR-PSNR or the held-out judge (the proxy, on validation
photographs) fall below the start are not kept, and a run can stop when they stay there. `plan=true` computes nothing:
it says how much there is to do, and how much memory that takes.

What is left out of GRPO here: CFG (1 in rollout and training: half the cost, nothing to distill); the first
latent as an action (no signal is left in it, and the group shares it); with one update per rollout, the
importance ratio (it is exactly 1; the clip then never acts).

Run     python 04_train_sr_grpo.py configs/demo.yaml
        torchrun --standalone --nproc_per_node=8 04_train_sr_grpo.py configs/full.yaml
Reads   <run>/01_build_dataset/   groups.jsonl, LR and HR images
        <run>/02_train_reward/    judge/
Writes  <run>/04_train_sr_grpo/   cold_start/ (policy before GRPO)  policy/ (after: UNet2DModel, sampler.json;
                                  of a published model: the diffusers pipeline, LoRA by itself, a pointer before)
                                  samples/ (LR | before | now | HR)  metrics.jsonl  checkpoints/
                                  manifest.json
Expect  demo: see the table in README.md
"""
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import (checkpoints, dist, mllm, report, run, sr_cold_start, sr_latent, sr_plan, sr_policy, sr_reward,
                    sr_training)
from common.checkpoints import list_checkpoints
from common.config import fail, load_config
from common.dist import mine
from common.groups import image_batch, load_groups, pick, require_enough, require_one_size
from common.images import sheet, to_pixels, write_png
from common.metrics import held_out
from common.sr_grpo import ALGORITHMS, check_ratio, copied, update, using
from common.sr_pipelines import LatentSampler, PIPELINES
from common.sr_policy import Policy, Rollout, SAMPLERS, SOLVERS, window_start
from common.sr_training import trainable, with_reference

PARTS = ("sample", "score", "update", "decode")                         # of a step's time
AT_LEAST_0 = ("noise_level", "steps", "window_start", "window_every", "warmup_steps", "lora_rank", "clip_low",
              "clip_high", "kl_weight", "ratio_tolerance", "std_floor", "fidelity_std_floor", "max_sample_drop",
              "crop", "patience")
AT_LEAST_1 = ("denoise_steps", "layers", "cold_start_steps", "cold_start_batch", "inputs_per_step", "samples_per_gpu",
              "updates_per_rollout", "window_width", "window_stride", "lora_alpha", "nft_times", "crops_per_image",
              "eval_every", "eval_inputs", "sheet_inputs", "save_every")


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    plan: bool = False                  # print sizes and a memory estimate, write nothing, and end
    # policy ------------------------------------------------------------------------------------------------
    denoise_steps: int = 5              # T, divides 1000 (not so for sd3)
    step_list: list[float] = field(default_factory=list)    # own T steps from noise to clean: time steps (0..999); sd3:
                                        # noise levels (sigma, 0..1) after the shift. None: the policy's own, even ones
    solver: str = "euler"               # of the steps that are not random: euler; dpm: DPM-Solver++ after the window
    policy: str = "pixel"               # pixel: a UNet of our own, made by the cold start; ldm, upscaler, sd3: `model`
    model: str = ""                     # of these: hub id or folder of the diffusers pipeline, safetensors only
    controlnet: str = ""                # sd3: hub id or folder of the tile ControlNet, if `model` does not hold one
    noise_level: int = 20               # upscaler: noise added to LR, as a time step of its training
    prompt: str = ""                    # upscaler, sd3: text that the network is told of every image, without guidance
    # pixel policy ------------------------------------------------------------------------------------------
    channels: list[int] = field(default_factory=lambda: [32, 64])   # of the UNet's levels: multiples of 32
    layers: int = 1                     # residual blocks per level
    contrast_power: float = 0.7         # detail is taken to grow with this power of LR's local contrast
    # cold start --------------------------------------------------------------------------------------------
    cold_start_steps: int = 1200        # optimizer steps on LR/HR pairs
    cold_start_batch: int = 16          # LR/HR pairs per step, over all GPUs: changes the result
    cold_start_lr: float = 2e-3         # AdamW
    cold_start_ema: float = 0.99        # decay per step of the averaged weights, which are the ones kept
    # GRPO --------------------------------------------------------------------------------------------------
    algorithm: str = "grpo"             # grpo; guard: GRPO-Guard's ratio; nft: DiffusionNFT, without random steps
    steps: int = 60                     # GRPO steps
    inputs_per_step: int = 8            # LR images (G), over all GPUs: changes the result
    samples_per_input: int = 8          # K, the group size: changes the result
    samples_per_gpu: int = 32           # memory only
    gradient_checkpointing: bool = False    # memory only: activations are computed again, not kept
    updates_per_rollout: int = 1        # optimizer steps on the same samples
    shared_noise: bool = True           # a group shares the first latent; false: each sample has its own
    window_start: int = 0               # first random denoising step
    window_width: int = 3               # W, the random steps: only they are trained
    window_every: int = 0               # GRPO steps after which the window moves on to cleaner steps; 0: it stays
    window_stride: int = 1              # denoising steps by which it then moves; it stops before the last one
    window_random: bool = False         # instead, each GRPO step draws the first random step, from window_start on
    sampler: str = "ddim"               # of the random steps: ddim, sde (Flow-GRPO's), cps (coefficients-preserving)
    eta: float = 1.0                    # their noise, see common/samplers.py; ddim at 1: as the forward process
    lr: float = 2e-3                    # AdamW
    warmup_steps: int = 10              # until lr is reached: Adam's first steps are mostly noise
    lora_rank: int = 16                 # 0: train all weights; the reference is then a frozen copy
    lora_alpha: int = 32                # LoRA's scale is lora_alpha / lora_rank
    clip_low: float = 1e-4              # small, as a log-probability here is a mean over C h w elements
    clip_high: float = 1e-4             # see clip_low
    advantage_clip: float = 5.0         # standard deviations
    kl_weight: float = 0.01             # KL between the means of the steps, to the policy before GRPO
    nft_beta: float = 1.0               # nft: smaller is bolder
    nft_times: int = 2                  # nft: noised copies per sample and update, each at a random denoising step
    nft_old_decay: float = 0.5          # nft: decay per step of the policy that samples; from 0, 0.001 more each step
    max_grad_norm: float = 1.0          # gradients are clipped to this norm
    ema: float = 0.9                    # decay per step of the averaged weights, which are evaluated and kept
    ratio_tolerance: float = 1e-5       # |log ratio| of untrained samples beyond which the run does not start
    # reward ------------------------------------------------------------------------------------------------
    weight_consistency: float = 0.0     # of the judge's three axes in its score
    weight_naturalness: float = 0.0     # see above
    weight_overall: float = 1.0         # see above
    guard_weight: float = 1.5           # of the z-scored LR-PSNR; the z-scored judge has 1
    aggregate: str = "advantages"       # each z-scored, then summed; rewards: summed in digits and dB, then z-scored
    advantage_std: str = "group"        # z-scores are over the std of the group; batch: of all of a step; none: over 1
    std_floor: float = 1e-3             # digits; groups whose scores spread less are left out of the update
    fidelity_std_floor: float = 0.02    # dB; a group's LR-PSNRs that spread less are z-scored over this
    max_sample_drop: float | None = None    # dB of LR-PSNR below the policy before GRPO (one sample of that input)
                                        # from which a sample gets no positive advantage; null: no such constraint
    crop: int = 0                       # px of SR that the judge sees at once; 0: the whole image
    crops_per_image: int = 4            # at most, evenly spread; the score is their mean
    # evaluation --------------------------------------------------------------------------------------------
    eval_every: int = 5                 # GRPO steps between evaluations, and candidates for the best
    eval_inputs: int = 60               # LR images of the val split, one fixed seed each
    sheet_inputs: int = 8               # rows of a sample sheet
    max_lr_psnr_drop: float = 0.3       # dB below the start beyond which weights cannot become the best
    max_heldout_drop: float = 0.0       # likewise for the held-out judge: the proxy, which sees the ground truth
    patience: int = 0                   # evaluations in a row below one of these with a reward above the start after
                                        # which the run stops by itself; 0: never
    save_every: int = 10                # steps between checkpoints; 20 times as many in the cold start

    def __post_init__(self):
        for keys, least in ((AT_LEAST_0, 0), (AT_LEAST_1, 1), (("samples_per_input",), 2)):
            for key in keys:
                assert vars(self)[key] is None or vars(self)[key] >= least, \
                    f"{key}={vars(self)[key]}: should be at least {least}"
        for key in ("lr", "cold_start_lr", "advantage_clip", "max_grad_norm", "nft_beta"):
            assert vars(self)[key] > 0, f"{key}={vars(self)[key]}: should be above 0"
        for key in ("ema", "cold_start_ema", "nft_old_decay"):
            assert 0 <= vars(self)[key] < 1, f"{key}={vars(self)[key]}: should be from 0 to below 1"
        assert self.policy in ("pixel", *PIPELINES), f"policy={self.policy}: should be pixel, {', '.join(PIPELINES)}"
        assert bool(self.model) == (self.policy != "pixel"), \
            f"model={self.model!r}: policy={self.policy} needs {'none' if self.model else 'one'}"
        assert not self.controlnet or self.policy == "sd3", f"controlnet={self.controlnet}: policy=sd3 alone has one"
        assert not self.prompt or self.policy in ("upscaler", "sd3"), \
            f"prompt={self.prompt}: only policy=upscaler and sd3 read one"
        assert self.step_list or self.policy == "sd3" or 1000 % self.denoise_steps == 0, \
            f"denoise_steps={self.denoise_steps} should divide 1000, or give step_list"
        assert len(self.step_list) in (0, self.denoise_steps), \
            f"step_list has {len(self.step_list)} steps, denoise_steps={self.denoise_steps}"
        assert self.step_list == sorted(set(self.step_list), reverse=True) and (
            all(0 < sigma <= 1 for sigma in self.step_list) if self.policy == "sd3" else
            all(time in range(1000) for time in self.step_list)), \
            f"step_list={self.step_list}: should fall, of {'0..1' if self.policy == 'sd3' else 'whole 0..999'}"
        assert self.solver in SOLVERS, f"solver={self.solver}: should be {' or '.join(SOLVERS)}"
        assert self.sampler in SAMPLERS, f"sampler={self.sampler}: should be {', '.join(SAMPLERS)}"
        assert 0 < self.eta <= (float("inf") if self.sampler == "sde" else 1), \
            f"eta={self.eta}: should be above 0, and at most 1 for ddim and cps"
        assert self.channels and all(width > 0 and width % 32 == 0 for width in self.channels), \
            f"channels={self.channels}: each should be a multiple of 32"
        for key, values in (("algorithm", ALGORITHMS), ("aggregate", ("advantages", "rewards")),
                            ("advantage_std", ("group", "batch", "none"))):
            assert vars(self)[key] in values, f"{key}={vars(self)[key]}: should be one of {', '.join(values)}"
        assert not (self.window_random and self.window_every), "give window_every or window_random, not both"
        last = self.denoise_steps - 1
        assert self.algorithm == "nft" or self.window_start + self.window_width <= last, \
            f"window_start + window_width should be in 1..{last}: the last denoising step adds no noise"


# sampling and reward -------------------------------------------------------------------------------------

def roll_out(policy: Policy, cfg: Config, lr: Tensor, *, ids: list[str], step: int) -> list[Rollout]:
    """K samples of each LR [g, 3, h, w], by group, in micro-batches; a group may share the first latent (not nft's)."""
    keys, k, is_nft = [(cfg.seed, "rollout", step, name) for name in ids], cfg.samples_per_input, cfg.algorithm == "nft"
    own = [(*key, i) for key in keys for i in range(k)]
    seen = policy.observe(lr, keys).repeat_interleave(k, 0)             # by the group: with the same noise, if any
    shape, width = (policy.channels, *seen.shape[-2:]), 0 if is_nft else cfg.window_width
    shared = cfg.shared_noise and not is_nft
    first = sr_policy.draw_noise(keys, (1, *shape), lr.device).repeat_interleave(k, 0) if shared else \
        sr_policy.draw_noise([(*key, "first") for key in own], (1, *shape), lr.device)
    noise = torch.cat([first, sr_policy.draw_noise(own, (width, *shape), lr.device)], 1)
    start = 0 if is_nft else window_start(step, cfg.window_start, width=width, steps=cfg.denoise_steps,
                                          every=cfg.window_every, stride=cfg.window_stride)
    if cfg.window_random and not is_nft:                                # one for all; Flow-GRPO-Fast: for each sample
        start = int(run.np_rng(cfg.seed, "window", step).integers(cfg.window_start, cfg.denoise_steps - width))
    return [sr_policy.sample(policy, seen[rows], noise[rows], start=start, eta=cfg.eta, sampler=cfg.sampler)
            for rows in torch.arange(len(seen)).split(cfg.samples_per_gpu)]


def score(judge: mllm.Judge, cfg: Config, lr: Tensor, sr: Tensor) -> tuple[Tensor, Tensor]:
    """Score [g, k] (1..9) and LR-PSNR [g, k] (dB) of SR [g * k, 3, H, W] for LR [g, 3, h, w], in 0..1; or NaN."""
    whole = sr.flatten(1).isfinite().all(1).view(len(lr), -1).cpu()             # pixels cannot hold a NaN
    weights, sr = torch.tensor([cfg.weight_consistency, cfg.weight_naturalness, cfg.weight_overall]), sr.nan_to_num()
    judged = sr_reward.expected_scores(judge, *sr_reward.by_input(lr, sr), crop=cfg.crop, limit=cfg.crops_per_image,
                                       at_once=4 * cfg.samples_per_gpu)              # no gradient: more fit
    judged, fidelity = judged @ weights, sr_reward.lr_psnrs(lr, sr)
    return torch.where(whole, judged, torch.nan), torch.where(whole, fidelity, torch.nan)


# evaluate ------------------------------------------------------------------------------------------------

def evaluate(policy: Policy, judge: mllm.Judge, cfg: Config, *, source: Path,
             groups: list[dict]) -> tuple[dict[str, float], np.ndarray]:
    """Mean score, held-out score and LR-PSNR of one deterministic sample per LR image; the samples [n, H, W, 3]."""
    policy.eval()
    own, device = mine(groups), policy.times.device
    lr, hr = image_batch(source, own, "lr"), to_pixels(image_batch(source, own, "hr"))
    keys = [(cfg.seed, "evaluate", group["id"]) for group in own]
    seen = policy.observe(lr.to(device), keys)
    noise = sr_policy.draw_noise(keys, (policy.channels, *seen.shape[-2:]), device)
    sr = torch.cat([sr_policy.restore(policy, seen[rows], noise[rows])
                    for rows in torch.arange(len(own)).split(cfg.samples_per_gpu)])
    judged, fidelity = score(judge, cfg, lr, sr)
    sr = sr.nan_to_num()
    held = torch.tensor([held_out(*images)[0] for images in zip(to_pixels(sr), to_pixels(lr), hr)])
    values = dist.gather_rows(torch.cat([judged, fidelity, held[:, None].to(judged)], 1)).mean(0).tolist()
    return dict(zip(("val_reward", "val_lr_psnr", "val_heldout"), values)), to_pixels(dist.gather_rows(sr))


def write_sheet(cfg: Config, path: Path, *, source: Path, groups: list[dict], before: np.ndarray,
                now: np.ndarray) -> None:
    """The same inputs with the same seeds at every evaluation: LR | before | now | HR."""
    if not dist.is_main():
        return
    lr, hr = (to_pixels(image_batch(source, groups[:cfg.sheet_inputs], key)) for key in ("lr", "hr"))
    path.parent.mkdir(exist_ok=True)
    rows = [list(row) for row in zip(lr, before, now, hr)]
    write_png(path, sheet(rows, ["LR", "before GRPO", "now", "HR"]))


# the stage -----------------------------------------------------------------------------------------------

def paired(source: Path, split: str) -> list[dict]:
    """The split's groups that have a ground truth. Labels are not needed here."""
    groups = [group for group in load_groups(source, split) if group["hr"]]
    if not groups:
        fail(f"{source}: the {split} split has no HR images: build it with hr_dir, not lr_dir")
    return groups


@run.explained()
def main(cfg: Config) -> None:
    started = time.time()
    device = dist.init()
    memory_only = ("samples_per_gpu", "gradient_checkpointing", "save_every")
    folder = None if cfg.plan else run.open_stage(cfg, __file__, free=memory_only)
    source = run.require(cfg.run, "01_build_dataset")
    judge_folder = run.require(cfg.run, "02_train_reward")
    train, val = paired(source, "train"), paired(source, "val")
    require_one_size(source, train + val)
    require_enough(train, cfg, "inputs_per_step")
    fixed = [val[i] for i in sorted(run.np_rng(cfg.seed, "evaluate").permutation(len(val))[:cfg.eval_inputs])]
    if min(cfg.inputs_per_step, cfg.cold_start_batch, len(fixed)) < dist.world_size():
        fail(f"{dist.world_size()} processes are more than inputs_per_step={cfg.inputs_per_step}, "
                 f"cold_start_batch={cfg.cold_start_batch} or the {len(fixed)} validation images: start fewer")
    dist.print0(f"read {source}: {len(train)} training pairs; {len(fixed)} of {len(val)} validation images\n"
                + (f"starts from {cfg.model}\n" if cfg.model else
                   f"cold start: {cfg.cold_start_steps} steps of {cfg.cold_start_batch} pairs\n") +
                f"GRPO: {cfg.steps} steps of {cfg.inputs_per_step} x {cfg.samples_per_input} samples; "
                + (f"{cfg.nft_times} noised copies of each" if cfg.algorithm == "nft" else
                 f"{cfg.window_width} of {cfg.denoise_steps} denoising steps") + f" are trained, by {cfg.algorithm}")
    scale = train[0]["scale"]
    sampler = LatentSampler(cfg.policy, cfg.model, scale, cfg.denoise_steps, cfg.noise_level, times=cfg.step_list,
                            solver=cfg.solver, controlnet=cfg.controlnet, prompt=cfg.prompt)
    if cfg.plan:
        policy = sr_cold_start.new_policy(cfg, source, train) if cfg.policy == "pixel" else sr_latent.build(sampler)
        sr_plan.show(cfg, *with_reference(cfg, policy.eval().requires_grad_(False)), lr=image_batch(source, train[:1], "lr"),
                     scale=scale, evaluated=len(fixed), judge=judge_folder)
        return dist.finish()

    cold = folder / "cold_start"
    if cfg.policy != "pixel":
        sr_latent.point_to(cold, sampler)
    elif (cold / "sampler.json").exists():
        sr_cold_start.adopt(cold, cfg)
    else:
        policy = sr_cold_start.new_policy(cfg, source, train).to(device)
        sr_cold_start.cold_start(policy, cfg, cold, source=source, groups=train)
    checkpoints.drop_checkpoints(cold)
    judge = mllm.load_judge(judge_folder, device)
    policy, reference = with_reference(cfg, sr_latent.load_policy(cold, device))
    weights = trainable(policy.unet)
    parts = {"policy": weights, "averaged": copied(weights), "best": copied(weights)}
    if cfg.algorithm == "nft":
        parts["old"] = copied(weights)                                  # of the policy that samples
    optimizer = torch.optim.AdamW(weights.values(), lr=cfg.lr, weight_decay=0.0)

    assess = partial(evaluate, policy, judge, cfg, source=source, groups=fixed)
    start, before = assess()
    if not all(np.isfinite(list(start.values()))):
        fail(f"{folder}: the policy before GRPO scores {start}: look at cold_start/ and at the judge of 02")
    show = partial(write_sheet, cfg, source=source, groups=fixed, before=before)
    show(folder / "samples" / "step_0000.png", now=before)
    first, state = sr_training.resume(folder, parts, optimizer)
    state = state or {"best": start, "best_step": 0, "bad": 0, "fooled": 0, "stopped_at": None, "stop_reason": None,
                      "ratio_error": 0.0, "seconds": dict.fromkeys(PARTS, 0.0)}
    run.trim_metrics(folder, first)
    last = state["stopped_at"] or cfg.steps
    bar = tqdm(range(first, last), "GRPO", initial=first, total=last, disable=not dist.is_main())
    for step in bar:
        times = [dist.clock(device)]
        # 1. sample
        own = mine(pick(train, cfg.seed, "sr", step, cfg.inputs_per_step))
        lr, ids = image_batch(source, own, "lr"), [group["id"] for group in own]
        policy.eval()
        with using(policy, parts["old"]) if cfg.algorithm == "nft" else nullcontext():
            rollouts = roll_out(policy, cfg, lr.to(device), ids=ids, step=step)
        times.append(dist.clock(device))
        # 2. score
        judged, fidelity = score(judge, cfg, lr, torch.cat([rollout.images for rollout in rollouts]))
        floor = sr_reward.fidelity_floor(reference, cfg, lr.to(device), ids)
        times.append(dist.clock(device))
        # 3. advantages
        advantages, useful, rejected = sr_reward.advantages_of(cfg, judged, fidelity, floor)
        # 4. update
        policy.train()
        if step == first and cfg.algorithm != "nft":
            check_ratio(policy, cfg, rollouts)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps))
        keys = [(cfg.seed, "update", step, name, k) for name in ids for k in range(cfg.samples_per_input)]
        row = update(policy, reference, cfg, rollouts=rollouts, advantages=advantages.flatten(),
                     optimizer=optimizer, keys=keys, old=parts.get("old"))
        sr_training.average(parts["averaged"], weights, cfg.ema)
        if cfg.algorithm == "nft":
            sr_training.average(parts["old"], weights, min(0.001 * step, cfg.nft_old_decay))
        times.append(dist.clock(device))
        # 5. log
        seconds = dict(zip(PARTS, np.diff(times).tolist()))
        decode = sum(rollout.decode_seconds for rollout in rollouts)
        seconds |= {"sample": seconds["sample"] - decode, "decode": decode}
        row |= {f"seconds_{part}": value for part, value in seconds.items()} | sr_reward.summary(
            judged, fidelity, useful=useful, rejected=rejected)
        row |= {"lr": optimizer.param_groups[0]["lr"], "peak_memory_gb": run.peak_memory_gb()}
        unusable = row["bad_rewards"] == cfg.inputs_per_step * cfg.samples_per_input or row["skipped_updates"]
        state["bad"] = state["bad"] + 1 if unusable else 0
        state["seconds"] = {part: value + seconds[part] for part, value in state["seconds"].items()}
        state["ratio_error"] = max(state["ratio_error"], row.get("ratio_error", 0.0))
        # 6. evaluate and save
        done = step + 1
        if done % cfg.eval_every == 0 or done == cfg.steps:
            with using(policy, parts["averaged"]):
                values, now = assess()
            row |= values
            show(folder / "samples" / f"step_{done:04d}.png", now=now)
            if sr_reward.watch(cfg, state, start, values, done):
                sr_training.average(parts["best"], parts["averaged"], 0.0)
            bar.set_postfix(reward=f"{values['val_reward']:.3f}", lr_psnr=f"{values['val_lr_psnr']:.2f}")
        report.log(folder, step, row)
        if state["bad"] == 3:
            bar.close()                                                 # or the message hangs on its line
            good = [str(path) for path in list_checkpoints(folder)][-1:] or ["none yet"]
            fail(f"{folder}: three steps in a row without a finite reward, loss or gradient (see bad_rewards and "
                     f"skipped_updates in metrics.jsonl); last good checkpoint: {good[0]}; lower lr in a new run=")
        if done % cfg.save_every == 0:
            sr_training.save(folder, done, parts, optimizer=optimizer, state=state)
        if state["stopped_at"]:
            break

    if state["stopped_at"]:
        dist.print0(f"stopped after step {state['stopped_at']}: {state['stop_reason']}; "
                    f"the weights of step {state['best_step']} are kept")
    sr_training.average(weights, parts["best"], 0.0)
    if dist.is_main():
        sr_policy.save_policy(policy, folder / "policy")
    spent, end = sum(state["seconds"].values()), state["best"]
    samples = (state["stopped_at"] or cfg.steps) * cfg.inputs_per_step * cfg.samples_per_input
    run.write_manifest(folder, script=__file__, started=started, inputs=[source, judge_folder], results={
        "reward_start": round(start["val_reward"], 4), "reward_end": round(end["val_reward"], 4),
        "lr_psnr_start": round(start["val_lr_psnr"], 3), "lr_psnr_end": round(end["val_lr_psnr"], 3),
        "heldout_start": round(start["val_heldout"], 4), "heldout_end": round(end["val_heldout"], 4),
        "best_step": state["best_step"], "stopped_at": state["stopped_at"], "stop_reason": state["stop_reason"],
        "ratio_error_max": None if cfg.algorithm == "nft" else state["ratio_error"],
        "samples_per_second": round(samples / max(spent, 1e-9), 2),
        "seconds_share": {part: round(value / max(spent, 1e-9), 3) for part, value in state["seconds"].items()}})
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
