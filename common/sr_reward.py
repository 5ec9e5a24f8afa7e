"""
From SR samples to advantages, and the guards against a judge that is fooled, for stage 04.

Shapes: g LR images of this rank, K samples of each; images in 0..1, LR [g, 3, h, w], SR [g * K, 3, H, W].
Sources: z-scores per reward before their sum, or one of the sum, MixGRPO arXiv 2507.21802; std of the batch Flow-GRPO
arXiv 2505.05470. The constraint and the stop are our own.
"""
import numpy as np
import torch
from torch import Tensor

from common import dist, grpo, metrics, mllm, sr_policy
from common.images import cut, grid, to_pixels

BOUNDED = {"val_lr_psnr": "LR-PSNR", "val_heldout": "the held-out judge"}


# scores --------------------------------------------------------------------------------------------------

def by_input(lr: Tensor, sr: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as uint8: LR [g, h, w, 3] and its samples [g, K, H, W, 3]."""
    return to_pixels(lr), to_pixels(sr).reshape(len(lr), -1, *sr.shape[-2:], 3)


def lr_psnrs(lr: Tensor, sr: Tensor) -> Tensor:
    """LR-PSNR [g, K], dB, of each sample."""
    scale = sr.shape[-1] // lr.shape[-1]
    return torch.tensor([[metrics.lr_psnr(image, low, scale) for image in group]
                         for low, group in zip(*by_input(lr, sr))])


def expected_scores(judge: mllm.Judge, lrs: np.ndarray, samples: np.ndarray, *, crop: int, limit: int,
                    at_once: int = 128) -> Tensor:
    """
    The judge's scores [g, K, 3], 1..9, of uint8 samples [g, K, H, W, 3] of LR images [g, h, w, 3].

    crop: px of SR, at most `limit` crops, at the same places in LR and all samples; means over them. 0: whole images.
    at_once: samples in a forward pass, about: memory only.
    """
    scale, (height, width) = samples.shape[-2] // lrs.shape[-2], lrs.shape[1:3]
    side = max(1, crop // scale) if crop else max(height, width)
    corners = grid(height, width, side, limit)
    scores = mllm.expected_scores(
        judge, [cut(low, at, side, 1) for low in lrs for at in corners],
        [[cut(image, at, side, scale) for image in group] for group in samples for at in corners],
        groups_per_forward=min(16, max(1, at_once // samples.shape[1])))
    return scores.unflatten(0, (len(lrs), len(corners))).mean(1)


# advantages ----------------------------------------------------------------------------------------------

def spread(rewards: Tensor) -> Tensor:
    """[g] population std of each row's numbers in rewards [g, K]; NaN are left out, and a row of NaN is NaN."""
    valid = ~rewards.isnan()
    filled = torch.where(valid, rewards, rewards.nanmean(1, keepdim=True))
    return filled.std(1, correction=0) * (rewards.shape[1] / valid.sum(1)).sqrt()


def scaled(cfg, rewards: Tensor, floor: float = 1e-4) -> Tensor:
    """
    [g, K] centered rewards over what advantage_std says, each group's std, that of all rewards of the step, or 1; or
    over floor if that is larger.
    """
    if cfg.advantage_std == "group":
        return grpo.group_advantages(rewards, std_floor=floor)
    if cfg.advantage_std == "none":
        return grpo.group_advantages(rewards, std=1.0, std_floor=floor)
    everyone = dist.gather_rows(rewards)                                # as Flow-GRPO: not centered, so that what
    everyone = everyone[~everyone.isnan()]                              # groups differ by counts, too
    std = float(everyone.std(correction=0)) if len(everyone) else 1.0
    return grpo.group_advantages(rewards, std=std, std_floor=floor)


def advantages_of(cfg, judged: Tensor, fidelity: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Advantages [g, K]; whether the judge tells a group's samples apart [g], others get 0; what was rejected [g, K].

    judged, fidelity: [g, K] score and LR-PSNR; a sample for which one is not finite gets 0. floor: [g] dB, samples
    below it are rejected: they get no positive advantage, however high their score.
    """
    valid = judged.isfinite() & fidelity.isfinite()
    judged, fidelity = (torch.where(valid, rewards, torch.nan) for rewards in (judged, fidelity))
    useful = spread(judged) > cfg.std_floor
    if cfg.aggregate == "advantages":
        total = scaled(cfg, judged) + cfg.guard_weight * scaled(cfg, fidelity, max(cfg.fidelity_std_floor, 1e-4))
    else:
        total = scaled(cfg, judged + cfg.guard_weight * fidelity)
    total = total.clamp(-cfg.advantage_clip, cfg.advantage_clip) * useful[:, None]
    rejected = torch.zeros_like(valid) if floor is None else fidelity < floor[:, None]
    return torch.where(rejected, total.clamp(max=0), total), useful, rejected


def summary(judged: Tensor, fidelity: Tensor, *, useful: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What is logged of the arguments and results of advantages_of, over all ranks; means are of finite numbers."""
    judged, fidelity = dist.gather_rows(judged), dist.gather_rows(fidelity)                     # [G, K]
    zero_std, dropped = dist.all_sum(torch.stack([(~useful).sum(), rejected.sum()]))
    numbers = [judged, spread(torch.where(judged.isfinite(), judged, torch.nan)), fidelity]
    means = dict(zip(("reward_mean", "reward_std", "lr_psnr"), (each[each.isfinite()].mean() for each in numbers)))
    bad = int((~(judged.isfinite() & fidelity.isfinite())).sum())
    return means | {"zero_std_groups": zero_std, "rejected_samples": dropped, "bad_rewards": bad}


# guards --------------------------------------------------------------------------------------------------

def fidelity_floor(reference: sr_policy.Policy, cfg, lr: Tensor, ids: list[str]) -> Tensor | None:
    """[g] dB: LR-PSNR of the policy before GRPO on LR, one fixed sample each, less max_sample_drop; None without."""
    if cfg.max_sample_drop is None:
        return None
    keys = [(cfg.seed, "base", name) for name in ids]
    seen = reference.observe(lr, keys)
    noise = sr_policy.draw_noise(keys, (reference.channels, *seen.shape[-2:]), lr.device)
    with sr_policy.adapter_off(reference):
        sr = torch.cat([sr_policy.restore(reference, seen[rows], noise[rows])
                        for rows in torch.arange(len(lr)).split(cfg.samples_per_gpu)])
    return lr_psnrs(lr, sr)[:, 0] - cfg.max_sample_drop


def below_bounds(cfg, start: dict[str, float], values: dict[str, float]) -> list[str]:
    """What lies below its value at the start by more than is allowed, or is not finite, in words; []: may be kept."""
    drops = {"val_lr_psnr": cfg.max_lr_psnr_drop, "val_heldout": cfg.max_heldout_drop}
    return [f"{BOUNDED[name]} {start[name]:.4g} -> {values[name]:.4g}" for name, drop in drops.items()
            if not values[name] >= start[name] - drop]


def watch(cfg, state: dict, start: dict[str, float], values: dict[str, float], done: int) -> bool:
    """
    Whether the weights of an evaluation after `done` steps are the best allowed ones; keeps account in state.

    `fooled` counts evaluations in a row with a reward above the start and something below its bound: the judge is
    being fooled. The patience-th sets `stopped_at` and `stop_reason`; patience 0: never.
    """
    broken = below_bounds(cfg, start, values)
    state["fooled"] = state["fooled"] + 1 if broken and values["val_reward"] > start["val_reward"] else 0
    if cfg.patience and state["fooled"] >= cfg.patience:
        state |= {"stopped_at": done, "stop_reason": f"reward {start['val_reward']:.4g} -> {values['val_reward']:.4g}, "
                  f"but {' and '.join(broken)}, at {cfg.patience} evaluations in a row"}
    better = not broken and values["val_reward"] > state["best"]["val_reward"]
    if better:
        state |= {"best": values, "best_step": done}
    return better
