"""
What a run of stage 04 will take, before anything is computed or written: `plan=true`.

Counts follow from the settings. Memory is an estimate: weights, gradients, and moments are counted; what autograd keeps
is measured on one sample, as the bytes of all tensors that one pass with gradient saves for its backward pass.
"""
import math
from pathlib import Path

import torch
from torch import Tensor

from common import dist, sr_policy
from common.images import grid
from common.sr_policy import Policy
from common.sr_training import trainable

MB = 2 ** 20


def saved_bytes(policy: Policy, cfg, lr: Tensor) -> int:
    """Bytes that autograd keeps of one sample's passes with gradient in an update, for one LR image [1, 3, h, w]."""
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    keys = [(cfg.seed, "plan")]
    repeats = cfg.nft_times if cfg.algorithm == "nft" else cfg.window_width
    seen = policy.observe(lr, keys).expand(repeats, -1, -1, -1)
    x = sr_policy.draw_noise(keys * repeats, (policy.channels, *seen.shape[-2:]), lr.device)
    policy.train()
    index = (cfg.window_start + torch.arange(repeats, device=x.device)) % cfg.denoise_steps
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = policy.predict(x, index, seen)
    del alive                                                   # until here nothing that was saved has been freed
    return sum(kept.values())


def memory(policy: Policy, reference: Policy, cfg, lr: Tensor) -> dict[str, int]:
    """Bytes on one GPU, by what they are for."""
    size = {"weights": sum(p.nbytes for p in policy.parameters())}
    if reference is not policy:
        size["frozen copy of the UNet (lora_rank=0)"] = sum(p.nbytes for p in reference.unet.parameters())
    trained, copies = sum(p.nbytes for p in trainable(policy.unet).values()), 2 + (cfg.algorithm == "nft")
    size["gradients, and two moments of AdamW"] = 3 * trained
    size[f"{copies} copies of what is trained (averaged, best{', sampling' if copies == 3 else ''})"] = copies * trained
    samples = min(cfg.samples_per_gpu, math.ceil(cfg.inputs_per_step / dist.world_size()) * cfg.samples_per_input)
    each = saved_bytes(policy, cfg, lr)
    size[f"activations: {each / MB:.2f} MB measured on one sample, times {samples} in a micro-batch"] = each * samples
    return size


def show(cfg, policy: Policy, reference: Policy, *, lr: Tensor, scale: int, evaluated: int, judge: Path) -> None:
    """Print sizes, work, disk and memory of a run on LR images [1, 3, h, w] (the first), enlarged by scale."""
    count, (height, width) = sum(p.numel() for p in policy.unet.parameters()), lr.shape[-2:]
    trained = sum(p.numel() for p in trainable(policy.unet).values())
    samples = cfg.inputs_per_step * cfg.samples_per_input
    passes = (samples + (cfg.max_sample_drop is not None) * cfg.inputs_per_step) * cfg.denoise_steps    # and the floors
    learned = samples * cfg.updates_per_rollout * (cfg.nft_times if cfg.algorithm == "nft" else cfg.window_width)
    side = max(1, cfg.crop // scale) if cfg.crop else max(height, width)
    crops = len(grid(height, width, side, cfg.crops_per_image))
    evaluations = 1 + math.ceil(cfg.steps / cfg.eval_every)
    parts = trained * 4 * (5 + (cfg.algorithm == "nft"))        # trained, averaged, best, two moments
    latent = policy.observe(lr, [(cfg.seed, "plan")]).shape[-2:]
    sizes = memory(policy, reference, cfg, lr)
    judge_bytes = sum(path.stat().st_size for path in judge.glob("judge/**/*.safetensors"))
    lines = [
        f"policy {cfg.policy}: the UNet has {count:,} weights, {trained:,} are trained "
        + (f"(LoRA of rank {cfg.lora_rank})" if cfg.lora_rank else "(all)"),
        f"LR {width} x {height} px, SR {scale * width} x {scale * height} px, "
        f"latent {' x '.join(str(length) for length in (policy.channels, *latent))}",
        f"a step: {cfg.inputs_per_step} LR images x {cfg.samples_per_input} samples = {samples} images; "
        f"{passes} passes of the UNet to sample, {learned} with gradient to learn"
        + (", as many of the reference" if cfg.kl_weight else "")
        + (", as many of the policy that samples" if cfg.algorithm == "nft" else ""),
        f"the judge sees {samples * crops} images a step: {crops} of each sample",
        f"the run: {cfg.steps} steps, {cfg.steps * samples:,} samples, {cfg.steps * cfg.updates_per_rollout} updates; "
        f"{evaluations} evaluations of {evaluated} images"
        + (f"; before, {cfg.cold_start_steps} steps of cold start" if cfg.policy == "pixel" else ""),
        f"disk: {parts / MB:,.1f} MB per checkpoint, the newest two are kept",
        f"memory of a process, an estimate (float32): {sum(sizes.values()) / MB:,.1f} MB",
        *(f"    {value / MB:,.1f} MB  {name}" for name, value in sizes.items()),
        f"    not in it: the judge ({judge_bytes / MB:,.1f} MB of weights in {judge}, and its base model if that is "
        "elsewhere), libraries, passes without gradient, the decoder",
        "nothing was written; leave plan=true out to start"]
    dist.print0("\n".join(lines))
