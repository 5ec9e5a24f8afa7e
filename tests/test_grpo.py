"""
The loss that people copy: against plain loops, and everything its docstrings promise.

Run     python -m pytest tests/test_grpo.py         # 5 s
"""

import math
import statistics

import pytest
import torch

from common import grpo

NAN = math.nan
CLIP = {"clip_low": 0.1, "clip_high": 0.3}      # unequal, so that a swap shows


def batch(seed: int, size: int = 5, actions: int = 7) -> dict[str, torch.Tensor]:
    """Return logp, old_logp, ref_logp, mask [B, T] and advantages [B]; the ratios lie around the clip."""
    generator = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(size, actions, generator=generator)
    old_logp = logp + 0.3 * torch.randn(size, actions, generator=generator)
    ref_logp = logp + 0.5 * torch.randn(size, actions, generator=generator)
    mask = torch.arange(actions) < torch.randint(1, actions + 1, (size, 1), generator=generator)
    return {"logp": logp.requires_grad_(), "old_logp": old_logp, "ref_logp": ref_logp, "mask": mask,
            "advantages": torch.randn(size, generator=generator)}


def loops(logp, old_logp, advantages, mask, ref_logp, kl_weight) -> dict[str, float]:
    """Return loss and stats of CLIP, one action after the other, in Python floats."""
    rows = []
    for b in range(len(logp)):
        for t in range(len(logp[b])):
            if mask[b][t]:
                gap, log_ratio = ref_logp[b][t] - logp[b][t], logp[b][t] - old_logp[b][t]
                rows.append((math.exp(log_ratio), log_ratio, advantages[b], math.exp(gap) - gap - 1))
    losses = [-min(r * a, min(max(r, 0.9), 1.3) * a) + kl_weight * kl for r, _, a, kl in rows]
    return {
        "loss": statistics.fmean(losses),
        "policy_kl": statistics.fmean(r - 1 - log_ratio for r, log_ratio, _, _ in rows),
        "ref_kl": statistics.fmean(kl for _, _, _, kl in rows),
        "clip_frac_low": statistics.fmean(r < 0.9 and a < 0 for r, _, a, _ in rows),
        "clip_frac_high": statistics.fmean(r > 1.3 and a > 0 for r, _, a, _ in rows),
        "ratio_max": max(r for r, _, _, _ in rows),
    }


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_stats_agree_with_plain_loops(seed):
    data = batch(seed)
    loss, stats = grpo.grpo_loss(**data, kl_weight=0.7, **CLIP)
    expected = loops(**{key: value.tolist() for key, value in data.items()}, kl_weight=0.7)
    assert expected["clip_frac_low"] > 0 or expected["clip_frac_high"] > 0      # the case is not trivial
    assert {"loss": loss.item(), **{key: value.item() for key, value in stats.items()}} == pytest.approx(
        expected, rel=1e-4, abs=1e-6)
    assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())


def test_advantages_may_be_given_per_action():
    data = batch(1)
    per_sample, _ = grpo.grpo_loss(**data, **CLIP)
    data["advantages"] = data["advantages"][:, None].repeat(1, data["logp"].shape[1])
    assert torch.equal(per_sample, grpo.grpo_loss(**data, **CLIP)[0])


def test_on_policy_gradient_is_reinforce():
    data = batch(2)
    logp, advantages, mask = data["logp"], data["advantages"], data["mask"]
    loss, stats = grpo.grpo_loss(logp, logp.detach(), advantages, mask=mask, **CLIP)
    gradient, = torch.autograd.grad(loss, logp)
    reinforce, = torch.autograd.grad(-(advantages[:, None] * logp)[mask].mean(), logp)
    torch.testing.assert_close(gradient, reinforce)
    assert stats["ratio_max"] == 1 and stats["policy_kl"] == 0


def test_nan_in_the_padding_changes_nothing():
    data = batch(3)
    data["advantages"] = data["advantages"][:, None].repeat(1, data["logp"].shape[1])
    clean, clean_stats = grpo.grpo_loss(**data, kl_weight=0.5, **CLIP)
    clean_gradient, = torch.autograd.grad(clean, data["logp"])
    for name in ("logp", "old_logp", "ref_logp", "advantages"):
        data[name] = data[name].detach().masked_fill(~data["mask"], NAN)
    data["logp"].requires_grad_()
    loss, stats = grpo.grpo_loss(**data, kl_weight=0.5, **CLIP)
    gradient, = torch.autograd.grad(loss, data["logp"])
    assert torch.equal(loss, clean) and torch.equal(gradient, clean_gradient) and stats == clean_stats
    assert (gradient[~data["mask"]] == 0).all()
    data["mask"] = torch.zeros_like(data["mask"])                           # nothing but padding
    loss, stats = grpo.grpo_loss(**data, kl_weight=0.5, **CLIP)
    assert loss == 0 and not torch.autograd.grad(loss, data["logp"])[0].any() and stats["ratio_max"] == 0


@pytest.mark.parametrize("parts", [[1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_denominator_makes_the_gradient_independent_of_the_split(parts):
    data = batch(4)
    whole, _ = grpo.grpo_loss(**data, kl_weight=0.5, **CLIP)
    expected, = torch.autograd.grad(whole, data["logp"])
    total = torch.zeros_like(expected)
    for rows in torch.arange(5).split(parts):
        part = {name: value[rows] for name, value in data.items()}
        loss, _ = grpo.grpo_loss(**part, kl_weight=0.5, denominator=data["mask"].sum(), **CLIP)
        total += torch.autograd.grad(loss, data["logp"])[0]
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("advantage, ratio, blocked", [
    (1.0, 1.31, True), (1.0, 1.29, False), (1.0, 0.5, False),       # good action: only its rise is limited
    (-1.0, 0.89, True), (-1.0, 0.91, False), (-1.0, 1.5, False),    # bad action: only its fall
])
def test_clipped_actions_have_no_gradient(advantage, ratio, blocked):
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = grpo.grpo_loss(logp, torch.zeros(1, 1), torch.tensor([advantage]), **CLIP)
    loss.backward()
    assert logp.grad.item() == pytest.approx(0 if blocked else -advantage * ratio)
    assert stats["clip_frac_low"] + stats["clip_frac_high"] == blocked


def test_kl_estimates_have_the_right_mean_and_direction():
    logits = torch.tensor([[0.0, 1, 2], [1, 1, 0], [2, 0, 1]])
    policy, reference, old = logits.log_softmax(dim=1)
    ref_kl = policy_kl = 0.0
    for action in range(3):
        logp, ref_logp, old_logp = (row[action].reshape(1, 1) for row in (policy, reference, old))
        _, stats = grpo.grpo_loss(logp, old_logp, torch.ones(1), ref_logp=ref_logp, **CLIP)
        ref_kl += policy[action].exp() * stats["ref_kl"]            # E over the policy
        policy_kl += old[action].exp() * stats["policy_kl"]         # E over the policy that sampled
    torch.testing.assert_close(ref_kl, (policy.exp() * (policy - reference)).sum())
    torch.testing.assert_close(policy_kl, (old.exp() * (old - policy)).sum())


def test_float32_inside_and_only_logp_is_trained():
    data = batch(5)
    low = {name: value.detach().bfloat16() if name != "mask" else value for name, value in data.items()}
    high = {name: value.float() if name != "mask" else value for name, value in low.items()}
    inputs = [low[name].requires_grad_() for name in ("logp", "old_logp", "ref_logp", "advantages")]
    loss, _ = grpo.grpo_loss(**low, kl_weight=0.5, **CLIP)
    assert loss.dtype == torch.float32 and torch.equal(loss, grpo.grpo_loss(**high, kl_weight=0.5, **CLIP)[0])
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1:] == (None, None, None)


@pytest.mark.parametrize("wrong", [
    {"logp": torch.zeros(5)}, {"old_logp": torch.zeros(5, 1)}, {"advantages": torch.zeros(7)},
    {"advantages": torch.zeros(5, 1)}, {"mask": torch.ones(5, 7)}, {"ref_logp": None}])
def test_wrong_shapes_stop(wrong):
    with pytest.raises(AssertionError):
        grpo.grpo_loss(**(batch(0) | wrong), kl_weight=0.5, **CLIP)


# advantages ------------------------------------------------------------------------------------------------

def test_advantages_agree_with_plain_loops():
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    rewards[1, 2] = rewards[2, 0] = rewards[2, 1] = NAN
    expected = torch.zeros(6, 4)
    for g in range(6):
        valid = [reward for reward in rewards[g].tolist() if not math.isnan(reward)]
        for k in range(4):
            if not math.isnan(rewards[g, k]):
                expected[g, k] = (rewards[g, k] - statistics.fmean(valid)) / statistics.pstdev(valid)
    torch.testing.assert_close(grpo.group_advantages(rewards), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [
    [0.1] * 3, [1e8 / 3] * 7, [0.7], [NAN, NAN], [NAN, 5.0, NAN], [NAN, 0.3, 0.3]])
def test_a_group_that_teaches_nothing_is_exactly_zero(row):
    assert (grpo.group_advantages(torch.tensor([row])) == 0).all()


def test_std_floor_keeps_small_differences_small():
    advantages = grpo.group_advantages(torch.tensor([[0.50, 0.52], [0.0, 1.0]]), std_floor=0.1)
    torch.testing.assert_close(advantages, torch.tensor([[-0.1, 0.1], [-1.0, 1.0]]))


def test_infinite_reward_stops():
    with pytest.raises(ValueError, match="infinite"):
        grpo.group_advantages(torch.tensor([[1.0, -math.inf]]))


# diffusion steps -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("std", [0.3, torch.tensor(0.3), torch.tensor([0.2, 0.5]).reshape(2, 1, 1, 1)])
def test_gaussian_agrees_with_torch_distributions(std):
    x, mean, ref_mean = torch.randn(3, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    policy, reference = (torch.distributions.Normal(center, std) for center in (mean, ref_mean))
    torch.testing.assert_close(grpo.gaussian_logp(x, mean, std), policy.log_prob(x).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(grpo.gaussian_kl(mean, ref_mean, std),
                               torch.distributions.kl_divergence(policy, reference).mean(dim=(1, 2, 3)))


def test_gaussian_gradient_reaches_the_policy_mean_only():
    x, mean, ref_mean = (torch.full((1, 4), value, requires_grad=True) for value in (1.0, 0.5, 0.0))
    grpo.gaussian_logp(x, mean, 0.5).sum().backward()
    assert mean.grad.tolist() == [[0.5] * 4] and x.grad is None     # (x - mean) / std^2 / D
    mean.grad = None
    grpo.gaussian_kl(mean, ref_mean, 0.5).sum().backward()
    assert mean.grad.tolist() == [[0.5] * 4] and ref_mean.grad is None


@pytest.mark.parametrize("size, std", [(2, 0.0), (2, -1.0), (3, 1.0)])
def test_gaussian_refuses_what_has_no_density(size, std):
    with pytest.raises(AssertionError):
        grpo.gaussian_logp(torch.zeros(size, 3), torch.zeros(2, 3), std)
