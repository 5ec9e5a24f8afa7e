"""
Training of the pixel policy before GRPO, on the LR/HR pairs of stage 01: the cold start.

Every random number is a function of (seed, step, row), so nothing random is saved, and any number of ranks
draws the same batch. Shapes: B pairs, C latent channels, h w size of LR, H W size of HR.
"""
import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm import tqdm

from common import dist, report, run, sr_latent, sr_policy
from common.config import fail
from common.dist import mine
from common.groups import image_batch
from common.images import turn
from common.sr_policy import Policy, Sampler
from common.sr_training import average, resume, save, trainable


def fit_sampler(hr: Tensor, lr: Tensor, *, scale: int, steps: int, contrast_power: float) -> Sampler:
    """Schedule, and the latent space of training pairs HR [N, 3, H, W], LR [N, 3, h, w] in 0..1."""
    count = 1000                                                        # training time steps
    signal = [math.cos(math.pi / 2 * i / count) ** 2 for i in range(count)] + [0.0]     # cosine, ends at zero
    betas = [1 - after / before for before, after in zip(signal[:-1], signal[1:])]
    rows = sr_policy.detail_patches(hr, lr, contrast_power).double().permute(0, 2, 3, 1).flatten(0, 2)  # [N h w, C]
    variance, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    spread = variance.clamp(min=1e-4 * float(variance.max())).sqrt()    # flat training images would give 0
    return Sampler(scale, steps, betas, contrast_power, basis=(spread[:, None] * axes.T).tolist())


def new_policy(cfg, source: Path, groups: list[dict]) -> Policy:
    """An untrained policy, its latent space fitted to at most 1000 training pairs. cfg: stage 04's Config."""
    some = [groups[i] for i in sorted(run.np_rng(cfg.seed, "fit").permutation(len(groups))[:1000])]
    lr, hr = image_batch(source, some, "lr"), image_batch(source, some, "hr")
    sampler = fit_sampler(hr, lr, scale=some[0]["scale"], steps=cfg.denoise_steps,
                          contrast_power=cfg.contrast_power)
    sampler = replace(sampler, times=[int(time) for time in cfg.step_list], solver=cfg.solver)
    latent, levels, (height, width) = len(sampler.basis), len(cfg.channels), lr.shape[-2:]
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        fail(f"channels={cfg.channels} has {levels} levels, so the sides of LR should be multiples of "
                 f"{2 ** (levels - 1)} px, not {width} x {height}: give fewer channels or another hr_size")
    torch.manual_seed(run.stable_seed(cfg.seed, "weights"))     # diffusers draws from torch's own generator
    unet = UNet2DModel(sample_size=(height, width), in_channels=latent + sr_policy.CONDITION_CHANNELS,
                       out_channels=latent, block_out_channels=cfg.channels, layers_per_block=cfg.layers,
                       down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
                       norm_num_groups=8, attention_head_dim=32)        # attention on the lowest level only
    for p in unet.conv_out.parameters():
        torch.nn.init.zeros_(p)                                 # v = 0 is right where nothing can be known
    return Policy(unet, sampler)


def adopt(folder: Path, cfg) -> None:
    """
    Let the cold start that lies in `folder`, perhaps copied from another run, denoise as the settings say, which its
    weights do not depend on; stop if they ask for another network.
    """
    sampler, network = sr_latent.sampler_of(folder), run.read_json(folder / "config.json")
    trained = {"channels": network.get("block_out_channels"), "layers": network.get("layers_per_block"),
               "contrast_power": sampler.contrast_power}
    for key, value in trained.items():
        if vars(cfg)[key] != value:
            fail(f"{folder} was trained with {key}={value}, the setting is {vars(cfg)[key]}: give the former, or "
                     "delete this folder so that it is trained anew")
    wanted = sr_policy.timed(sampler, cfg.denoise_steps, [int(time) for time in cfg.step_list])
    wanted = replace(wanted, solver=cfg.solver)
    if wanted != sampler and folder.is_symlink():
        fail(f"{folder} is a link to a cold start of other denoise_steps, step_list or solver: copy that folder, "
                 "as its sampler.json has to change")
    dist.barrier()                                                      # every rank has read it
    if dist.is_main() and wanted != sampler:
        run.write_json(folder / "sampler.json", asdict(wanted))
    dist.barrier()


def cold_start_loss(policy: Policy, cfg, source: Path, *, groups: list[dict], step: int) -> Tensor:
    """This rank's part of the mean squared error of v over the batch: the parts of all ranks sum to it."""
    size, device = cfg.cold_start_batch, policy.signal.device
    chosen = run.np_rng(cfg.seed, "cold start", step).integers(len(groups), size=size)
    shift = torch.rand(size, generator=run.generator(cfg.seed, "cold start time", step))
    rows = mine(list(range(size)))
    if not rows:
        return torch.zeros((), device=device, requires_grad=True)
    batch = [groups[chosen[row]] for row in rows]
    lr, hr = (turn(image_batch(source, batch, key).to(device), step % 8) for key in ("lr", "hr"))
    clean = policy.encode(hr, lr)                                                               # [B, C, h, w]
    keys = [(cfg.seed, "cold start", step, row) for row in rows]
    noise = sr_policy.draw_noise(keys, clean.shape[1:], device)
    time = ((torch.tensor(rows) + shift[rows]) / size * len(policy.signal)).long().to(device)   # stratified
    time = time.clamp(max=len(policy.signal) - 1)                       # float32 may round to the end itself
    signal = policy.signal[time][:, None, None, None]
    v = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    error = policy.velocity(signal.sqrt() * clean + (1 - signal).sqrt() * noise, time, lr) - v
    return error.square().sum() / (size * clean[0].numel())


def cold_start(policy: Policy, cfg, folder: Path, *, source: Path, groups: list[dict]) -> None:
    """Train a new policy, from the newest checkpoint on, and leave its averaged weights in `folder`."""
    folder.mkdir(exist_ok=True)
    averaged = copy.deepcopy(policy)
    parts = {"policy": trainable(policy.unet), "averaged": trainable(averaged.unet)}
    weights = list(parts["policy"].values())
    optimizer = torch.optim.AdamW(weights, lr=cfg.cold_start_lr, betas=(0.9, 0.99), weight_decay=0.01)
    first, _ = resume(folder, parts, optimizer)
    run.trim_metrics(folder, first)
    total = cfg.cold_start_steps
    quiet = not dist.is_main()
    bar = tqdm(range(first, total), "cold start", initial=first, total=total, disable=quiet)
    for step in bar:
        decay = (1 + math.cos(math.pi * step / total)) / 2
        optimizer.param_groups[0]["lr"] = cfg.cold_start_lr * min(1, (step + 1) / 50) * decay
        loss = cold_start_loss(policy, cfg, source, groups=groups, step=step)
        loss.backward()
        dist.sum_gradients(weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if not torch.isfinite(norm):
            fail(f"{folder}: step {step} has no finite gradient; lower cold_start_lr in a new run=")
        optimizer.step()
        optimizer.zero_grad()
        average(parts["averaged"], parts["policy"], min(cfg.cold_start_ema, (step + 1) / (step + 10)))
        if step % 10 == 0:
            report.log(folder, step, {"loss": dist.all_sum(loss), "grad_norm": norm})
        if (step + 1) % (20 * cfg.save_every) == 0:             # fast steps
            save(folder, step + 1, parts, optimizer=optimizer, state={})
    if dist.is_main():
        report.write_curves(folder)
        sr_policy.save_policy(averaged, folder)                     # its last file, sampler.json, says "done"
    dist.barrier()
