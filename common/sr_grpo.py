"""
The update of stage 04: from samples and their advantages to a step of the optimizer.

    grpo    clipped ratio of the random denoising steps, see grpo.py
    guard   the same with GRPO-Guard's ratio, see grpo_diffusion.py
    nft     DiffusionNFT: finished samples, noised again, instead of random steps; see grpo_diffusion.py

Shapes: B samples in a micro-batch, W random denoising steps or R noised copies per sample, C h w a latent. An update
that cannot be computed (NaN, infinity) is counted and left out, on all ranks alike.
"""
import contextlib

import numpy as np
import torch
from torch import Tensor

from common import dist, grpo, grpo_diffusion, run, sr_policy
from common.config import fail
from common.sr_policy import Policy, Rollout
from common.sr_training import trainable

ALGORITHMS = ("grpo", "guard", "nft")
STATS = ("loss", "ref_kl", "policy_kl", "clip_frac_low", "clip_frac_high")


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in weights.items()}


@contextlib.contextmanager
def using(policy: Policy, weights: dict[str, Tensor]):
    """Context in which the policy's trained weights have other values; they are swapped, not copied."""
    own = trainable(policy.unet)
    for name, p in own.items():
        p.data, weights[name].data = weights[name].data, p.data
    try:
        yield
    finally:
        for name, p in own.items():
            p.data, weights[name].data = weights[name].data, p.data


# update --------------------------------------------------------------------------------------------------

def check_ratio(policy: Policy, cfg, rollouts: list[Rollout]) -> float:
    """Largest |log ratio| between sampling and training with the same weights; stops the run if too large."""
    worst = torch.zeros(())
    with torch.no_grad():
        for rollout in rollouts:
            logp = sr_policy.log_prob(rollout, *sr_policy.replay(policy, rollout))
            worst = torch.maximum(worst, (logp - rollout.logp).abs().max().cpu())
    worst = float(dist.gather_rows(worst[None]).max())
    if not worst <= cfg.ratio_tolerance:
        fail(f"ratio check: log-probabilities are {worst:.1e} off in training, more than ratio_tolerance="
                 f"{cfg.ratio_tolerance}: is there dropout, or low precision, in the policy?")
    return worst


def learn(policy: Policy, reference: Policy, cfg, *, rollout: Rollout, advantages: Tensor,
          old: tuple[Tensor, Tensor] | None) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], Tensor]:
    """
    Add the gradient of one micro-batch: its log-probabilities [B, W] and means, its part of STATS, its extremes [2].

    advantages: [B]. old: what the first pass returned, or None: the policy is then the one that sampled. Extremes:
    largest log-ratio, and largest difference of a log-probability from when it was sampled (first pass).
    """
    actions = cfg.inputs_per_step * cfg.samples_per_input * cfg.window_width    # of the step, over all GPUs
    mean, std = sr_policy.replay(policy, rollout)
    logp = sr_policy.log_prob(rollout, mean, std)
    before = (logp.detach(), mean.detach()) if old is None else old
    now, then = logp, before[0]
    if cfg.algorithm == "guard":
        after, share = rollout.latents[:, 1:].flatten(0, 1), policy.levels[rollout.start:, 3]
        now = grpo_diffusion.guard_log_ratio(after, mean, before[1], std).view_as(logp)
        then, advantages = torch.zeros_like(logp), advantages[:, None] / -share.diff()[:logp.shape[1]]
    loss, stats = grpo.grpo_loss(now, then, advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                                 denominator=actions)
    ref_kl = torch.zeros_like(loss)
    if cfg.kl_weight:                                           # or else the reference is not asked
        with torch.no_grad(), sr_policy.adapter_off(reference):
            ref_mean, _ = sr_policy.replay(reference, rollout)
        ref_kl = grpo.gaussian_kl(mean, ref_mean, std).sum() / actions
    (loss + cfg.kl_weight * ref_kl).backward()
    sums = {key: stats[key] * logp.numel() / actions for key in STATS[2:]}
    error = (logp - rollout.logp).abs().max() if old is None else torch.zeros_like(loss)
    extremes = torch.stack([(now - then).max(), error]).detach()
    return before, sums | {"loss": loss.detach(), "ref_kl": ref_kl.detach()}, extremes


def learn_nft(policy: Policy, reference: Policy, cfg, *, rollout: Rollout, advantages: Tensor, keys: list[tuple],
              old: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Add the gradient of one micro-batch of DiffusionNFT; its part of loss and ref_kl.

    The sample is noised to the levels of R random denoising steps. advantages: [B]; samples with 0 (no reward, a tied
    group, rejected) only meet the reference. old: trained weights of the policy that sampled. keys: one per sample.
    """
    device, repeats = rollout.seen.device, cfg.nft_times
    passes = cfg.inputs_per_step * cfg.samples_per_input * repeats              # of the step, over all GPUs
    steps = [torch.randint(cfg.denoise_steps, (repeats,), generator=run.generator(*key, "step")) for key in keys]
    index = torch.cat(steps).to(device)                                                         # [B * R]
    noise = sr_policy.draw_noise(keys, (repeats, *rollout.clean.shape[1:]), device).flatten(0, 1)
    clean, seen, weight = (each.repeat_interleave(repeats, 0) for each in (rollout.clean, rollout.seen, advantages))
    signal, error = policy.levels[index].T[:2, :, None, None, None]             # factors of clean latent and noise
    x = signal * clean + error * noise
    with torch.no_grad(), using(policy, old):
        old_predicted, _ = policy.predict(x, index, seen)
    predicted, _ = policy.predict(x, index, seen)
    goodness = (weight / cfg.advantage_clip).clamp(-1, 1) / 2 + 0.5
    losses = grpo_diffusion.nft_loss(predicted, old_predicted, clean, goodness, beta=cfg.nft_beta)
    loss = cfg.advantage_clip * losses[weight != 0].sum() / passes
    ref_kl = torch.zeros_like(loss)
    if cfg.kl_weight:
        with torch.no_grad(), sr_policy.adapter_off(reference):
            ref_predicted, _ = reference.predict(x, index, seen)
        ref_kl = ((predicted - ref_predicted) / error).square().flatten(1).mean(1).sum() / passes   # of the velocity
    (loss + cfg.kl_weight * ref_kl).backward()
    return {"loss": loss.detach(), "ref_kl": ref_kl.detach()}


def update(policy: Policy, reference: Policy, cfg, *, rollouts: list[Rollout], advantages: Tensor,
           optimizer: torch.optim.Optimizer, keys: list[tuple] = (), old: dict[str, Tensor] = None) -> dict[str, float]:
    """All passes over a step's samples; one without a finite loss and gradient changes nothing, on any rank."""
    weights, before, is_nft = list(trainable(policy.unet).values()), [None] * len(rollouts), cfg.algorithm == "nft"
    names, worst, skipped = STATS[:2] if is_nft else STATS, torch.zeros(2), 0
    for turn in range(cfg.updates_per_rollout):
        totals = torch.zeros(len(names))
        for i, rollout in enumerate(rollouts):
            rows = slice(i * cfg.samples_per_gpu, i * cfg.samples_per_gpu + len(rollout.seen))
            part = {"rollout": rollout, "advantages": advantages[rows].to(rollout.seen.device)}
            if is_nft:
                sums = learn_nft(policy, reference, cfg, keys=[(*key, turn) for key in keys[rows]], old=old, **part)
            else:
                before[i], sums, extremes = learn(policy, reference, cfg, old=before[i], **part)
                worst = torch.maximum(worst, extremes.cpu())
            totals += torch.stack([sums[name] for name in names]).cpu()
        dist.sum_gradients(weights)
        norm, totals = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm), dist.all_sum(totals)
        if torch.isfinite(norm) and torch.isfinite(totals[0]):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    row = dict(zip(names, totals.tolist())) | {"grad_norm": float(norm), "skipped_updates": skipped}
    if not cfg.kl_weight:
        del row["ref_kl"]                                       # not measured
    if is_nft:
        return row
    ratio, error = dist.gather_rows(worst[None]).max(0).values.tolist()
    return row | {"ratio_max": float(np.exp(ratio)), "ratio_error": error}
