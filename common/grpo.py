"""
GRPO for anything that acts: group advantages, the clipped loss, the log-probability of a diffusion step; and a ranking
reward for a model that scores the candidates of one LR image.

Copy this file into your project: it needs torch and nothing else. One vocabulary for every shape:

    G inputs    K samples per input    B samples in this micro-batch    T actions per sample

The policy acts T times per sample. An action is a token of a language model or one stochastic denoising step
of a diffusion model: the loss is the same. All arithmetic is float32, whatever the inputs are.

    advantages = group_advantages(rewards)                      # [G, K], once per step, over all samples
    loss, stats = grpo_loss(logp, old_logp, advantages.flatten()[rows],   # per micro-batch: [B, T] [B, T] [B]
                            clip_low=0.2, clip_high=0.2, denominator=actions_in_the_step)
    loss.backward()

Sources: GRPO arXiv 2402.03300; the clipped ratio (PPO) arXiv 1707.06347, with two limits arXiv 2503.14476;
constant denominator (Dr. GRPO) arXiv 2503.20783; denoising as actions (DDPO) arXiv 2305.13301; the KL
estimate k3 http://joschu.net/blog/kl-approx.html.
"""
import math

import torch
from torch import Tensor


def group_advantages(
    rewards: torch.Tensor,          # [G, K]  NaN means "no reward", e.g. a reply that could not be parsed
    *,
    std_floor: float = 1e-4,        # in units of reward: a spread below it is not blown up to 1
) -> torch.Tensor:                  # [G, K]  float32
    """
    Return (reward - mean) / max(std, std_floor), with mean and population std of each row.

    Samples without a reward are left out of their row's statistics and get 0. A row with equal rewards, or
    fewer than two, is all zeros: it teaches nothing. Raises ValueError for an infinite reward.
    """
    assert rewards.ndim == 2, f"rewards should be [G, K], got {tuple(rewards.shape)}"
    rewards = rewards.detach().float()
    if rewards.numel() == 0:
        return rewards
    if torch.isinf(rewards).any():
        raise ValueError("a reward is infinite: use NaN for a sample without a reward")
    valid = ~torch.isnan(rewards)                                               # [G, K]
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)                         # [G, 1]
    largest = rewards.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)  # [G, 1]
    shifted = torch.where(valid, rewards - largest, 0.0)                        # equal rewards: exactly 0
    mean = shifted.sum(dim=1, keepdim=True) / count                             # [G, 1]
    centered = torch.where(valid, shifted - mean, 0.0)                          # [G, K]
    std = (centered.square().sum(dim=1, keepdim=True) / count).sqrt()           # [G, 1]
    return centered / std.clamp(min=std_floor)


def grpo_loss(
    logp: torch.Tensor,             # [B, T]  log-probability of each action under the policy being trained
    old_logp: torch.Tensor,         # [B, T]  the same under the policy that sampled the actions
    advantages: torch.Tensor,       # [B] one per sample, or [B, T] one per action
    *,
    mask: torch.Tensor | None = None,       # [B, T]  bool, False in padding, whose content may even be NaN
    ref_logp: torch.Tensor | None = None,   # [B, T]  logp under the reference policy; needed for kl_weight
    clip_low: float,                        # the ratio counts down to 1 - clip_low where the advantage is < 0
    clip_high: float,                       # and up to 1 + clip_high where it is > 0
    kl_weight: float = 0.0,                 # weight of KL(policy || reference)
    denominator: float | torch.Tensor | None = None,    # what the sum over actions is divided by
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Return the loss (0-d, has the gradient of logp only) and stats about this micro-batch.

        sum over actions of [ -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight KL ] / denominator

    with r = exp(logp - old_logp) and KL = exp(ref_logp - logp) - (ref_logp - logp) - 1 (k3: never negative).

    denominator: pass the number of actions in the whole step, over all micro-batches and GPUs, and *sum* the
    gradients: the result is the same for any split (DDP averages: multiply the loss by the world size).
    samples * T_max is Dr. GRPO. None: the actions of this micro-batch.
    stats: detached 0-d tensors, maxima or means over unmasked actions: policy_kl = KL(old || policy), ref_kl,
    clip_frac_low and clip_frac_high (actions whose gradient the clip removed), ratio_max.
    """
    shape = tuple(logp.shape)
    assert len(shape) == 2, f"logp should be [B, T], got {shape}"
    for name, other in (("old_logp", old_logp), ("ref_logp", ref_logp), ("mask", mask)):
        assert other is None or other.shape == shape, f"{name} is {tuple(other.shape)}, logp {shape}"
    assert advantages.shape in (shape, shape[:1]), f"advantages {tuple(advantages.shape)}, logp {shape}"
    assert mask is None or mask.dtype == torch.bool, f"mask should be bool, got {mask.dtype}"
    assert kl_weight == 0 or ref_logp is not None, "kl_weight needs ref_logp"

    # Padding goes before any arithmetic: its NaN survives a product with 0, and a mask after exp.
    mask = torch.ones_like(logp).bool() if mask is None else mask           # [B, T]
    count = mask.sum().clamp(min=1)                                         # 0-d
    logp = torch.where(mask, logp.float(), 0.0)                             # [B, T]
    old_logp = torch.where(mask, old_logp.detach().float(), 0.0)            # [B, T]
    advantages = advantages.detach().float().reshape(len(logp), -1)         # [B, T] or [B, 1]
    advantages = torch.where(mask, advantages, 0.0)                         # [B, T]
    log_ratio = logp - old_logp                                             # [B, T]
    ratio = log_ratio.exp()                                                 # [B, T]
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)     # [B, T]
    ref_logp = logp if ref_logp is None else torch.where(mask, ref_logp.float(), 0.0)       # [B, T]
    ref_gap = ref_logp.detach() - logp                                      # [B, T]  zeros: no reference
    ref_kl = ref_gap.exp() - ref_gap - 1                                    # [B, T]
    loss = (kl_weight * ref_kl.sum() - gain.sum()) / (count if denominator is None else denominator)    # 0-d
    with torch.no_grad():
        stats = {
            "policy_kl": (ratio - 1 - log_ratio).sum() / count,             # k3
            "ref_kl": ref_kl.sum() / count,
            "clip_frac_low": ((ratio < 1 - clip_low) & (advantages < 0)).sum() / count,
            "clip_frac_high": ((ratio > 1 + clip_high) & (advantages > 0)).sum() / count,
            "ratio_max": torch.where(mask, ratio, 0.0).max(),
        }
    return loss, stats


def gaussian_logp(
    x: torch.Tensor,                # [B, ...]  what was sampled, e.g. [B, C, h, w]; gets no gradient
    mean: torch.Tensor,             # [B, ...]  what the policy predicted for it
    std: float | torch.Tensor,      # > 0, one number or broadcastable to x, e.g. [B, 1, 1, 1]
) -> torch.Tensor:                  # [B]  float32
    """
    Return the MEAN over elements of log N(x; mean, std^2): the log-probability of one diffusion step.

    The mean, not the sum, as in DDPO: with D elements (1e4 and more) the sum's ratio leaves any clip range at
    the smallest update. So exp(difference) is the D-th root of the true ratio; that is why clip ranges near
    1e-4 are right here, and why they depend on D: 1e-4 at D = 16384 is a true log-ratio of 1.6.
    """
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device)
    assert x.shape == mean.shape and x.ndim > 1, f"x {tuple(x.shape)}, mean {tuple(mean.shape)}, not [B, ...]"
    assert bool((std > 0).all()), "std should be > 0: a step without noise has no log-probability"
    z = (x.detach().float() - mean.float()) / std                               # [B, ...]
    return -(z.square() / 2 + std.log() + math.log(2 * math.pi) / 2).flatten(1).mean(dim=1)


def gaussian_kl(
    mean: torch.Tensor,             # [B, ...]  mean of the policy's step
    ref_mean: torch.Tensor,         # [B, ...]  mean of the reference's step from the same state; no gradient
    std: float | torch.Tensor,      # > 0, of both, as in gaussian_logp
) -> torch.Tensor:                  # [B]  float32
    """
    Return the mean over elements of KL(N(mean, std^2) || N(ref_mean, std^2)): (mean - ref_mean)^2 / 2 std^2.

    Exact, where k3 on log-probabilities is an estimate. For diffusion, leave ref_logp out and add to the loss
    kl_weight * gaussian_kl(...).sum() / denominator.
    """
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device)
    assert ref_mean.shape == mean.shape, f"mean {tuple(mean.shape)}, ref_mean {tuple(ref_mean.shape)}"
    return ((mean.float() - ref_mean.detach().float()) / std).square().div(2).flatten(1).mean(dim=1)


def thurstone(scores: Tensor, ranks: Tensor, std_floor: float) -> Tensor:
    """
    Ranking reward of every reply, in 0..1, NaN where the reply has no score or the axis no label: like scores.

    scores: [.., C, K] of K replies to each of C candidates of one LR image, NaN: not parsed; any leading axes. ranks:
    [.., C], 1 best, ties allowed, NaN: no label.

    A score q of candidate i meets the scores of each other candidate z: by Thurstone's model
    p = Phi((q - mean_z) / sqrt(var_i + var_z + std_floor^2)) is the chance that i is better. The reward is the
    mean over z of the fidelity sqrt(p g) + sqrt((1 - p)(1 - g)), g = 1, 1/2, 0 where i is above, level, below z.
    Source: VisualQuality-R1, arXiv 2505.14460, which has the unbiased variance (over K - 1); the cohort (one LR image),
    the variance over K, and the floor are ours.
    """
    valid = ~scores.isnan()
    mean = scores.nanmean(-1)                                                                  # [.., C] NaN if none
    var = torch.where(valid, scores - mean[..., None], 0.0).square().sum(-1) / valid.sum(-1).clamp(min=1)
    scale = (var[..., :, None] + var[..., None, :] + std_floor ** 2).sqrt()                    # [.., C, C]
    p = torch.special.ndtr((scores[..., None] - mean[..., None, None, :]) / scale[..., :, None, :])    # [.., C, K, C]
    g = above(ranks)[..., :, None, :]                                                          # [.., C, 1, C]
    fidelity = (p * g).sqrt() + ((1 - p) * (1 - g)).sqrt()
    return mean_over_others(fidelity)


def above(ranks: Tensor) -> Tensor:
    """[.., C, C] 1, 1/2, 0 where the candidate of the row ranks above, level with, below that of the column, or NaN."""
    ahead = ranks[..., None, :] - ranks[..., :, None]
    return torch.where(ahead.isnan(), torch.nan, (ahead.sign() + 1) / 2)                       # sign(NaN) may be 0


def mean_over_others(values: Tensor) -> Tensor:
    """[.., C, K, C] what reply k to i earns against z -> [.., C, K] mean over z other than i, NaN left out."""
    itself = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)[:, None]
    return torch.where(itself, torch.nan, values).nanmean(-1)
