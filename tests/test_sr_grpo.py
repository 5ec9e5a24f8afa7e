"""
The update of stage 04: GRPO, GRPO-Guard and DiffusionNFT against plain loops, and on a tiny policy.

Run     python -m pytest tests/test_sr_grpo.py          # 30 s
"""
import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # torchrun starts this file, see the end
from common import dist, grpo, grpo_diffusion, run, sr_grpo, sr_policy
from common.sr_training import trainable
from test_sr_policy import add_lora, brightness, images, noise, settings, shrink, tiny_policy


@pytest.fixture
def lr() -> torch.Tensor:
    return shrink(images(4, seed=1))                                    # [4, 3, 8, 8]


def one_step(policy, reference, cfg, lr, *, step=0, optimizer, advantages=None, old=None):
    """A step of stage 04 on brightness: (row, rollouts)."""
    from conftest import load_stage
    ids = [str(i) for i in range(len(lr))]
    rollouts = load_stage("04").roll_out(policy, cfg, lr, ids=ids, step=step)
    if advantages is None:
        rewards = brightness(torch.cat([rollout.images for rollout in rollouts])).view(len(lr), -1)
        advantages = grpo.group_advantages(rewards).flatten()
    keys = [(0, "update", step, name, k) for name in ids for k in range(cfg.samples_per_input)]
    row = sr_grpo.update(policy, reference, cfg, rollouts=rollouts, advantages=advantages, optimizer=optimizer,
                         keys=keys, old=old)
    return row, rollouts


# the two objectives ----------------------------------------------------------------------------------------

def test_the_ratio_of_guard_agrees_with_plain_loops():
    torch.manual_seed(0)
    old, std = torch.randn(3, 2, 2, 2), torch.tensor([0.3, 0.8, 1.1]).view(3, 1, 1, 1)
    x, mean = old + std * torch.randn_like(old), old + 0.1 * torch.randn_like(old)
    found = grpo_diffusion.guard_log_ratio(x, mean, old, std)
    for b in range(3):
        s, logp, old_logp, shift = float(std[b]), [], [], []
        for value, m, o in zip(*(t[b].double().flatten().tolist() for t in (x, mean, old))):
            logp.append(-(value - m) ** 2 / (2 * s ** 2) - math.log(s) - 0.5 * math.log(2 * math.pi))
            old_logp.append(-(value - o) ** 2 / (2 * s ** 2) - math.log(s) - 0.5 * math.log(2 * math.pi))
            shift.append((m - o) ** 2 / (2 * s ** 2))
        expected = (sum(logp) - sum(old_logp) + sum(shift)) / 8 * s
        assert float(found[b]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert torch.equal(grpo_diffusion.guard_log_ratio(x, old, old, std), torch.zeros(3))      # on-policy: exactly 1


def log_density(x: torch.Tensor, mean: torch.Tensor, std: float) -> float:
    """Mean over the elements of a step, in float64."""
    pairs = zip(x.double().flatten().tolist(), mean.double().flatten().tolist())
    found = [-(a - b) ** 2 / (2 * std ** 2) - math.log(std) - 0.5 * math.log(2 * math.pi) for a, b in pairs]
    return sum(found) / len(found)


@torch.no_grad()
def step_by_step(policy, rollout, b: int, w: int) -> tuple[torch.Tensor, float]:
    """Mean and std of random step w of sample b, alone."""
    mean, std = sr_policy.step(policy, rollout.latents[b:b + 1, w], torch.tensor([rollout.start + w]),
                               rollout.seen[b:b + 1], eta=rollout.eta, sampler=rollout.sampler)
    return mean[0], float(std)


@pytest.mark.parametrize("algorithm", ["grpo", "guard"])
def test_learn_agrees_with_plain_loops_at_uneven_steps(algorithm, lr):
    """Second pass on the same samples, so that ratios are not 1; steps of very different length and noise."""
    old, now, reference = (tiny_policy(times=[990, 800, 400, 300, 50]) for _ in range(3))
    for policy, moved in ((now, 0.02), (reference, -0.03)):
        with torch.no_grad():
            policy.unet.conv_out.bias.add_(moved)
    cfg = settings(algorithm=algorithm, window_width=3, window_start=1, kl_weight=0.3, clip_low=1e-4, clip_high=1e-4)
    rollout = sr_policy.sample(old, lr, noise(4, 3), start=1)
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.25])
    mean, std = sr_policy.replay(old, rollout)
    before = sr_policy.log_prob(rollout, mean, std).detach(), mean.detach()
    _, sums, _ = sr_grpo.learn(now, reference, cfg, rollout=rollout, advantages=advantages, old=before)
    gains, kls, clipped = [], [], 0
    for b in range(4):
        for w in range(3):
            x, (was, s), (mean, _), (base, _) = rollout.latents[b, w + 1], *(
                step_by_step(policy, rollout, b, w) for policy in (old, now, reference))
            log_ratio, weight = log_density(x, mean, s) - log_density(x, was, s), float(advantages[b])
            if algorithm == "guard":                    # centered, times std; advantages over the step's length
                log_ratio = (log_ratio + float((mean - was).double().square().mean()) / (2 * s ** 2)) * s
                begin, end = (float(n / (a + n)) for a, n, *_ in old.levels[rollout.start + w:rollout.start + w + 2])
                weight /= begin - end
            ratio = math.exp(log_ratio)
            bounded = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
            clipped += weight * bounded < weight * ratio
            gains.append(min(weight * ratio, weight * bounded))
            kls.append(float((mean - base).double().square().mean()) / (2 * s ** 2))
    actions = cfg.inputs_per_step * cfg.samples_per_input * 3
    assert 0 < clipped < 12
    assert float(sums["loss"]) == pytest.approx(-sum(gains) / actions, rel=1e-4)
    assert float(sums["ref_kl"]) == pytest.approx(sum(kls) / actions, rel=1e-3)


def test_learn_nft_agrees_with_plain_loops(lr):
    """With a KL, advantages beyond the clip, and one sample without an advantage, which only meets the reference."""
    now, was, reference = tiny_policy(), tiny_policy(), tiny_policy()
    for policy, moved in ((was, -0.04), (reference, 0.03)):
        with torch.no_grad():
            policy.unet.conv_out.bias.add_(moved)
    cfg = settings(algorithm="nft", kl_weight=0.3, nft_beta=0.7, nft_times=3, advantage_clip=2.0)
    rollout, keys = sr_policy.sample(was, lr, noise(4)), [(0, "update", b) for b in range(4)]
    advantages = torch.tensor([1.0, -5.0, 0.0, 0.5])
    sums = sr_grpo.learn_nft(now, reference, cfg, rollout=rollout, advantages=advantages, keys=keys,
                             old=sr_grpo.copied(trainable(was.unet)))
    loss, kl = 0.0, 0.0
    for b, key in enumerate(keys):
        steps = torch.randint(cfg.denoise_steps, (3,), generator=run.generator(*key, "step")).tolist()
        drawn = torch.randn((3, *rollout.clean.shape[1:]), generator=run.generator(*key))
        for r, step in enumerate(steps):
            clean, (a, n) = rollout.clean[b:b + 1], now.levels[step, :2].tolist()
            x, index, seen = a * clean + n * drawn[r:r + 1], torch.tensor([step]), rollout.seen[b:b + 1]
            with torch.no_grad():
                ours, theirs, base = (one.predict(x, index, seen)[0].double() for one in (now, was, reference))
            goodness = min(max(float(advantages[b]) / 2.0, -1), 1) / 2 + 0.5
            good, bad = 0.7 * ours + 0.3 * theirs - clean, 1.7 * theirs - 0.7 * ours - clean
            errors = [float(gap.square().mean() / gap.abs().mean()) for gap in (good, bad)]
            if advantages[b]:
                loss += 2.0 * (goodness * errors[0] + (1 - goodness) * errors[1]) / 0.7
            kl += float(((ours - base) / n).square().mean())            # of the velocity: clean = a x - n v
    passes = cfg.inputs_per_step * cfg.samples_per_input * 3
    assert float(sums["loss"]) == pytest.approx(loss / passes, rel=1e-4)
    assert float(sums["ref_kl"]) == pytest.approx(kl / passes, rel=1e-3)


def test_guard_is_centered_where_the_plain_ratio_is_not():
    torch.manual_seed(0)
    old = torch.zeros(4000, 4)
    x, mean = 0.5 * torch.randn(4000, 4), torch.full((4000, 4), 0.3)
    plain = grpo.gaussian_logp(x, mean, 0.5) - grpo.gaussian_logp(x, old, 0.5)
    guarded = grpo_diffusion.guard_log_ratio(x, mean, old, 0.5)
    assert plain.mean() < -0.15 and abs(float(guarded.mean())) < 0.01


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_of_nft_agrees_with_plain_loops(beta):
    torch.manual_seed(0)
    now, old, clean = torch.randn(3, 3, 2, 2, 2)
    goodness = torch.tensor([0.0, 0.7, 1.0])
    found = grpo_diffusion.nft_loss(now, old, clean, goodness, beta=beta)
    for b in range(3):
        rows = list(zip(*(t[b].double().flatten().tolist() for t in (now, old, clean))))
        good = [(beta * n + (1 - beta) * o, c) for n, o, c in rows]
        bad = [((1 + beta) * o - beta * n, c) for n, o, c in rows]
        errors = [sum((y - c) ** 2 for y, c in side) / sum(abs(y - c) for y, c in side) for side in (good, bad)]
        rho = float(goodness[b])
        assert float(found[b]) == pytest.approx((rho * errors[0] + (1 - rho) * errors[1]) / beta, rel=1e-4)


def test_nft_moves_toward_good_samples_and_away_from_bad_ones():
    old, clean = torch.zeros(3, 4), torch.ones(3, 4)
    now = old.clone().requires_grad_()
    gradient, = torch.autograd.grad(grpo_diffusion.nft_loss(now, old, clean, torch.tensor([1.0, 0.0, 0.5])).sum(), now)
    assert (gradient[0] < 0).all() and (gradient[1] > 0).all() and gradient[2].abs().max() < 1e-7


# on a policy -----------------------------------------------------------------------------------------------

def test_the_levels_of_a_policy_are_what_its_prediction_undoes(lr):
    """With the true velocity as the UNet's output, predict() gives back what a state was mixed from."""
    policy, clean, drawn = tiny_policy(), noise(4)[:, 0], noise(4, seed=5)[:, 0]
    for step in range(policy.sampler.steps):
        signal, error, *_ = policy.levels[step]
        policy.velocity = lambda x, time, seen: signal * drawn - error * clean
        found = policy.predict(signal * clean + error * drawn, torch.full((4,), step), lr)
        assert torch.allclose(found[0], clean, atol=1e-5) and torch.allclose(found[1], drawn, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["guard", "nft"])                 # grpo: test_sr_policy.py
def test_each_algorithm_raises_a_simple_reward(algorithm, lr):
    cfg, policy = settings(algorithm=algorithm, kl_weight=0.0), add_lora(tiny_policy())
    before = brightness(sr_policy.restore(policy, lr, noise(4)[:, 0])).mean()
    weights = trainable(policy.unet)
    optimizer, old = torch.optim.AdamW(weights.values(), lr=1e-2), sr_grpo.copied(weights)
    for step in range(12):
        row, rollouts = one_step(policy, None, cfg, lr, step=step, optimizer=optimizer, old=old)
        old = sr_grpo.copied(weights)
    assert "ref_kl" not in row and row["skipped_updates"] == 0         # without a KL the reference is not asked
    assert brightness(sr_policy.restore(policy, lr, noise(4)[:, 0])).mean() > before + 0.01
    if algorithm == "nft":
        assert rollouts[0].logp.shape == (8, 0) and "ratio_max" not in row      # no random steps, no ratio
        assert rollouts[0].images[:4].std(0).max() > 1e-3                       # the samples of a group differ
    else:
        assert row["ratio_max"] == 1 and row["ratio_error"] < 1e-5


def test_two_passes_of_guard_clip_both_sides(lr):
    cfg, policy = settings(algorithm="guard", updates_per_rollout=3, clip_low=1e-7, clip_high=1e-7), tiny_policy()
    reference, optimizer = copy.deepcopy(policy), torch.optim.AdamW(policy.unet.parameters(), lr=1e-3)
    row, _ = one_step(policy, reference, cfg, lr, optimizer=optimizer)
    assert row["ratio_max"] > 1 and row["clip_frac_low"] > 0.1 and row["clip_frac_high"] > 0.1


def test_nft_does_not_learn_from_samples_without_an_advantage(lr):
    cfg, policy = settings(algorithm="nft", kl_weight=0.0), add_lora(tiny_policy())
    optimizer = torch.optim.SGD(trainable(policy.unet).values(), lr=1.0)
    row, _ = one_step(policy, policy, cfg, lr, optimizer=optimizer, advantages=torch.zeros(16),
                      old=sr_grpo.copied(trainable(policy.unet)))
    assert row["loss"] == 0 and row["grad_norm"] == 0


def moved(cfg, lr, *, full) -> torch.Tensor:
    """What one step with plain SGD changes: minus the gradient."""
    policy = tiny_policy() if full else add_lora(tiny_policy())
    if cfg.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    reference = copy.deepcopy(policy).requires_grad_(False) if full else policy
    before = sr_grpo.copied(trainable(policy.unet))
    optimizer = torch.optim.SGD(trainable(policy.unet).values(), lr=1.0)
    one_step(policy, reference, cfg, lr, optimizer=optimizer, old=sr_grpo.copied(before))
    return torch.cat([(p - before[name]).detach().flatten() for name, p in trainable(policy.unet).items()])


@pytest.mark.parametrize("algorithm", ["grpo", "guard", "nft"])
@pytest.mark.parametrize("full", [False, True])
def test_micro_batches_and_checkpointing_change_memory_only(algorithm, full, lr):
    whole = moved(settings(algorithm=algorithm, samples_per_gpu=16), lr, full=full)
    assert whole.norm() > 1e-3
    split = moved(settings(algorithm=algorithm, samples_per_gpu=3), lr, full=full)
    again = moved(settings(algorithm=algorithm, samples_per_gpu=16, gradient_checkpointing=True), lr, full=full)
    assert (split - whole).abs().max() < 1e-3 * whole.abs().max()
    assert (again - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_weights_are_swapped_and_come_back_even_after_an_error(lr):
    policy = add_lora(tiny_policy())
    own, other = (sr_grpo.copied(trainable(policy.unet)) for _ in range(2))
    for tensor in other.values():
        tensor.add_(0.1)
    with sr_grpo.using(policy, other):
        inside = sr_policy.restore(policy, lr, noise(4)[:, 0])
        assert all(torch.equal(p, own[name] + 0.1) for name, p in trainable(policy.unet).items())
    with pytest.raises(KeyboardInterrupt):
        with sr_grpo.using(policy, other):
            raise KeyboardInterrupt
    assert all(torch.equal(p, own[name]) for name, p in trainable(policy.unet).items())
    assert all(torch.equal(tensor, own[name] + 0.1) for name, tensor in other.items())
    assert not torch.equal(inside, sr_policy.restore(policy, lr, noise(4)[:, 0]))


# what is not finite ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm", ["grpo", "guard"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(algorithm, lr):
    cfg, policy = settings(algorithm=algorithm, lora_rank=0, updates_per_rollout=2), tiny_policy()
    before = sr_grpo.copied(trainable(policy.unet))
    optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=1.0)
    advantages = torch.ones(16)
    advantages[3] = torch.nan
    row, _ = one_step(policy, copy.deepcopy(policy), cfg, lr, optimizer=optimizer, advantages=advantages)
    assert row["skipped_updates"] == 2 and not np.isfinite(row["grad_norm"])
    assert all(torch.equal(p, before[name]) for name, p in trainable(policy.unet).items())


def check_that_ranks_skip_together() -> None:
    """Rank 1 alone has a NaN, first; then none has. Runs on both ranks."""
    cfg, policy = settings(lora_rank=0), tiny_policy()
    lr, before = shrink(images(4, seed=1))[2 * dist.rank():][:2], sr_grpo.copied(trainable(policy.unet))
    optimizer = torch.optim.SGD(policy.unet.parameters(), lr=0.1)
    advantages = torch.tensor([1.0, -1.0] * 4)
    for bad in (True, False):
        advantages[0] = torch.nan if bad and dist.rank() == 1 else 1.0
        row, _ = one_step(policy, copy.deepcopy(policy), cfg, lr, optimizer=optimizer, advantages=advantages)
        same = all(torch.equal(p, before[name]) for name, p in trainable(policy.unet).items())
        assert row["skipped_updates"] == bad and same == bad
        dist.assert_same_weights(trainable(policy.unet).items())


def test_all_ranks_skip_together():
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           __file__], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__" and "RANK" in os.environ:
    dist.init()
    check_that_ranks_skip_together()
    dist.finish()
