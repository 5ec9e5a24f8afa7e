"""
Ranking rewards for a model that scores the candidates of one LR image. Needs torch only.

Shapes: C candidates of one LR image, K replies to each, any leading axes. scores [.., C, K]: NaN, not parsed. ranks
[.., C]: 1 best, ties allowed, NaN no label; targets [.., C]: wanted scores, NaN likewise. A reward is the mean over the
other candidates z of the same LR image; NaN where the reply has no score or the axis no label.
"""
import torch
from torch import Tensor

from common.grpo import above, mean_over_others


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
