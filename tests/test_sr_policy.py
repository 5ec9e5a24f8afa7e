"""
Policies: their steps against the papers' formulas and diffusers, sampling and replaying, the small policy on disk.

Run     python -m pytest tests/test_sr_policy.py        # 20 s
"""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import LoraConfig, get_peft_model

from common import grpo, run, sr_pipelines, sr_policy
from common.sr_policy import Policy
from common.training import adapter_off, trainable

STEPS, LATENT, CPU = 5, (16, 8, 8), torch.device("cpu")
SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]                         # of a flow, from noise to clean
POWERS = [0.0, 0.05, 0.3, 0.6, 0.9, 0.999, 1.0]                 # of a diffusion model, with zero terminal SNR


def images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures, [count, 3, size, size] in 0..1."""
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=run.generator(seed, "images"))
    fine = torch.rand(count, 1, size, size, generator=run.generator(seed, "fine"))
    return (0.8 * sr_policy.upsample(coarse, 4).clamp(0, 1) + 0.2 * fine).contiguous()


def shrink(hr: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(hr, 4)


def noise(count: int, width: int = 0, seed: int = 0) -> torch.Tensor:
    return sr_policy.draw_noise([(seed, "noise", k) for k in range(count)], (1 + width, *LATENT), CPU)


def tiny_policy(dropout: float = 0.0, sharpening: float | None = None) -> Policy:
    """sharpening: the mean choice of its map, which varies by some 0.1; None: it has no map."""
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=32 + sr_policy.CONDITION_CHANNELS, out_channels=16,
                       dropout=dropout, block_out_channels=[32, 32], layers_per_block=1, norm_num_groups=8,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)
    regressor = sr_policy.Regressor(4, width=8, blocks=1)
    with torch.no_grad():
        regressor.last.weight.normal_(std=0.01)
    sampler = sr_policy.Sampler(4, STEPS, sr_policy.zero_terminal_betas(), sigma=0.1, gain=0.8, width=8, blocks=1)
    policy = Policy(unet, regressor.requires_grad_(False), sampler).eval()
    if sharpening is not None:
        policy.map = sr_policy.SharpeningMap()
        with torch.no_grad():
            policy.map.last.weight.normal_()
            policy.map.last.bias.fill_(sharpening)
    return policy


def add_lora(policy: Policy, moved: float = 0.0) -> Policy:
    torch.manual_seed(1)
    policy.unet = get_peft_model(policy.unet, LoraConfig(r=4, target_modules=policy.lora_layers))
    with torch.no_grad():
        for p in trainable(policy.unet).values():
            p.add_(moved)
    return policy


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture
def lr() -> torch.Tensor:
    return shrink(images(4, seed=1))                                    # [4, 3, 8, 8]


@pytest.fixture
def seen(policy, lr) -> torch.Tensor:
    return policy.observe(lr)


# steps, number by number, as the papers write them -----------------------------------------------------------

def draw(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def neighbors(levels: torch.Tensor, index: int) -> dict[str, sr_policy.Level]:
    now, after = (sr_policy.at(levels, torch.tensor([i])) for i in (index, index + 1))
    return {"now": now, "after": after}


def flow_grpo(x: float, v: float, sigma: float, after: float, first: float, a: float) -> tuple[float, float]:
    """Flow-GRPO eq. 9 (dt < 0; at sigma 1 the code of the paper takes the first sigma below)."""
    dt, std = after - sigma, a * math.sqrt(sigma / (1 - (first if sigma == 1 else sigma)))
    mean = x * (1 + std ** 2 / (2 * sigma) * dt) + v * (1 + std ** 2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


def cps(x: float, v: float, sigma: float, after: float, level: float) -> tuple[float, float]:
    """Coefficients-preserving sampling: x0 and x1 are the predicted ends of the straight path through x."""
    x0, x1, std = x - sigma * v, x + (1 - sigma) * v, after * math.sin(level * math.pi / 2)
    return (1 - after) * x0 + math.sqrt(after ** 2 - std ** 2) * x1, std


def ddim(x0: float, e: float, alpha: float, after: float, eta: float) -> tuple[float, float]:
    """DDIM eq. 12 and 16; alpha is the paper's alpha, others' alpha bar."""
    std = eta * math.sqrt((1 - after) / (1 - alpha)) * math.sqrt(1 - alpha / after)
    return math.sqrt(after) * x0 + math.sqrt(max(0, 1 - after - std ** 2)) * e, std


def check(sampler: str, formula, columns: tuple, clean: torch.Tensor, e: torch.Tensor, *, size: float = 1.0,
          **step) -> None:
    """Mean, std and log-probability of a step are those of the formula on every element of the columns, times size."""
    rows = [formula(*values) for values in zip(*(column.double().flatten().tolist() for column in columns))]
    expected, expected_std = (part.view_as(clean) * size for part in torch.tensor(rows).T)
    mean, std = sr_policy.gaussian_step(sampler, clean, e, **step)
    assert torch.allclose(mean, expected, atol=1e-5)
    assert torch.allclose(std.expand_as(mean), expected_std, atol=1e-5) and std.min() > 0
    x = mean + std * draw(9, len(mean))
    normal = torch.distributions.Normal(expected, expected_std).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(grpo.gaussian_logp(x, mean, std), normal, atol=1e-3)


@pytest.mark.parametrize("eta", [0.3, 0.8])
@pytest.mark.parametrize("index", range(4))
def test_flow_steps_are_those_of_the_papers(index, eta):
    x, v, (sigma, below) = draw(0, 3), draw(1, 3), SIGMAS[index:index + 2]
    step = neighbors(sr_policy.flow_levels(torch.tensor(SIGMAS)), index) | {"eta": eta}
    clean, e = sr_policy.clean_and_noise("flow", x, v, step["now"])
    check("sde", lambda x, v: flow_grpo(x, v, sigma, below, SIGMAS[1], eta), (x, v), clean, e, **step)
    check("cps", lambda x, v: cps(x, v, sigma, below, eta), (x, v), clean, e, **step)
    alpha, alpha_below = ((1 - s) ** 2 / ((1 - s) ** 2 + s ** 2) for s in (sigma, below))
    check("ddim", lambda x0, x1: ddim(x0, x1, alpha, alpha_below, eta), (clean, e), clean, e,
          size=math.hypot(1 - below, below), **step)                            # of x where a^2 + b^2 = 1


@pytest.mark.parametrize("eta", [0.3, 0.8])
@pytest.mark.parametrize("index", range(5))
def test_diffusion_steps_are_those_of_the_papers(index, eta):
    x, v, (alpha, below) = draw(0, 3), draw(1, 3), POWERS[index:index + 2]
    step = neighbors(sr_policy.diffusion_levels(torch.tensor(POWERS)), index) | {"eta": eta}
    clean, e = sr_policy.clean_and_noise("v_prediction", x, v, step["now"])
    check("ddim", lambda x0, e: ddim(x0, e, alpha, below, eta), (clean, e), clean, e, **step)
    # as a flow: x / (a + b) lies on the straight path from clean to noise, at sigma = b / (a + b)
    (size, sigma), (size_below, sigma_below), (_, first) = (
        (math.sqrt(p) + math.sqrt(1 - p), math.sqrt(1 - p) / (math.sqrt(p) + math.sqrt(1 - p)))
        for p in (alpha, below, POWERS[1]))
    straight = x / size, e - clean
    check("sde", lambda x, v: flow_grpo(x, v, sigma, sigma_below, first, eta), straight, clean, e, size=size_below,
          **step)
    check("cps", lambda x, v: cps(x, v, sigma, sigma_below, eta), straight, clean, e, size=size_below, **step)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow"])
def test_clean_and_noise_add_up_to_the_state(predicts):
    levels = sr_policy.flow_levels(torch.tensor(SIGMAS)) if predicts == "flow" else \
        sr_policy.diffusion_levels(torch.tensor(POWERS))
    now, clean, e = sr_policy.at(levels, torch.tensor([2])), draw(0, 2), draw(1, 2)
    output = {"epsilon": e, "v_prediction": now.signal * e - now.noise * clean, "flow": e - clean}[predicts]
    pair = sr_policy.clean_and_noise(predicts, now.signal * clean + now.noise * e, output, now)
    assert torch.allclose(pair[0], clean, atol=1e-5) and torch.allclose(pair[1], e, atol=1e-5)


def test_flow_steps_of_diffusers():
    """Its ODE step, and its stochastic one, which is CPS at noise level 1."""
    v, x = draw(1, 2), draw(0, 2)
    for settings, eta in (({}, 0.0), ({"stochastic_sampling": True}, 1.0)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **settings)
        scheduler.set_timesteps(6)
        for i, time in enumerate(scheduler.timesteps):
            step = neighbors(sr_policy.flow_levels(scheduler.sigmas), i)
            wanted = scheduler.step(v, time, x, generator=torch.Generator().manual_seed(3)).prev_sample
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
            mean, std = sr_policy.gaussian_step("cps", *sr_policy.clean_and_noise("flow", x, v, step["now"]), eta=eta,
                                                **step)
            assert torch.allclose(mean + std * drawn, wanted, atol=1e-5)


# the small policy --------------------------------------------------------------------------------------------

def test_the_latent_is_the_luma_detail_that_the_regressor_leaves_out(policy):
    hr = 0.5 * images(8) + 0.25                                         # nothing is clamped
    lr = shrink(hr)
    seen = policy.observe(lr)
    latent = policy.encode(hr, seen)
    expected = sr_policy.gray(hr - policy.regressor(lr))[0, 0, 4:8, 8:12].flatten() / policy.sampler.sigma
    assert torch.allclose(latent[0, :, 1, 2], expected, atol=1e-5)
    whole, half = (sr_policy.with_sampling(policy, steps=2, gain=gain).decode(latent, seen) for gain in (1.0, 0.5))
    assert torch.allclose(sr_policy.gray(whole), sr_policy.gray(hr), atol=1e-5)
    mean = policy.decode(torch.zeros(8, *LATENT), seen)                 # no detail is the regressor, ..
    assert torch.equal(mean, policy.regressor(lr)) and torch.allclose(half - mean, (whole - mean) / 2, atol=1e-6)
    assert torch.allclose((whole - mean)[:, :1], whole - mean, atol=1e-6)       # and detail has no color
    assert torch.equal(sr_policy.Regressor(4, 8, 1)(lr), sr_policy.upsample(lr, 4))     # untrained it is bicubic


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.999])            # at 1, diffusers takes the root of -1e-8
def test_mean_and_std_of_a_step_and_restore_are_those_of_diffusers(policy, seen, eta):
    scheduler = DDIMScheduler(num_train_timesteps=1000, trained_betas=policy.sampler.betas, clip_sample=False,
                              prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    assert policy.times.tolist() == scheduler.timesteps.tolist()
    x = y = noise(4)[:, 0]
    for index, time in enumerate(scheduler.timesteps):
        with torch.no_grad():
            v = policy.velocity(x, time.repeat(4), seen)
            mean, std = sr_policy.step(policy, x, torch.full((4,), index), seen, eta=eta)
            y = scheduler.step(policy.velocity(y, time.repeat(4), seen), time, y, eta=0.0).prev_sample
        zero, one = (scheduler.step(v, time, x, eta=eta, variance_noise=z).prev_sample
                     for z in (torch.zeros_like(x), torch.ones_like(x)))
        assert torch.allclose(mean, zero, atol=1e-5)
        assert torch.allclose(std.expand_as(x), one - zero, atol=1e-5)
    sr = sr_policy.restore(policy, seen, x)
    assert sr.shape == (4, 3, 32, 32) and torch.allclose(sr, policy.decode(y, seen), atol=1e-5)


@pytest.mark.parametrize("sampler", sr_policy.SAMPLERS)
@pytest.mark.parametrize("start", [0, 2])
def test_a_rollout_is_replayed_with_ratio_one(policy, seen, sampler, start):
    rollout = sr_policy.sample(policy, seen, noise(4, 2), start=start, eta=0.7, sampler=sampler)
    policy.train()
    actions = sr_policy.replay(policy, rollout)
    ratio = (sr_policy.log_prob(rollout, actions) - rollout.logp).exp()
    assert ratio.shape == (4, 2) and (ratio - 1).abs().max() < 1e-5
    (drawn, mean, std), = actions
    expected = torch.distributions.Normal(mean, std).log_prob(rollout.latents[:, 1:].flatten(0, 1))
    assert torch.allclose(rollout.logp, expected.flatten(1).mean(1).view(4, 2), atol=1e-5)
    still = sr_policy.restore(policy, seen, noise(4)[:, 0])
    assert (rollout.images - still).std() > 5e-3
    quiet = sr_policy.sample(policy, seen, noise(4, 2), start=start, eta=1e-6, sampler=sampler)
    assert torch.allclose(quiet.images, still, atol=1e-4)               # with hardly any noise: the ODE


def test_the_sharpening_map_is_drawn_first_and_is_an_action():
    """Its density is over the map alone; it is an unsharp mask of the regressor's image; untrained it does nothing."""
    policy, drawn = tiny_policy(sharpening=0.7), torch.randn(4, 1, 2, 2, generator=run.generator(0, "map"))
    seen = policy.observe(shrink(images(4)))
    rollout = sr_policy.sample(policy, seen, noise(4, 2), map_noise=drawn, start=1)
    with torch.no_grad():
        choice, mean = policy.map(seen), policy.mean(seen)
        assert choice.std() > 0.02 and torch.allclose(rollout.map, choice + 0.4 * drawn)
        logp = torch.distributions.Normal(choice, 0.4).log_prob(rollout.map).flatten(1).mean(1)
        ratio = (sr_policy.log_prob(rollout, sr_policy.replay(policy, rollout)) - rollout.logp).exp()
        assert torch.allclose(rollout.logp[:, 0], logp, atol=1e-5) and (ratio - 1).abs().max() < 1e-5
        blurred = uniform_filter(mean.numpy(), (0, 0, 5, 5), mode="nearest")
        amounts = torch.tensor([0.3, 1.5]).expand(4, 1, 2, 2)
        image = policy.decode(torch.zeros(4, *LATENT), seen, amounts).numpy()
    for column, amount in ((0, 0.3), (31, 1.5)):                        # beyond the centers of the cells nothing mixes
        expected = mean.numpy() + amount * (mean.numpy() - blurred)
        assert np.allclose(image[..., column], expected[..., column].clip(0, 1), atol=1e-5)
    quiet = sr_policy.sample(policy, seen, noise(4, 2), map_noise=0 * drawn, start=1)
    chosen = sr_policy.sample(policy, seen, noise(4, 2), start=1)       # the policy's choice, and no action
    assert torch.equal(quiet.images, chosen.images) and chosen.logp.shape == (4, 2)
    policy.map = sr_policy.SharpeningMap()                              # untrained
    assert torch.equal(sr_policy.restore(policy, seen, noise(4)[:, 0]),
                       sr_policy.restore(tiny_policy(), seen, noise(4)[:, 0]))


def test_random_steps_in_the_window_then_ode(policy, seen):
    rollout = sr_policy.sample(policy, seen, noise(4, 2), start=1)
    x, index = rollout.latents[:, -1], torch.arange(STEPS)
    with torch.no_grad():
        first = sr_policy.step(policy, noise(4)[:, 0], index[:1].repeat(4), seen)[0]
        for i in index[3:]:
            x = sr_policy.step(policy, x, i.repeat(4), seen)[0]
    assert rollout.latents.shape == (4, 3, *LATENT) and torch.allclose(rollout.latents[:, 0], first, atol=1e-6)
    assert torch.allclose(rollout.images, policy.decode(x, seen), atol=1e-6)
    with pytest.raises(AssertionError, match="no density"):
        sr_policy.sample(policy, seen, noise(4, 2), start=STEPS - 2)


def test_batch_and_neighbors_change_nothing_and_other_sizes_work(policy, seen):
    together = sr_policy.restore(policy, seen, noise(4)[:, 0])
    alone = torch.cat([sr_policy.restore(policy, seen[i:i + 1], noise(4)[i:i + 1, 0]) for i in range(4)])
    assert (together - alone).abs().max() < 1e-5
    assert torch.equal(noise(4)[[2]], sr_policy.draw_noise([(0, "noise", 2)], (1, *LATENT), CPU))
    assert not torch.equal(noise(4)[0], noise(4)[1])
    policy.map = tiny_policy(sharpening=0.5).map
    for height, width in ((16, 12), (9, 7), (1, 2)):                    # odd sides are padded for the UNet
        other = policy.observe(torch.rand(1, 3, height, width))
        drawn = sr_policy.draw_noise([(0,)], (16, height, width), CPU)
        assert sr_policy.restore(policy, other, drawn).shape == (1, 3, 4 * height, 4 * width)


@pytest.mark.parametrize("sharpening", [None, 0.5])
def test_lora_is_off_in_the_reference_and_merged_on_saving(sharpening, seen, tmp_path):
    policy = tiny_policy(sharpening=sharpening)
    base = sr_policy.restore(policy, seen, noise(4)[:, 0])
    policy.save(tmp_path / "base")
    loaded = sr_pipelines.load_policy(tmp_path / "base", CPU)
    assert torch.equal(sr_policy.restore(loaded, seen, noise(4)[:, 0]), base)
    assert loaded.sampler == replace(policy.sampler, map=sharpening is not None)
    assert not any(p.requires_grad for p in loaded.parameters())
    expected = sr_policy.restore(add_lora(policy, 0.05), seen, noise(4)[:, 0])
    assert not torch.allclose(expected, base, atol=1e-3)
    with adapter_off(policy.unet):
        assert torch.equal(sr_policy.restore(policy, seen, noise(4)[:, 0]), base)
    policy.save(tmp_path / "stage" / "policy")
    loaded = sr_pipelines.load_policy(tmp_path / "stage", CPU)          # a stage's folder stands for its policy
    assert torch.allclose(sr_policy.restore(loaded, seen, noise(4)[:, 0]), expected, atol=1e-5)
    assert isinstance(UNet2DModel.from_pretrained(tmp_path / "stage" / "policy"), UNet2DModel)


@pytest.mark.parametrize("text, message", [(None, "sampler.json"), ("{", "sampler.json"),
                                           ('{"scale": 4}', "lacks steps, betas, sigma")])
def test_a_broken_policy_folder_is_one_line(tmp_path, capsys, text, message):
    if text:
        (tmp_path / "sampler.json").write_text(text)
    with pytest.raises(SystemExit):
        sr_pipelines.load_policy(tmp_path, CPU)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
