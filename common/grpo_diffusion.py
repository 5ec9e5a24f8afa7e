"""
Two other objectives for a diffusion policy: the ratio of GRPO-Guard, and the loss of DiffusionNFT.

Copy this file into your project: it needs torch and nothing else. Shapes as in grpo.py: B samples in this micro-batch,
... the shape of a latent, e.g. C h w. All arithmetic is float32.

Sources: GRPO-Guard arXiv 2510.22319 with Flow-GRPO's code (github.com/yifan123/flow_grpo); DiffusionNFT
arXiv 2509.16117 with its code (github.com/NVlabs/DiffusionNFT).
"""
import torch


def guard_log_ratio(
    x: torch.Tensor,                # [B, ...]  what was sampled from N(old_mean, std^2); no gradient
    mean: torch.Tensor,             # [B, ...]  what the policy now predicts for it
    old_mean: torch.Tensor,         # [B, ...]  what the policy that sampled predicted; no gradient
    std: float | torch.Tensor,      # > 0, one number or broadcastable to x: std of the noise that the step adds
) -> torch.Tensor:                  # [B]  float32
    """
    Return the log-ratio of one denoising step, (logp - old_logp + b) std with b = mean (mean - old_mean)^2 / 2 std^2.

    With logp the mean log-density per element, the plain log-ratio is -b on average, so ratios lie below 1 and the
    upper clip seldom acts; and its spread differs from step to step. Adding b centers it, the factor std makes steps
    alike. Written out, everything but the noise z = (x - old_mean) / std times the move of the mean cancels.

    Use it as `logp` of grpo_loss with zeros as `old_logp`, and divide a step's advantages by the step's length on the
    time axis (GRPO-Guard's second part; with steps of equal length a constant factor).
    """
    assert x.shape == mean.shape == old_mean.shape and x.ndim > 1, \
        f"x {tuple(x.shape)}, mean {tuple(mean.shape)}, old_mean {tuple(old_mean.shape)}: should be one [B, ...]"
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device)
    assert bool((std > 0).all()), "std should be > 0: a step without noise has no ratio"
    old_mean = old_mean.detach().float()
    noise = (x.detach().float() - old_mean) / std                               # [B, ...]
    return (noise * (mean.float() - old_mean)).flatten(1).mean(dim=1)


def nft_loss(
    predicted: torch.Tensor,        # [B, ...]  clean latent as the policy predicts it from a noised sample
    old_predicted: torch.Tensor,    # [B, ...]  the same by the policy that sampled; no gradient
    clean: torch.Tensor,            # [B, ...]  the sample itself: what was noised
    goodness: torch.Tensor,         # [B]  0..1, reward of the sample: 1/2 is as good as its group
    *,
    beta: float = 1.0,              # > 0: smaller is bolder, as the implied policies then lie closer to the old one
) -> torch.Tensor:                  # [B]  float32, one loss per sample; sum them over a denominator of your own
    """
    Return DiffusionNFT's loss, [goodness E(positive) + (1 - goodness) E(negative)] / beta of each sample, with

        positive = beta predicted + (1 - beta) old_predicted        negative = (1 + beta) old_predicted - beta predicted

    and E(y) = mean (y - clean)^2 / max(mean |y - clean|, 1e-5), the divisor without gradient. So the policy moves
    toward samples that are better than their group, and away from worse ones, on the forward process alone: no
    log-probability, and any sampler. The clean prediction is affine in velocity and noise, so that mixing predictions
    of any of the three is the same.
    """
    assert predicted.shape == old_predicted.shape == clean.shape and goodness.shape == clean.shape[:1], \
        f"predicted {tuple(predicted.shape)}, old {tuple(old_predicted.shape)}, clean {tuple(clean.shape)}"
    assert bool(((goodness >= 0) & (goodness <= 1)).all()), "goodness should be in 0..1"
    predicted, old, clean = predicted.float(), old_predicted.detach().float(), clean.detach().float()

    def error(mixed: torch.Tensor) -> torch.Tensor:                             # [B]
        gap = (mixed - clean).flatten(1)                                        # [B, D]
        return gap.square().mean(dim=1) / gap.detach().abs().mean(dim=1).clamp(min=1e-5)

    positive, negative = beta * predicted + (1 - beta) * old, (1 + beta) * old - beta * predicted
    return (goodness * error(positive) + (1 - goodness) * error(negative)) / beta
