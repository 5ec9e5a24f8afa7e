"""
The ranking reward against a slow plain loop.

Run     python -m pytest tests/test_rewards.py          # 3 s
"""

import math

import pytest
import torch

from common.grpo import thurstone
from common.rewards import fidelity_loss, margin, overlong, pairwise

NAN = math.nan


def slow(scores: list, ranks: list, floor: float) -> list:
    """The definition, one reply and one rival at a time, with math.erf."""
    rewards = []
    for i, own in enumerate(scores):
        rewards.append([])
        for q in own:
            terms = []
            for z, theirs in enumerate(scores):
                both = [[x for x in replies if not math.isnan(x)] for replies in (own, theirs)]
                if z == i or math.isnan(q) or not both[1] or math.isnan(ranks[i]) or math.isnan(ranks[z]):
                    continue
                means = [sum(x) / len(x) for x in both]
                var = [sum((v - m) ** 2 for v in x) / len(x) for x, m in zip(both, means)]
                p = 0.5 * (1 + math.erf((q - means[1]) / math.sqrt(2 * (sum(var) + floor**2))))
                g = 1.0 if ranks[i] < ranks[z] else 0.0 if ranks[i] > ranks[z] else 0.5
                terms.append(math.sqrt(p * g) + math.sqrt((1 - p) * (1 - g)))
            rewards[-1].append(sum(terms) / len(terms) if terms else NAN)
    return rewards


def draw(seed: int, candidates: int = 5, replies: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits with a fifth of NaN, and ranks with ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, 10, (candidates, replies), generator=generator).double()
    lost = torch.rand(candidates, replies, generator=generator) < 0.2
    ranks = torch.randint(1, 4, (candidates,), generator=generator).double()
    return torch.where(lost, NAN, scores), ranks


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_slow_loop(seed):
    scores, ranks = draw(seed)
    if seed % 3 == 0:
        scores[1] = NAN                                 # nothing that this candidate got can be parsed
    if seed % 4 == 0:
        ranks[2] = NAN                                  # and this one has no label
    got = thurstone(scores, ranks, 0.25)
    want = torch.tensor(slow(scores.tolist(), ranks.tolist(), 0.25), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    known = got[~got.isnan()]
    assert (known >= 0).all() and (known <= 1 + 1e-6).all()


def test_order_of_candidates_and_of_replies_and_leading_axes():
    scores, ranks = draw(7)
    rewards = thurstone(scores, ranks, 0.25)
    candidates, replies = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    permuted = thurstone(scores[candidates][:, replies], ranks[candidates], 0.25)
    torch.testing.assert_close(permuted, rewards[candidates][:, replies], equal_nan=True)
    other_scores, other_ranks = draw(8)
    both = thurstone(torch.stack([scores, other_scores]), torch.stack([ranks, other_ranks]), 0.25)
    torch.testing.assert_close(both[0], rewards, equal_nan=True)
    torch.testing.assert_close(both[1], thurstone(other_scores, other_ranks, 0.25), equal_nan=True)


def test_a_reply_is_paid_for_ordering_its_candidate_rightly():
    others = torch.tensor([[0.0, 0.0], [4.0, 5.0], [6.0, 7.0]])
    by_score = []
    for digit in (1.0, 5.5, 9.0):
        others[0] = digit
        by_score.append([float(thurstone(others, torch.tensor(ranks), 0.5)[0, 0])
                         for ranks in ([1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 2.0, 1.0])])
    best, middle, worst = zip(*by_score)
    assert best[2] > best[1] > best[0] and worst[0] > worst[1] > worst[2]
    assert middle[1] > max(middle[0], middle[2])
    level = thurstone(torch.full((2, 3), 5.0), torch.tensor([1.0, 1.0]), 0.5)
    torch.testing.assert_close(level, torch.ones(2, 3))                     # a tie, called a tie


def test_without_rivals_or_labels_there_is_no_reward():
    assert thurstone(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), 0.25).isnan().all()
    assert thurstone(torch.tensor([[3.0], [4.0]]), torch.tensor([NAN, NAN]), 0.25).isnan().all()
    assert thurstone(torch.full((3, 2), NAN), torch.tensor([1.0, 2.0, 3.0]), 0.25).isnan().all()


def test_the_floor_keeps_identical_replies_from_making_a_step():
    scores, ranks = torch.tensor([[5.0, 5.0], [5.1, 5.1]]), torch.tensor([1.0, 2.0])
    soft, hard = thurstone(scores, ranks, 0.25)[0, 0], thurstone(scores, ranks, 1e-3)[0, 0]
    assert soft > 0.5 and hard < 0.01 and not thurstone(torch.full((2, 2), 5.0), ranks, 1e-6).isnan().any()


# the other rewards -----------------------------------------------------------------------------------------

def slow_margin(scores: list, targets: list, width: float) -> list:
    rewards = []
    for i, own in enumerate(scores):
        rewards.append([])
        for q in own:
            terms = []
            for z, theirs in enumerate(scores):
                rivals = [x for x in theirs if not math.isnan(x)]
                gap = targets[i] - targets[z]
                if z != i and rivals and not math.isnan(q) and not math.isnan(gap):
                    terms.append(math.exp(-((q - sum(rivals) / len(rivals)) - gap) ** 2 / (2 * width**2)))
            rewards[-1].append(sum(terms) / len(terms) if terms else NAN)
    return rewards


def slow_pairwise(scores: list, ranks: list) -> list:
    rewards = []
    for i, own in enumerate(scores):
        rewards.append([])
        for q in own:
            terms = []
            for z, theirs in enumerate(scores):
                rivals = [x for x in theirs if not math.isnan(x)]
                if z == i or not rivals or math.isnan(q) or math.isnan(ranks[i]) or math.isnan(ranks[z]):
                    continue
                g = 1.0 if ranks[i] < ranks[z] else 0.0 if ranks[i] > ranks[z] else 0.5
                won = [1.0 if q > x else 0.0 if q < x else 0.5 for x in rivals]
                terms.append(sum(1 - abs(w - g) for w in won) / len(won))
            rewards[-1].append(sum(terms) / len(terms) if terms else NAN)
    return rewards


@pytest.mark.parametrize("seed", range(12))
def test_margin_and_pairwise_equal_their_slow_loops(seed):
    scores, ranks = draw(seed)
    if seed % 3 == 0:
        scores[1] = NAN
    if seed % 4 == 0:
        ranks[2] = NAN
    targets = 9 - 2.3 * ranks
    for got, want in ((margin(scores, targets, 1.5), slow_margin(scores.tolist(), targets.tolist(), 1.5)),
                      (pairwise(scores, ranks), slow_pairwise(scores.tolist(), ranks.tolist()))):
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    both = pairwise(torch.stack([scores, scores.flip(0)]), torch.stack([ranks, ranks.flip(0)]))
    torch.testing.assert_close(both[1], both[0].flip(0), equal_nan=True)


def test_margin_pays_for_the_gap_and_not_for_the_level():
    targets = torch.tensor([7.0, 4.0])
    right, shifted = (margin(torch.tensor([[a, a], [b, b]]), targets, 1.0) for a, b in ((8.0, 5.0), (4.0, 1.0)))
    torch.testing.assert_close(right, torch.ones(2, 2))
    torch.testing.assert_close(shifted, torch.ones(2, 2))
    off = margin(torch.tensor([[8.0, 8.0], [6.0, 6.0]]), targets, 1.0)
    torch.testing.assert_close(off, torch.full((2, 2), math.exp(-0.5)))


def test_overlong_begins_before_the_limit_and_ends_at_it():
    shares = [0.0 if n <= 24 else (n - 24) / 16 for n in range(41)]
    torch.testing.assert_close(overlong(torch.arange(41), 40, 16), torch.tensor(shares))


@pytest.mark.parametrize("seed", range(4))
def test_fidelity_loss_equals_a_slow_loop_and_has_a_finite_slope_everywhere(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = (1 + 8 * torch.rand(3, 5, generator=generator)).requires_grad_()
    ranks = torch.randint(1, 4, (3, 5), generator=generator).float()
    ranks[1, 2] = NAN
    wanted, pairs = 0.0, 0
    for row, order in zip(scores.tolist(), ranks.tolist()):
        for i in range(5):
            for z in range(i):
                if not math.isnan(order[i] + order[z]):
                    p = 0.5 * (1 + math.erf((row[i] - row[z]) / 2))
                    g = 1.0 if order[i] < order[z] else 0.0 if order[i] > order[z] else 0.5
                    wanted += 1 - math.sqrt(p * g + 1e-8) - math.sqrt((1 - p) * (1 - g) + 1e-8)
                    pairs += 1
    loss, count = fidelity_loss(scores, ranks)
    assert count == pairs and loss.item() == pytest.approx(wanted, abs=1e-4)
    far = torch.tensor([[1.0, 9.0, 9.0]], requires_grad=True)
    for order in ([1.0, 2.0, 2.0], [2.0, 1.0, 1.0]):
        gradient, = torch.autograd.grad(fidelity_loss(far * 100, torch.tensor([order]))[0], far)
        assert gradient.isfinite().all()
    gradient, = torch.autograd.grad(fidelity_loss(torch.stack([far[0, :2]]), torch.tensor([[1.0, 2.0]]))[0], far)
    assert gradient[0, 0] < 0 < gradient[0, 1]                  # the better one should score higher
