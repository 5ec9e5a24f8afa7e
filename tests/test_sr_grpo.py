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
from common import dist, grpo, sr_policy
from common.training import copied, trainable
from test_sr_policy import add_lora, brightness, images, noise, settings, shrink, tiny_policy


@pytest.fixture
def lr() -> torch.Tensor:
    return shrink(images(4, seed=1))                                    # [4, 3, 8, 8]


def one_step(policy, reference, cfg, lr, *, step=0, optimizer, advantages=None):
    """A step of stage 04 on brightness: (row, rollouts)."""
    from conftest import load_stage
    ids = [str(i) for i in range(len(lr))]
    rollouts = load_stage("04").roll_out(policy, cfg, lr, ids=ids, step=step)
    if advantages is None:
        rewards = brightness(torch.cat([rollout.images for rollout in rollouts])).view(len(lr), -1)
        advantages = grpo.group_advantages(rewards).flatten()
    row = load_stage("04").learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages, optimizer=optimizer)
    return row, rollouts


# the two objectives ----------------------------------------------------------------------------------------

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


def test_the_loss_agrees_with_plain_loops(lr):
    """Second pass on the same samples, so that ratios are not 1."""
    from conftest import load_stage
    old, now, reference = (tiny_policy() for _ in range(3))
    for policy, moved in ((now, 0.02), (reference, -0.03)):
        with torch.no_grad():
            policy.unet.conv_out.bias.add_(moved)
    cfg = settings(window_width=3, window_start=1, kl_weight=0.3, clip_range=1e-4)
    rollout = sr_policy.sample(old, lr, noise(4, 3), start=1)
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.25])
    mean, std = sr_policy.replay(old, rollout)
    before = sr_policy.log_prob(rollout, mean, std).detach()
    _, _, sums = load_stage("04").loss_of(now, reference, cfg, rollout=rollout, advantages=advantages, old_logp=before)
    gains, kls, clipped = [], [], 0
    for b in range(4):
        for w in range(3):
            x, (was, s), (mean, _), (base, _) = rollout.latents[b, w + 1], *(
                step_by_step(policy, rollout, b, w) for policy in (old, now, reference))
            log_ratio, weight = log_density(x, mean, s) - log_density(x, was, s), float(advantages[b])
            ratio = math.exp(log_ratio)
            bounded = min(max(ratio, 1 - cfg.clip_range), 1 + cfg.clip_range)
            clipped += weight * bounded < weight * ratio
            gains.append(min(weight * ratio, weight * bounded))
            kls.append(float((mean - base).double().square().mean()) / (2 * s ** 2))
    actions = cfg.inputs_per_step * cfg.samples_per_input * 3
    assert 0 < clipped < 12
    assert float(sums["loss"]) == pytest.approx(-sum(gains) / actions, rel=1e-4)
    assert float(sums["ref_kl"]) == pytest.approx(sum(kls) / actions, rel=1e-3)


# on a policy -----------------------------------------------------------------------------------------------

def test_the_levels_of_a_policy_are_what_its_prediction_undoes(lr):
    """With the true velocity as the UNet's output, predict() gives back what a state was mixed from."""
    policy, clean, drawn = tiny_policy(), noise(4)[:, 0], noise(4, seed=5)[:, 0]
    for step in range(policy.sampler.steps):
        signal, error, *_ = policy.levels[step]
        policy.velocity = lambda x, time, seen: signal * drawn - error * clean
        found = policy.predict(signal * clean + error * drawn, torch.full((4,), step), lr)
        assert torch.allclose(found[0], clean, atol=1e-5) and torch.allclose(found[1], drawn, atol=1e-5)


def moved(cfg, lr, *, full) -> torch.Tensor:
    """What one step with plain SGD changes: minus the gradient."""
    policy = tiny_policy() if full else add_lora(tiny_policy())
    if cfg.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    reference = copy.deepcopy(policy).requires_grad_(False) if full else policy
    before = copied(trainable(policy.unet))
    optimizer = torch.optim.SGD(trainable(policy.unet).values(), lr=1.0)
    one_step(policy, reference, cfg, lr, optimizer=optimizer)
    return torch.cat([(p - before[name]).detach().flatten() for name, p in trainable(policy.unet).items()])


@pytest.mark.parametrize("full", [False, True])
def test_micro_batches_and_checkpointing_change_memory_only(full, lr):
    whole = moved(settings(samples_per_gpu=16), lr, full=full)
    assert whole.norm() > 1e-3
    split = moved(settings(samples_per_gpu=3), lr, full=full)
    again = moved(settings(samples_per_gpu=16, gradient_checkpointing=True), lr, full=full)
    assert (split - whole).abs().max() < 1e-3 * whole.abs().max()
    assert (again - whole).abs().max() <= 1e-6 * whole.abs().max()


# what is not finite ----------------------------------------------------------------------------------------

def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(lr):
    cfg, policy = settings(lora_rank=0, updates_per_rollout=2), tiny_policy()
    before = copied(trainable(policy.unet))
    optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=1.0)
    advantages = torch.ones(16)
    advantages[3] = torch.nan
    row, _ = one_step(policy, copy.deepcopy(policy), cfg, lr, optimizer=optimizer, advantages=advantages)
    assert row["skipped_updates"] == 2 and not np.isfinite(row["grad_norm"])
    assert all(torch.equal(p, before[name]) for name, p in trainable(policy.unet).items())


def check_that_ranks_skip_together() -> None:
    """Rank 1 alone has a NaN, first; then none has. Runs on both ranks."""
    cfg, policy = settings(lora_rank=0), tiny_policy()
    lr, before = shrink(images(4, seed=1))[2 * dist.rank():][:2], copied(trainable(policy.unet))
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
