"""
The base policy: stage 01 trains the small policy (sr_policy.py) on its training crops, and draws candidates from it.

    1. the regressor       Charbonnier loss, and half the L1 of the gradients, which a blurred edge pays for
    2. the diffusion model, with the regressor frozen: mean squared error of v, at stratified noise levels

A copy from an early stage of part 2 is kept in early/: its samples are worse in another way than those of few steps.
Every random number is a function of (seed, step, row), so any number of ranks draws the same batches.

    <folder>/   config.json  diffusion_pytorch_model.safetensors  regressor.safetensors  sampler.json (last)  early/
"""
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import dist, run, sr_policy
from common.config import fail
from common.groups import image_batch
from common.images import from_pixels, to_pixels, turn
from common.sr_policy import Policy, Regressor, Sampler
from common.training import (Weights, average, copied, cosine, drop_checkpoints, named, resume, save_checkpoint,
                             set_lr, swapped, trainable, update)

WIDTH, BLOCKS = 48, 6           # of the regressor: 273,264 weights at scale 4
CHANNELS = [32, 64]             # of the UNet's levels: 0.65 million weights
REGRESSOR_SHARE = 1 / 3         # steps of the regressor, in steps of the UNet
EARLY = 0.15                    # part of the UNet's training after which early/ is written
BATCH = 16                      # LR/HR pairs per step, over all ranks
LEARNING_RATE = 2e-3            # AdamW, 50 steps of warm-up, then half a cosine
EMA = 0.99                      # decay per step of the averaged weights, which are kept
SAVE_EVERY = 200                # steps between checkpoints
STEPS, GAIN = 4, 0.15           # default sampling of what is saved: sharper than bicubic, with little grain
CANDIDATE_STEPS = (1, 2, 5)             # T of candidates
CANDIDATE_GAINS = (0.1, 1.0)            # from smooth to grainy
CANDIDATE_NOISE = (0.7, 1.2)            # spread of their first latent: below 1 detail is fainter, above 1 it is grain
REGRESSED = 0.2                         # part of the candidates that are the regressor's image: no detail is drawn
EARLY_CANDIDATES = 0.25         # part of the candidates that come from early/


# train -----------------------------------------------------------------------------------------------------------

def train(folder: Path, stage: Path, names: list[str], *, steps: int, seed: int, device: torch.device) -> None:
    """
    Make the policy in `folder` from the crops <stage>/lr|hr/<name>.png, or go on where a killed run was.

    steps: optimizer steps of the UNet. Every rank calls it, and makes its share of a batch.
    """
    if (folder / "sampler.json").exists():
        return
    if dist.world_size() > BATCH:
        fail(f"base_steps: the base policy is trained on batches of {BATCH}: start at most as many processes")
    folder.mkdir(exist_ok=True)
    crops = [{"lr": f"lr/{name}.png", "hr": f"hr/{name}.png"} for name in names]
    some = [crops[i] for i in sorted(run.np_rng(seed, "fit").permutation(len(crops))[:1000])]
    lr, hr = (image_batch(stage, some, key) for key in ("lr", "hr"))
    scale, side = hr.shape[-1] // lr.shape[-1], lr.shape[-1]
    torch.manual_seed(run.stable_seed(seed, "weights"))                 # networks start from torch's own generator
    regressor = Regressor(scale, WIDTH, BLOCKS).to(device)
    unet = sr_policy.new_unet(CHANNELS, scale=scale, side=side).to(device)

    def batch_of(part: str, step: int) -> tuple[Tensor, Tensor]:
        rows = run.np_rng(seed, part, step).integers(len(crops), size=BATCH)
        mine = [crops[rows[row]] for row in dist.mine(list(range(BATCH)))]
        return tuple(turn(image_batch(stage, mine, key).to(device), step % 8) for key in ("lr", "hr"))

    def regressor_part(step: int) -> Tensor:
        lr, hr = batch_of("regressor", step)
        return regressor_loss(regressor(lr), hr) * len(lr) / BATCH

    def unet_part(step: int) -> Tensor:
        rows = dist.mine(list(range(BATCH)))
        return v_loss(policy, *batch_of("base", step), seed=seed, step=step, rows=rows) * len(rows) / BATCH

    if (folder / sr_policy.REGRESSOR).exists():
        regressor.load_state_dict(run.load_tensors(folder / sr_policy.REGRESSOR))
    else:
        averaged = fit(regressor, regressor_part, folder / "regressor", steps=max(1, round(REGRESSOR_SHARE * steps)))
        average(trainable(regressor), averaged, 0.0)
        if dist.is_main():
            run.save_tensors(folder / sr_policy.REGRESSOR, regressor.state_dict())
    regressor.requires_grad_(False).eval()

    with torch.no_grad():
        left = torch.cat([sr_policy.gray(y - regressor(x)) for x, y in
                          zip(lr.to(device).split(50), hr.to(device).split(50))])
    sampler = Sampler(scale, STEPS, sr_policy.zero_terminal_betas(), sigma=float(left.square().mean().sqrt()),
                      gain=GAIN, width=WIDTH, blocks=BLOCKS)
    policy = Policy(unet, regressor, sampler).to(device)
    early = max(1, round(EARLY * steps)), lambda: policy.save(folder / "early")
    averaged = fit(unet, unet_part, folder, steps=steps, early=early)
    average(trainable(unet), averaged, 0.0)
    if dist.is_main():
        policy.save(folder)                                             # its last file, sampler.json, says "done"
    dist.barrier()
    for part in (folder / "regressor", folder):
        drop_checkpoints(part)
    if dist.is_main() and (folder / "regressor").exists():
        (folder / "regressor").rmdir()


def fit(network: nn.Module, loss_of: Callable[[int], Tensor], folder: Path, *, steps: int,
        early: tuple[int, Callable] = (-1, None)) -> Weights:
    """
    Train the network on this rank's part of the loss, loss_of(step); its averaged weights.

    early: (after how many steps, what to call with the averaged weights in the network). Checkpoints go to `folder`.
    """
    folder.mkdir(exist_ok=True)
    weights = trainable(network)
    averaged = copied(weights)
    optimizers = {"adamw": torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.99))}
    both = named(policy=weights, averaged=averaged)
    first, _ = resume(folder, both, optimizers)
    for step in tqdm(range(first, steps), f"base policy: {folder.name}", initial=first, total=steps, mininterval=1,
                     disable=not dist.is_main()):
        set_lr(optimizers, min(1, (step + 1) / 50) * cosine(step / steps, 0.0))
        loss_of(step).backward()
        _, skipped = update(weights, optimizers, 1.0)
        if skipped:
            fail(f"{folder}: step {step} has no finite gradient: delete the folder, and use another seed or run=")
        average(averaged, weights, min(EMA, (step + 1) / (step + 10)))
        if step + 1 == early[0] and dist.is_main():
            with swapped(weights, averaged):
                early[1]()
        if (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(folder, step + 1, weights=both, optimizers=optimizers, state={})
    return averaged


def regressor_loss(sr: Tensor, hr: Tensor) -> Tensor:
    """Charbonnier, and half the L1 of the gradients."""
    error = sr - hr
    return (error ** 2 + 1e-6).sqrt().mean() + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def v_loss(policy: Policy, lr: Tensor, hr: Tensor, *, seed: int, step: int, rows: list[int]) -> Tensor:
    """Mean squared error of v for these rows of a step's batch, at noise levels stratified over all of it."""
    seen = policy.observe(lr)
    clean = policy.encode(hr, seen)                                                             # [B, C, h, w]
    noise = sr_policy.draw_noise([(seed, "base", step, row) for row in rows], clean.shape[1:], lr.device)
    shift = torch.rand(BATCH, generator=run.generator(seed, "base time", step))
    time = ((torch.arange(BATCH) + shift) / BATCH * len(policy.signal)).long()
    time = time.clamp(max=len(policy.signal) - 1)[rows].to(lr.device)   # float32 may round to the end itself
    power = policy.signal[time][:, None, None, None]
    signal, level = power.sqrt(), (1 - power).sqrt()
    v = signal * noise - level * clean
    return (policy.velocity(signal * clean + level * noise, time, seen) - v).square().mean()


# candidates ------------------------------------------------------------------------------------------------------

@functools.cache
def loaded(folder: Path, steps: int) -> Policy:
    """The frozen policy on the CPU, read once per process, which then uses one thread: the others have their own."""
    torch.set_num_threads(1)
    return sr_policy.with_sampling(sr_policy.load_small(folder, torch.device("cpu")), steps=steps, gain=1.0)


def candidate(folder: Path, lr: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A sample for LR uint8 [h, w, 3] at a random setting: (uint8 [H, W, 3], record)."""
    stage, steps = "early" if rng.random() < EARLY_CANDIDATES else "base", int(rng.choice(CANDIDATE_STEPS))
    policy = loaded(folder / "early" if stage == "early" else folder, steps)
    seen = policy.observe(from_pixels(lr))
    if rng.random() < REGRESSED:
        return to_pixels(policy.mean(seen).clamp(0, 1))[0], {"method": "regressor"}
    gain, spread = float(rng.uniform(*CANDIDATE_GAINS)), float(rng.uniform(*CANDIDATE_NOISE))
    policy.sampler = replace(policy.sampler, gain=gain)
    noise = sr_policy.draw_noise([(int(rng.integers(2**62)), "candidate")], (policy.channels, *lr.shape[:2]),
                                 seen.device)
    image = to_pixels(sr_policy.restore(policy, seen, spread * noise))[0]
    return image, {"method": stage, "steps": steps, "gain": round(gain, 3), "noise": round(spread, 3)}
