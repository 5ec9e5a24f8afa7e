"""
Published latent diffusion models as super-resolution policies, for common/sr_policy.py to sample and replay.

    ldm         LDMSuperResolutionPipeline, e.g. CompVis/ldm-super-resolution-4x-openimages: the UNet sees LR.
    upscaler    StableDiffusionUpscalePipeline, e.g. stabilityai/stable-diffusion-x4-upscaler: the UNet sees LR with
                noise of a level that it is told as class label, and a text, the empty one if not told. No guidance.

Both denoise at the size of LR; a frozen autoencoder enlarges by s. Sampling is on the model's own schedule and time
steps: with eta 0 it is what the pipeline does with a DDIMScheduler. All weights and arithmetic are float32 (in half
precision the autoencoder of the upscaler overflows).

Shapes: B samples, C latent channels, h w size of LR and latent, H = s h, W = s w size of SR, T denoising steps.
Sources: LDM arXiv 2112.10752 section 4.4; noise on LR as augmentation arXiv 2106.15282; both pipelines as in diffusers
0.42.
"""
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from common import dist, run, sr_policy
from common.config import fail
from common.sr_flow import FlowPolicy
from common.sr_pipelines import LatentSampler, load_pipeline, own_times, read_sampler
from common.sr_policy import Policy, Sampler


class LatentPolicy(nn.Module):
    """UNet, autoencoder and schedule of a pipeline of diffusers. `unet` may be wrapped by peft."""

    def __init__(self, pipeline, sampler: LatentSampler):
        super().__init__()
        is_ldm = sampler.policy == "ldm"
        self.unet, self.vae, self.sampler = pipeline.unet, pipeline.vqvae if is_ldm else pipeline.vae, sampler
        self.multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.channels, self.lora_part = self.unet.config.out_channels, None if is_ldm else "unet"
        self.unit = 1.0 if is_ldm else self.vae.config.scaling_factor   # latents are multiplied by it
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.predicts = scheduler.config.prediction_type
        self.limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        times = torch.tensor(sampler.times).long()
        power = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod[None]])           # [T + 1]
        constants = {"times": times, "levels": sr_policy.variance_preserving(power)}
        if not is_ldm:
            with torch.no_grad():
                text, _ = pipeline.encode_prompt(sampler.prompt, "cpu", num_images_per_prompt=1,
                                                 do_classifier_free_guidance=False)
            constants |= {"text": text, "lr_signal": pipeline.low_res_scheduler.alphas_cumprod[sampler.noise_level]}
        for name, value in constants.items():
            self.register_buffer(name, value.clone(), persistent=False)

    def observe(self, lr: Tensor, keys: list[tuple]) -> Tensor:
        """What the UNet sees of LR [B, 3, h, w] in 0..1: [B, 3, h, w] in -1..1, the upscaler's with noise of keys."""
        if any(length % self.multiple for length in lr.shape[-2:]):
            fail(f"{self.sampler.model}: sides of LR should be multiples of {self.multiple} px, these are "
                     f"{lr.shape[-1]} x {lr.shape[-2]}: choose hr_size and scale in stage 01, large_size in 05 so")
        if self.sampler.policy == "ldm":
            return 2 * lr - 1
        noise = sr_policy.draw_noise([(*key, "lr") for key in keys], lr.shape[1:], lr.device)
        return self.lr_signal.sqrt() * (2 * lr - 1) + (1 - self.lr_signal).sqrt() * noise

    def output(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """Output of the UNet [B, C, h, w], float32, for a noisy latent x [B, C, h, w] at training time steps [B]."""
        both = torch.cat([x, seen], 1)
        if self.sampler.policy == "ldm":
            return self.unet(both, time).sample.float()
        level = torch.full_like(time, self.sampler.noise_level)
        text = self.text.expand(len(x), -1, -1)                                                 # [B, L, D]
        return self.unet(both, time, encoder_hidden_states=text, class_labels=level).sample.float()

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise, float32, in state x [B, C, h, w] before denoising step `index` [B] (0..T-1)."""
        output = self.output(x, self.times[index], seen)
        clean, noise = sr_policy.clean_and_noise(self.predicts, x, output, sr_policy.at(self.levels, index))
        return clean if self.limit is None else clean.clamp(-self.limit, self.limit), noise

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        """Clean latent [B, C, h, w] -> SR [B, 3, H, W] in 0..1. Not told `seen`, as sr_policy's is."""
        return (self.vae.decode(latent / self.unit).sample / 2 + 0.5).clamp(0, 1)

    def write(self, folder: Path) -> None:
        """A whole pipeline that diffusers loads, with this UNet and DDIM as scheduler; sampler.json last."""
        pipeline = load_pipeline(self.sampler)
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.register_modules(unet=self.unet, scheduler=scheduler)
        pipeline.save_pretrained(folder)
        run.write_json(folder / "sampler.json", asdict(replace(self.sampler, model=".")))


def point_to(folder: Path, sampler: LatentSampler) -> None:
    """Write sampler.json only: the policy of `folder` is the published model itself. Every rank calls it."""
    if dist.is_main():
        folder.mkdir(exist_ok=True)
        places = {key: str(Path(place).resolve()) if Path(place).exists() and place else place
                  for key, place in (("model", sampler.model), ("controlnet", sampler.controlnet))}
        run.write_json(folder / "sampler.json",
                       asdict(replace(sampler, times=sampler.times or own_times(sampler), **places)))
    dist.barrier()


def sampler_of(folder: Path, steps: int | None = None) -> Sampler | LatentSampler:
    """How the policy in a folder of stage 04, of any kind, denoises; steps: at another T, or why not."""
    kind = LatentSampler if "policy" in run.read_json(folder / "sampler.json") else Sampler
    sampler = read_sampler(kind, folder)
    if kind is LatentSampler and sampler.model == ".":
        sampler = replace(sampler, model=str(folder))
    if steps in (None, sampler.steps):
        return sampler
    return sr_policy.timed(sampler, steps) if kind is Sampler else \
        replace(sampler, times=own_times(replace(sampler, steps=steps)), steps=steps)


def load_policy(folder: Path, device: torch.device, steps: int | None = None) -> Policy | LatentPolicy | FlowPolicy:
    """The frozen policy in a folder of stage 04, of any kind, or one line that says what is wrong; steps: another T."""
    sampler = sampler_of(folder, steps)
    if isinstance(sampler, Sampler):
        return sr_policy.load_policy(folder, device, steps)
    return build(sampler).to(device).eval().requires_grad_(False)


def build(sampler: LatentSampler) -> LatentPolicy | FlowPolicy:
    """The policy of a pipeline that diffusers loads, on the CPU, its time steps the model's own if none are given."""
    sampler = replace(sampler, times=sampler.times or own_times(sampler))
    return (FlowPolicy if sampler.policy == "sd3" else LatentPolicy)(load_pipeline(sampler), sampler)
