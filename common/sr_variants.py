"""
What stage 05 compares and restores with: the policy before GRPO, after, and a mix of both; at any number of steps.

Hybrid inference, as MixGRPO has it (arXiv 2507.21802): the tuned weights make the first, noisy steps, which decide
what is drawn, and the weights before GRPO the rest, where a policy that fools its reward adds what fools it.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import sr_latent
from common.config import fail
from common.sr_policy import Policy

FOLDERS = {"base": "cold_start", "tuned": "policy"}             # of stage 04


def switch(share: float, steps: int) -> int:
    """Index of the first step of `base` in a hybrid, or one line if it would be no mix."""
    first = round(share * steps)
    if not 0 < first < steps:
        fail(f"hybrid={share}: {first} of {steps} steps would have tuned weights, which is no mix: choose another "
                 "share")
    return first


@dataclass
class Hybrid:
    """Two policies of one kind as one: `tuned` makes the first `share` of the denoising steps, `base` the rest."""
    tuned: Policy
    base: Policy
    share: float

    def __post_init__(self):
        self.sampler, self.times = self.tuned.sampler, self.tuned.times
        self.levels, self.multiple, self.channels = self.tuned.levels, self.tuned.multiple, self.tuned.channels
        self.switch = switch(self.share, self.tuned.sampler.steps)

    def observe(self, lr: Tensor, keys: list[tuple]) -> Tensor:
        return self.tuned.observe(lr, keys)

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """As Policy.predict; all rows of a batch are at one step."""
        return (self.tuned if int(index[0]) < self.switch else self.base).predict(x, index, seen)

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        return self.tuned.decode(latent, seen)


@dataclass
class Clocked:
    """A policy that knows how long the last sampling took: seconds of [denoising, decoding]."""
    policy: Policy | Hybrid
    seconds: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self):
        self.sampler, self.levels = self.policy.sampler, self.policy.levels
        self.times, self.channels = self.policy.times, self.policy.channels

    def observe(self, lr: Tensor, keys: list[tuple]) -> Tensor:
        self.begun = now()
        return self.policy.observe(lr, keys)

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy.predict(x, index, seen)

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        denoised = now()
        images = self.policy.decode(latent, seen)
        self.seconds = denoised - self.begun, now() - denoised
        return images


def now() -> float:
    """Seconds, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def check(stage: Path, names: list[str], *, hybrid: float, steps: int) -> None:
    """Stop, before anything is loaded, if `load` could not give the policies so many denoising steps."""
    for folder in FOLDERS.values():
        sr_latent.sampler_of(stage / folder, steps)
    if "hybrid" in names:
        switch(hybrid, steps)


def load(stage: Path, names: list[str], device: torch.device, *, hybrid: float,
         steps: int | None = None) -> dict[str, Policy | Hybrid]:
    """Name -> policy of stage 04, for names among base, tuned, hybrid; steps: another number of denoising steps."""
    parts = {name: sr_latent.load_policy(stage / folder, device, steps) for name, folder in FOLDERS.items()
             if name in names or "hybrid" in names}
    return {name: Hybrid(parts["tuned"], parts["base"], hybrid) if name == "hybrid" else parts[name] for name in names}
