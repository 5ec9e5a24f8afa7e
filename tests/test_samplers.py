"""
The random and deterministic denoising steps: against plain loops in the papers' notation, torch, and diffusers.

Run     python -m pytest tests/test_samplers.py        # 5 s
"""
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from common import grpo, sr_policy

SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]                         # of a flow, from noise to clean
POWERS = [0.0, 0.05, 0.3, 0.6, 0.9, 0.999, 1.0]                 # of a diffusion model, with zero terminal SNR


def draw(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def flow_levels(index: int) -> tuple[sr_policy.Level, sr_policy.Level]:
    levels = sr_policy.flow_levels(torch.tensor(SIGMAS))
    return sr_policy.at(levels, torch.tensor([index])), sr_policy.at(levels, torch.tensor([index + 1]))


def diffusion_levels(index: int) -> tuple[sr_policy.Level, sr_policy.Level]:
    levels = sr_policy.diffusion_levels(torch.tensor(POWERS))
    return sr_policy.at(levels, torch.tensor([index])), sr_policy.at(levels, torch.tensor([index + 1]))


# plain loops, number by number, as the papers write them ---------------------------------------------------

def flow_grpo(x: float, v: float, sigma: float, after: float, first: float, a: float) -> tuple[float, float]:
    """Flow-GRPO eq. 9 (dt < 0; at sigma 1 the code of the paper takes the first sigma below)."""
    dt, std = after - sigma, a * math.sqrt(sigma / (1 - (first if sigma == 1 else sigma)))
    mean = x * (1 + std ** 2 / (2 * sigma) * dt) + v * (1 + std ** 2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


def cps(x: float, v: float, sigma: float, after: float, level: float) -> tuple[float, float]:
    """Coefficients-preserving sampling: x0 and x1 are the predicted ends of the straight path through x."""
    x0, x1, std = x - sigma * v, x + (1 - sigma) * v, after * math.sin(level * math.pi / 2)
    return (1 - after) * x0 + math.sqrt(after ** 2 - std ** 2) * x1, std


def ddim(x0: float, noise: float, alpha: float, after: float, eta: float) -> tuple[float, float]:
    """DDIM eq. 12 and 16; alpha is the paper's alpha, others' alpha bar."""
    std = eta * math.sqrt((1 - after) / (1 - alpha)) * math.sqrt(1 - alpha / after)
    return math.sqrt(after) * x0 + math.sqrt(max(0, 1 - after - std ** 2)) * noise, std


def each(formula, *columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """formula on every element, in double precision: means and standard deviations, as the first column is shaped."""
    rows = [formula(*values) for values in zip(*(column.double().flatten().tolist() for column in columns))]
    mean, std = torch.tensor(rows).T
    return mean.view_as(columns[0]), std.view_as(columns[0])


def check(sampler: str, expected: tuple, clean: torch.Tensor, noise: torch.Tensor, **step) -> None:
    """Mean, std and log-probability of a step."""
    mean, std = sr_policy.gaussian_step(sampler, clean, noise, **step)
    assert torch.allclose(mean, expected[0], atol=1e-5)
    assert torch.allclose(std.expand_as(mean), expected[1], atol=1e-5) and std.min() > 0
    x = mean + std * draw(9, len(mean))
    normal = torch.distributions.Normal(expected[0], expected[1]).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(grpo.gaussian_logp(x, mean, std), normal, atol=1e-3)


@pytest.mark.parametrize("eta", [0.3, 0.8])
@pytest.mark.parametrize("index", range(4))
def test_flow_steps_are_those_of_the_papers(index, eta):
    x, v, (now, after) = draw(0, 3), draw(1, 3), flow_levels(index)
    sigma, below = SIGMAS[index:index + 2]
    clean, noise = sr_policy.clean_and_noise("flow", x, v, now)
    step = {"now": now, "after": after, "eta": eta}
    check("sde", each(lambda x, v: flow_grpo(x, v, sigma, below, SIGMAS[1], eta), x, v), clean, noise, **step)
    check("cps", each(lambda x, v: cps(x, v, sigma, below, eta), x, v), clean, noise, **step)
    size, size_after = (math.hypot(1 - s, s) for s in (sigma, below))            # of x where a^2 + b^2 = 1
    alpha, alpha_after = ((1 - s) ** 2 / ((1 - s) ** 2 + s ** 2) for s in (sigma, below))
    mean, std = each(lambda x0, x1: ddim(x0, x1, alpha, alpha_after, eta), clean, noise)
    check("ddim", (mean * size_after, std * size_after), clean, noise, **step)


@pytest.mark.parametrize("eta", [0.3, 0.8])
@pytest.mark.parametrize("index", range(5))
def test_diffusion_steps_are_those_of_the_papers(index, eta):
    x, v, (now, after) = draw(0, 3), draw(1, 3), diffusion_levels(index)
    alpha, below = POWERS[index:index + 2]
    clean, noise = sr_policy.clean_and_noise("v_prediction", x, v, now)
    step = {"now": now, "after": after, "eta": eta}
    check("ddim", each(lambda x0, e: ddim(x0, e, alpha, below, eta), clean, noise), clean, noise, **step)
    # as a flow: x / (a + b) lies on the straight path from clean to noise, at sigma = b / (a + b)
    (size, sigma), (size_after, sigma_after), (_, first) = (
        (math.sqrt(p) + math.sqrt(1 - p), math.sqrt(1 - p) / (math.sqrt(p) + math.sqrt(1 - p)))
        for p in (alpha, below, POWERS[1]))
    straight = x / size
    mean, std = each(lambda x, v: flow_grpo(x, v, sigma, sigma_after, first, eta), straight, noise - clean)
    check("sde", (mean * size_after, std * size_after), clean, noise, **step)
    mean, std = each(lambda x, v: cps(x, v, sigma, sigma_after, eta), straight, noise - clean)
    check("cps", (mean * size_after, std * size_after), clean, noise, **step)
    std = math.sqrt(1 - below) * math.sin(eta * math.pi / 2)                    # cps is DDIM with this std
    expected = math.sqrt(below) * clean + math.sqrt(1 - below - std ** 2) * noise
    assert torch.allclose(sr_policy.gaussian_step("cps", clean, noise, **step)[0], expected, atol=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow"])
def test_clean_and_noise_add_up_to_the_state(predicts):
    now, _ = (flow_levels if predicts == "flow" else diffusion_levels)(2)
    clean, noise = draw(0, 2), draw(1, 2)
    x = now.signal * clean + now.noise * noise
    output = {"epsilon": noise, "v_prediction": now.signal * noise - now.noise * clean, "flow": noise - clean}[predicts]
    found = sr_policy.clean_and_noise(predicts, x, output, now)
    assert torch.allclose(found[0], clean, atol=1e-5) and torch.allclose(found[1], noise, atol=1e-5)


@pytest.mark.parametrize("levels", [flow_levels, diffusion_levels])
@pytest.mark.parametrize("sampler", sr_policy.SAMPLERS)
def test_without_noise_all_are_one_ode(sampler, levels):
    clean, noise = draw(0, 2), draw(1, 2)
    for index in range(5):
        now, after = levels(index)
        mean, std = sr_policy.gaussian_step(sampler, clean, noise, now=now, after=after, eta=0.0)
        assert std.max() == 0 and torch.equal(mean, after.signal * clean + after.noise * noise)
        little, std = sr_policy.gaussian_step(sampler, clean, noise, now=now, after=after, eta=1e-4)
        assert torch.allclose(little, mean, atol=1e-4) and std.max() < 1e-3


# diffusers -------------------------------------------------------------------------------------------------

def flow_scheduler(**settings) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **settings)
    scheduler.set_timesteps(6)
    return scheduler


def test_flow_steps_of_diffusers():
    """Its ODE step, and its stochastic one, which is CPS at noise level 1."""
    v, x = draw(1, 2), draw(0, 2)
    for settings, eta in (({}, 0.0), ({"stochastic_sampling": True}, 1.0)):
        scheduler = flow_scheduler(**settings)
        levels = sr_policy.flow_levels(scheduler.sigmas)
        for i, time in enumerate(scheduler.timesteps):
            now, after = (sr_policy.at(levels, torch.tensor([j])) for j in (i, i + 1))
            found = scheduler.step(v, time, x, generator=torch.Generator().manual_seed(3)).prev_sample
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
            clean, noise = sr_policy.clean_and_noise("flow", x, v, now)
            mean, std = sr_policy.gaussian_step("cps", clean, noise, now=now, after=after, eta=eta)
            assert torch.allclose(mean + std * drawn, found, atol=1e-5)


# window ----------------------------------------------------------------------------------------------------

