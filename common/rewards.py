"""
Ranking rewards for a model that scores the candidates of one LR image. Needs torch only.

Shapes: C candidates of one LR image, K replies to each, any leading axes. scores [.., C, K]: NaN, not parsed. ranks
[.., C]: 1 best, ties allowed, NaN no label; targets [.., C]: wanted scores, NaN likewise. A reward is the mean over the
other candidates z of the same LR image; NaN where the reply has no score or the axis no label.
"""
import torch
from torch import Tensor


def thurstone(scores: Tensor, ranks: Tensor, std_floor: float) -> Tensor:
    """
    Ranking reward of every reply, in 0..1, NaN where the reply has no score or the axis no label: like scores.

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


def margin(scores: Tensor, targets: Tensor, width: float) -> Tensor:
    """
    Reward in 0..1 for the right distance to the others: mean over z of exp(-e^2 / (2 width^2)), like scores.

    e = (q - mean_z) - (target_i - target_z), in digits: a shift of all scores costs nothing. Source: the margin reward
    of MR-IQA (github.com/RobinY99/MR-IQA); the cohort and the targets are ours.
    """
    gap = targets[..., :, None] - targets[..., None, :]                                        # [.., C, C]
    error = scores[..., None] - scores.nanmean(-1)[..., None, None, :] - gap[..., :, None, :]  # [.., C, K, C]
    return mean_over_others((-(error / width).square() / 2).exp())


def pairwise(scores: Tensor, ranks: Tensor) -> Tensor:
    """
    Reward in 0..1 by counting: each reply against every reply to each other candidate, like scores.

    A pair of replies earns 1 - |w - g|, w = 1, 1/2, 0 where q is above, level with, below the other score and g
    likewise by rank: 1 for the right order (or a tie called a tie), 1/2 for a tie in one of the two, 0 for the wrong.
    """
    rivals = scores[..., None, None, :, :]                                                     # [.., 1, 1, C, K]
    gap = scores[..., None, None] - rivals                                                     # [.., C, K, C, K]
    won = torch.where(gap.isnan(), torch.nan, (gap.sign() + 1) / 2)
    return mean_over_others((1 - (won - above(ranks)[..., :, None, :, None]).abs()).nanmean(-1))


def above(ranks: Tensor) -> Tensor:
    """[.., C, C] 1, 1/2, 0 where the candidate of the row ranks above, level with, below that of the column, or NaN."""
    ahead = ranks[..., None, :] - ranks[..., :, None]
    return torch.where(ahead.isnan(), torch.nan, (ahead.sign() + 1) / 2)                       # sign(NaN) may be 0


def mean_over_others(values: Tensor) -> Tensor:
    """[.., C, K, C] what reply k to i earns against z -> [.., C, K] mean over z other than i, NaN left out."""
    itself = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)[:, None]
    return torch.where(itself, torch.nan, values).nanmean(-1)


def overlong(lengths: Tensor, limit: int, soft: int) -> Tensor:
    """
    Share 0..1 of the soft over-length penalty: 0 up to limit - soft tokens, then linear to 1 at the limit.

    Source: DAPO, arXiv 2503.14476; a reply that reaches the limit has no end token.
    """
    return ((lengths - (limit - soft)) / soft).clamp(0, 1)


def fidelity_loss(scores: Tensor, ranks: Tensor) -> tuple[Tensor, int]:
    """
    Summed loss over the labeled pairs of candidates and their number: scores and ranks [.., C], gradient of scores.

    1 - sqrt(p g) - sqrt((1 - p)(1 - g)) with p = Phi((s_i - s_z) / sqrt(2)): thurstone with one score for each
    candidate, whose std is taken as 1. Source: DeQA-Score, arXiv 2501.11561; each pair counts once.
    """
    i, z = torch.triu_indices(scores.shape[-1], scores.shape[-1], 1, device=scores.device)
    g = above(ranks)[..., i, z]                                                                # [.., pairs]
    known = ~g.isnan()
    p, g = torch.special.ndtr((scores[..., i] - scores[..., z]) / 2 ** 0.5)[known], g[known]
    loss = 1 - (p * g + 1e-8).sqrt() - ((1 - p) * (1 - g) + 1e-8).sqrt()                       # no infinite slope at 0
    return loss.sum(), int(known.sum())
