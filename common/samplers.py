"""
Random and deterministic denoising steps for any diffusion or flow policy. Needs torch and nothing else.

A policy predicts the clean latent and the noise of a state x = a clean + b noise. The next state of every sampler is
normal: mean a' clean + c noise, standard deviation s; samplers differ in how they split b' into c and s. `eta` is how
random they are; with 0 all are the same ODE step, c = b'.

    ddim    DDIM arXiv 2010.02502 eq. 12 and 16; eta 1 is as random as the forward process
    sde     Flow-GRPO arXiv 2505.05470 eq. 9, eta is its a; DanceGRPO's is the same with another eta
    cps     coefficients-preserving sampling arXiv 2509.05952, eta is its noise level: c^2 + s^2 = b'^2

DDIM is written for a^2 + b^2 = 1 (diffusion), the flow SDE for a + b = 1 (flows). Dividing x by a number per level
turns one into the other, so each sampler works for both; cps is the same in either.

Shapes: B samples, C latent channels, h w size of the latent, T denoising steps, whose levels are 0 (noise) .. T.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLERS = ("ddim", "sde", "cps")
SOLVERS = ("euler", "dpm")


@dataclass(frozen=True)
class Level:
    """Noise level of B states, each [B, 1, 1, 1]."""
    signal: Tensor                  # a
    noise: Tensor                   # b
    power: Tensor                   # a^2 / (a^2 + b^2), "alpha bar"
    sigma: Tensor                   # b / (a + b)


# schedules -----------------------------------------------------------------------------------------------

def variance_preserving(power: Tensor) -> Tensor:
    """Levels [T + 1, 4] of a diffusion model with signal power [T + 1] ("alpha bar"), float32."""
    signal, noise = power.sqrt(), (1 - power).sqrt()
    return torch.stack([signal, noise, power, noise / (signal + noise)], 1)


def flow(sigma: Tensor) -> Tensor:
    """Levels [T + 1, 4] of a flow model with noise levels sigma [T + 1], float32."""
    signal, noise = 1 - sigma, sigma
    return torch.stack([signal, noise, signal ** 2 / (signal ** 2 + noise ** 2), sigma], 1)


def at(levels: Tensor, index: Tensor) -> Level:
    """Levels of a schedule [T + 1, 4] at index [B] (0..T)."""
    return Level(*levels[index].T[..., None, None, None])


def window_start(step: int, first: int, *, width: int, steps: int, every: int, stride: int) -> int:
    """
    First random denoising step in GRPO step `step`; the window has `width` of `steps` denoising steps.

    Every `every` GRPO steps it moves by `stride` towards clean steps (MixGRPO arXiv 2507.21802); 0: it stays. It ends
    before the last step, which hardly adds noise: its density would be too narrow to learn from.
    """
    return min(first + (step // every * stride if every else 0), steps - 1 - width)


# steps ---------------------------------------------------------------------------------------------------

def clean_and_noise(predicts: str, x: Tensor, output: Tensor, now: Level) -> tuple[Tensor, Tensor]:
    """What a network's output says of state x at level `now`; all [B, C, h, w]."""
    a, b = now.signal, now.noise
    if predicts == "epsilon":
        return (x - b * output) / a, output
    if predicts == "v_prediction":                                  # v = a noise - b clean, arXiv 2202.00512 app. D
        return a * x - b * output, a * output + b * x
    assert predicts == "flow", f"predicts {predicts}"
    return x - b * output, x + a * output                           # v = noise - clean


def split(sampler: str, now: Level, after: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Factor c of the predicted noise in the mean, and standard deviation s, of a step; each [B, 1, 1, 1]."""
    if eta == 0:
        return after.noise, torch.zeros_like(after.noise)
    if sampler == "cps":
        return after.noise * math.cos(eta * math.pi / 2), after.noise * math.sin(eta * math.pi / 2)
    if sampler == "ddim":
        std = eta * ((1 - after.power) / (1 - now.power) * (1 - now.power / after.power)).sqrt()        # eq. 16
        kept = (1 - after.power - std ** 2).clamp(min=0).sqrt()                                         # eq. 12
        size = after.signal / after.power.sqrt()                    # of x where a^2 + b^2 is 1; a diffusion's is 1
        return kept * size, std * size
    assert sampler == "sde", f"sampler={sampler}"
    level = torch.where(now.sigma < 1, now.sigma, after.sigma)      # 1 / (1 - sigma) is infinite at pure noise
    variance, length = eta ** 2 * now.sigma / (1 - level), now.sigma - after.sigma  # per unit of time; time
    size = after.signal + after.noise                               # of x where a + b is 1; a flow's is 1
    return (after.sigma - variance * length / (2 * now.sigma)) * size, (variance * length).sqrt() * size


def step(sampler: str, clean: Tensor, noise: Tensor, *, now: Level, after: Level,
         eta: float) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and standard deviation [B, 1, 1, 1] of a step from level `now` to `after`, float32."""
    kept, std = split(sampler, now, after, eta)
    return after.signal * clean + kept * noise, std


def second_order(clean: Tensor, last: Tensor, *, before: Level, now: Level, after: Level) -> Tensor:
    """
    What DPM-Solver++ (2M, midpoint; arXiv 2211.01095 alg. 2) adds to an ODE step from `now` to `after`.

    last: the clean latent that was predicted at the level `before`, one ODE step earlier. after.noise > 0.
    """
    ratios = [level.noise / level.signal for level in (before, now, after)]             # exp(-lambda); may be inf
    length, past = (ratios[1] / ratios[2]).log(), (ratios[0] / ratios[1]).log()         # h_i, h_{i-1}
    slope = (clean - last) * (length / (2 * past))
    return (after.signal - after.noise / ratios[1]) * slope
