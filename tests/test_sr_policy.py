"""
The super-resolution policy and its GRPO step, on tiny random UNets.

Run     python -m pytest tests/test_sr_policy.py        # 20 s
"""
import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from peft import LoraConfig, get_peft_model

from common import grpo, run, sr_pipelines, sr_policy
from common.images import to_pixels, write_png
from common.sr_policy import Policy
from common.training import trainable
from conftest import load_stage

STEPS, LATENT = 5, (16, 8, 8)


def images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures, [count, 3, size, size] in 0..1."""
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=run.generator(seed, "images"))
    fine = torch.rand(count, 1, size, size, generator=run.generator(seed, "fine"))
    return (0.8 * sr_policy.upsample(coarse, 4).clamp(0, 1) + 0.2 * fine).contiguous()


def shrink(hr: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(hr, 4)


def noise(count: int, width: int = 0, seed: int = 0) -> torch.Tensor:
    keys = [(seed, "noise", k) for k in range(count)]
    return sr_policy.draw_noise(keys, (1 + width, *LATENT), torch.device("cpu"))


def tiny_policy(dropout: float = 0.0) -> Policy:
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=16 + sr_policy.CONDITION_CHANNELS, out_channels=16,
                       dropout=dropout, block_out_channels=[32, 32], layers_per_block=1, norm_num_groups=8,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    hr = images(8)
    return Policy(unet, sr_policy.fit_sampler(hr, shrink(hr), steps=STEPS)).eval()


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture
def lr() -> torch.Tensor:
    return shrink(images(4, seed=1))                                    # [4, 3, 8, 8]


def add_lora(policy: Policy) -> Policy:
    torch.manual_seed(1)
    policy.unet = get_peft_model(policy.unet, LoraConfig(r=4, target_modules=Policy.lora_layers))
    return policy


def reference_scheduler(policy: Policy) -> DDIMScheduler:
    scheduler = DDIMScheduler(num_train_timesteps=1000, trained_betas=policy.sampler.betas, clip_sample=False,
                              prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    return scheduler


# latent space ----------------------------------------------------------------------------------------------

def test_the_latent_is_the_luma_detail_in_units_of_its_spread(policy):
    hr = images(8)                                                      # the ones the space was fitted to
    latent = policy.encode(hr, shrink(hr))
    assert latent.shape == (8, *LATENT) and 0.9 < latent.square().mean().sqrt() < 1.1
    channels = latent.square().mean((0, 2, 3))
    assert channels.min() > 0.9 and channels.max() < 1.1
    hr = 0.5 * hr + 0.25                                                # nothing is clamped
    decoded = policy.decode(policy.encode(hr, shrink(hr)), shrink(hr))
    assert torch.allclose(sr_policy.luma(decoded), sr_policy.luma(hr), atol=1e-5)


def test_no_detail_is_bicubic_and_detail_has_no_color(policy, lr):
    bicubic = sr_policy.upsample(lr, 4).clamp(0, 1)
    assert torch.equal(policy.decode(torch.zeros(4, *LATENT), lr), bicubic)
    inner = lr * 0.2 + 0.4                                              # nothing is clamped
    added = policy.decode(0.1 * noise(4)[:, 0], inner) - sr_policy.upsample(inner, 4)
    assert added.abs().max() > 1e-3 and torch.allclose(added[:, :1], added, atol=1e-6)


# sampling --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])            # at 1, diffusers takes the root of -1e-8
def test_mean_and_std_of_a_step_are_those_of_diffusers(policy, lr, eta):
    scheduler, x = reference_scheduler(policy), noise(4)[:, 0]
    assert policy.times.tolist() == scheduler.timesteps.tolist()
    for index in range(STEPS):
        time = scheduler.timesteps[index]
        with torch.no_grad():
            v = policy.velocity(x, time.repeat(4), lr)
            mean, std = sr_policy.step(policy, x, torch.full((4,), index), lr, eta=eta)
        zero, one = (scheduler.step(v, time, x, eta=eta, variance_noise=z).prev_sample
                     for z in (torch.zeros_like(x), torch.ones_like(x)))
        assert torch.allclose(mean, zero, atol=1e-5)
        assert torch.allclose(std.expand_as(x), one - zero, atol=1e-5)


def test_log_prob_is_the_mean_log_density(policy, lr):
    rollout = sr_policy.sample(policy, lr, noise(4, 2), start=1)
    mean, std = sr_policy.replay(policy, rollout)
    after = rollout.latents[:, 1:].flatten(0, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1).view(4, 2)
    assert torch.allclose(sr_policy.log_prob(rollout, mean, std), expected, atol=1e-5)


def test_restore_is_ddim_of_diffusers(policy, lr):
    scheduler, x = reference_scheduler(policy), noise(4)[:, 0]
    with torch.no_grad():
        for time in scheduler.timesteps:
            x = scheduler.step(policy.velocity(x, time.repeat(4), lr), time, x, eta=0.0).prev_sample
    sr = sr_policy.restore(policy, lr, noise(4)[:, 0])
    assert sr.shape == (4, 3, 32, 32) and torch.allclose(sr, policy.decode(x, lr), atol=1e-5)
    still = sr_policy.sample(policy, lr, noise(4, 2), start=1, eta=1e-6)        # window with hardly any noise
    assert torch.allclose(still.images, sr, atol=1e-4)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_ratio_of_an_untouched_policy_is_one(policy, lr, start):
    rollout = sr_policy.sample(policy, lr, noise(4, 2), start=start)
    policy.train()
    ratio = (sr_policy.log_prob(rollout, *sr_policy.replay(policy, rollout)) - rollout.logp).exp()
    assert ratio.shape == (4, 2) and (ratio - 1).abs().max() < 1e-5


def test_random_steps_in_the_window_then_ode(policy, lr):
    rollout = sr_policy.sample(policy, lr, noise(4, 2), start=1)
    x, index = rollout.latents[:, -1], torch.arange(STEPS)
    assert rollout.latents.shape == (4, 3, *LATENT)
    with torch.no_grad():
        first = sr_policy.step(policy, noise(4)[:, 0], index[:1].repeat(4), lr)[0]
        for i in index[3:]:
            x = sr_policy.step(policy, x, i.repeat(4), lr)[0]
    assert torch.allclose(rollout.latents[:, 0], first, atol=1e-6)
    assert torch.allclose(rollout.images, policy.decode(x, lr), atol=1e-6)
    with pytest.raises(AssertionError, match="no density"):
        sr_policy.sample(policy, lr, noise(4, 2), start=STEPS - 2)


@pytest.mark.parametrize("sampler", sr_policy.SAMPLERS)
def test_each_sampler_moves_and_is_replayed(policy, lr, sampler):
    rollout = sr_policy.sample(policy, lr, noise(4, 3), start=0, eta=0.7, sampler=sampler)
    mean, std = sr_policy.replay(policy, rollout)
    assert (sr_policy.log_prob(rollout, mean, std) - rollout.logp).abs().max() < 1e-5
    expected = torch.distributions.Normal(mean, std).log_prob(rollout.latents[:, 1:].flatten(0, 1))
    assert torch.allclose(rollout.logp, expected.flatten(1).mean(1).view(4, 3), atol=1e-5)
    still = sr_policy.restore(policy, lr, noise(4)[:, 0])
    assert (rollout.images - still).std() > 1e-2 and torch.isfinite(rollout.images).all()
    quiet = sr_policy.sample(policy, lr, noise(4, 3), start=0, eta=1e-6, sampler=sampler)
    assert torch.allclose(quiet.images, still, atol=1e-4)
    if sampler != "ddim":
        other = sr_policy.sample(policy, lr, noise(4, 3), eta=0.7)
        assert not torch.allclose(rollout.latents[:, 1], other.latents[:, 1], atol=1e-2)


def test_batch_and_neighbors_change_nothing(policy, lr):
    together = sr_policy.restore(policy, lr, noise(4)[:, 0])
    alone = torch.cat([sr_policy.restore(policy, lr[i:i + 1], noise(4)[i:i + 1, 0]) for i in range(4)])
    assert (together - alone).abs().max() < 1e-5
    keys = [(0, "rollout", 3, "image", k) for k in range(4)]
    drawn = sr_policy.draw_noise(keys, LATENT, torch.device("cpu"))
    assert torch.equal(drawn[[2]], sr_policy.draw_noise(keys[2:3], LATENT, torch.device("cpu")))
    assert not torch.equal(drawn[0], drawn[1])


def test_other_sizes(policy):
    lr = shrink(images(1, size=64))[..., :12]
    wide = sr_policy.draw_noise([(0,)], (16, *lr.shape[-2:]), torch.device("cpu"))
    assert sr_policy.restore(policy, lr, wide).shape == (1, 3, 64, 48)


# model and disk --------------------------------------------------------------------------------------------

def test_saved_and_loaded_it_restores_the_same(policy, lr, tmp_path):
    expected = sr_policy.restore(policy, lr, noise(4)[:, 0])
    policy.save(tmp_path)
    loaded = sr_pipelines.load_policy(tmp_path, torch.device("cpu"))
    assert torch.equal(sr_policy.restore(loaded, lr, noise(4)[:, 0]), expected)
    assert isinstance(UNet2DModel.from_pretrained(tmp_path), UNet2DModel)
    assert not any(p.requires_grad for p in loaded.parameters()) and loaded.sampler == policy.sampler


def test_a_broken_policy_folder_is_one_line(tmp_path, capsys):
    for wreck in (lambda: None, lambda: (tmp_path / "sampler.json").write_text("{")):
        wreck()
        with pytest.raises(SystemExit):
            sr_pipelines.load_policy(tmp_path, torch.device("cpu"))
        message = capsys.readouterr().err
        assert "sampler.json" in message and message.count("\n") == 1
    (tmp_path / "sampler.json").write_text('{"scale": 4}')
    with pytest.raises(SystemExit):
        sr_pipelines.load_policy(tmp_path, torch.device("cpu"))
    assert "lacks steps, betas, basis" in capsys.readouterr().err


def test_lora_is_merged_on_saving_and_off_it_is_the_base(policy, lr, tmp_path):
    base = sr_policy.restore(policy, lr, noise(4)[:, 0])
    tuned = add_lora(policy)
    with torch.no_grad():
        for p in trainable(tuned.unet).values():
            p.add_(0.05)
    expected = sr_policy.restore(tuned, lr, noise(4)[:, 0])
    assert not torch.allclose(expected, base, atol=1e-3)
    with sr_policy.adapter_off(tuned):
        assert torch.equal(sr_policy.restore(tuned, lr, noise(4)[:, 0]), base)
    tuned.save(tmp_path)
    loaded = sr_pipelines.load_policy(tmp_path, torch.device("cpu"))
    assert torch.allclose(sr_policy.restore(loaded, lr, noise(4)[:, 0]), expected, atol=1e-5)


# cold start ------------------------------------------------------------------------------------------------

def test_a_time_that_float32_rounds_to_the_end_is_the_last_one(policy, tmp_path):
    """Seed 0, batch 64: in this step of configs/full.yaml row 63 draws 0.9999994, and 63 + that is 64 in float32."""
    hr = images(1)
    for name, image in (("hr", hr), ("lr", shrink(hr))):
        write_png(tmp_path / f"{name}.png", to_pixels(image)[0])
    step, cfg = 193606, settings(cold_start_batch=64)
    drawn = torch.rand(64, generator=run.generator(0, "cold start time", step))
    assert (torch.arange(64) + drawn)[-1] == 64
    loss = load_stage("04").cold_start_loss(policy, cfg, tmp_path, groups=[{"lr": "lr.png", "hr": "hr.png"}] * 3, step=step)
    assert 0 < float(loss.detach()) < 100


# GRPO ------------------------------------------------------------------------------------------------------

def settings(**changes):
    """Stage 04's settings for one step on the images of `lr`."""
    cfg = load_stage("04").Config(run="unused", denoise_steps=STEPS, inputs_per_step=4, samples_per_input=4,
                                  samples_per_gpu=8, window_width=2, lora_rank=4)
    return replace(cfg, **changes)


def grpo_step(policy: Policy, reference: Policy, cfg, *, lr: torch.Tensor, step: int, optimizer,
              reward) -> dict:
    stage = load_stage("04")
    rollouts = stage.roll_out(policy, cfg, lr, ids=[str(i) for i in range(len(lr))], step=step)
    rewards = reward(torch.cat([rollout.images for rollout in rollouts])).view(len(lr), -1)
    advantages = grpo.group_advantages(rewards).flatten()
    return stage.learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages, optimizer=optimizer)


def brightness(sr: torch.Tensor) -> torch.Tensor:
    return sr.mean((1, 2, 3))


@pytest.mark.parametrize("rank", [0, 4])
def test_grpo_raises_a_simple_reward_and_touches_trained_weights_only(policy, lr, rank):
    cfg, base = settings(lora_rank=rank, kl_weight=0.0), copy.deepcopy(policy).requires_grad_(False)
    policy = add_lora(policy) if rank else policy
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(policy.unet).values(), lr=1e-2 if rank else 3e-3)
    for step in range(8):
        row = grpo_step(policy, None, cfg, lr=lr, step=step, optimizer=optimizer, reward=brightness)
    assert row["ratio_error"] < 1e-5 and row["ratio_max"] == 1
    assert "ref_kl" not in row                                          # without a KL the reference is not asked
    old, new = (brightness(sr_policy.restore(one, lr, noise(4)[:, 0])).mean() for one in (base, policy.eval()))
    assert new > old + 0.01
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_kl_is_zero_at_the_start_and_pulls_back(policy, lr):
    cfg, reference = settings(lora_rank=0, kl_weight=1.0), copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.SGD(policy.unet.parameters(), lr=0.0)
    step = dict(lr=lr, step=0, optimizer=optimizer, reward=lambda sr: torch.ones(len(sr)))
    row = grpo_step(policy, reference, cfg, **step)
    assert row["ref_kl"] == 0 and row["grad_norm"] == 0                 # equal rewards: nothing to learn
    with torch.no_grad():
        policy.unet.conv_out.bias.add_(0.1)
    row = grpo_step(policy, reference, cfg, **step)
    assert row["ref_kl"] > 0 and row["grad_norm"] > 0


def test_the_step_does_not_depend_on_micro_batches(policy, lr):
    found = []
    for size in (3, 16):
        cfg, twin = settings(lora_rank=0, samples_per_gpu=size), copy.deepcopy(policy)
        optimizer = torch.optim.SGD(twin.unet.parameters(), lr=1.0)
        grpo_step(twin, policy, cfg, lr=lr, step=0, optimizer=optimizer, reward=brightness)
        moved = [(p - q).detach().flatten() for p, q in zip(twin.parameters(), policy.parameters())]
        found.append(torch.cat(moved))
    assert found[0].abs().max() > 0 and torch.allclose(*found, atol=1e-3 * found[0].abs().max().item())


def test_two_passes_move_the_ratio_and_a_tight_range_clips_it(policy, lr):
    cfg = settings(lora_rank=0, updates_per_rollout=3, clip_range=1e-7)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=1e-3)
    row = grpo_step(policy, reference, cfg, lr=lr, step=0, optimizer=optimizer, reward=brightness)
    assert row["ratio_max"] > 1 and row["policy_kl"] > 0
    assert row["clip_frac_low"] + row["clip_frac_high"] > 0.3


def test_the_ratio_check_stops_a_policy_whose_training_path_differs(lr, capsys):
    stage, policy, cfg = load_stage("04"), tiny_policy(dropout=0.2), settings()
    rollouts = stage.roll_out(policy, cfg, lr, ids=["a", "b", "c", "d"], step=0)
    assert stage.check_ratio(policy, cfg, rollouts) < cfg.ratio_tolerance
    policy.train()                                                      # now dropout perturbs every pass
    with pytest.raises(SystemExit):
        stage.check_ratio(policy, cfg, rollouts)
    assert "ratio check" in capsys.readouterr().err
