"""
Stable Diffusion 3 with a tile ControlNet as a super-resolution policy, for common/sr_policy.py to sample and replay.

A flow model: x = (1 - sigma) clean + sigma noise, and the transformer predicts noise - clean. LR is enlarged to the
size of SR (bicubic, as Pillow does it) and encoded by the autoencoder; the ControlNet turns that into what it adds to
the transformer's blocks. One prompt for all images, no guidance (CFG 1). Noise levels are the pipeline's own, with its
shift; with eta 0 sampling is what the pipeline does. Only the transformer is trained. All is float32.

Shapes: B samples, C latent channels, h w size of the latent: of SR divided by f (8), H = s * LR's, W size of SR.
Sources: SD3 arXiv 2403.03206; ControlNet arXiv 2302.05543; the pipeline as in diffusers 0.42.
"""
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import dist, run, sr_policy
from common.config import fail
from common.sr_pipelines import LatentSampler, load_pipeline


@torch.no_grad()
def encode_prompt(pipeline, prompt: str) -> tuple[Tensor, Tensor]:
    """Tokens [1, L, D] and their summary [1, P], for every rank, by the main one: it alone has the text encoders."""
    text = pooled = torch.zeros(0)
    if dist.is_main():
        text, _, pooled, _ = pipeline.encode_prompt(*[prompt] * 3, device="cpu", do_classifier_free_guidance=False)
    text, pooled = (dist.gather_rows(part.flatten()) for part in (text, pooled))        # other ranks have no rows
    return text.view(1, -1, pipeline.transformer.config.joint_attention_dim), pooled[None]


class FlowPolicy(nn.Module):
    """Transformer, ControlNet, autoencoder and prompt of a StableDiffusion3ControlNetPipeline."""

    def __init__(self, pipeline, sampler: LatentSampler):
        super().__init__()
        self.unet = pipeline.transformer            # the network that is trained, as in all policies; may have LoRA
        self.controlnet, self.vae, self.sampler = pipeline.controlnet, pipeline.vae, sampler
        self.lora_part = "transformer"
        settings = pipeline.transformer.config
        self.channels, self.enlarges = settings.in_channels, pipeline.vae_scale_factor
        side = self.enlarges * settings.patch_size                      # px of SR that a token covers
        self.multiple, self.largest = side // math.gcd(side, sampler.scale), side * settings.pos_embed_max_size
        self.unpooled = self.controlnet.config.force_zeros_for_pooled_projection    # InstantX: no pooled text, no shift
        text, pooled = encode_prompt(pipeline, sampler.prompt)
        sigma = torch.tensor([*sampler.times, 0.0])                     # [T + 1]
        constants = {"levels": sr_policy.flow(sigma), "text": text, "pooled": pooled,
                     "times": sigma[:-1] * pipeline.scheduler.config.num_train_timesteps}
        for name, value in constants.items():
            self.register_buffer(name, value.clone(), persistent=False)

    @torch.no_grad()
    def observe(self, lr: Tensor, keys: list[tuple]) -> Tensor:
        """Control latent [B, C, h, w] of LR [B, 3, H / s, W / s] in 0..1; the autoencoder's noise is that of keys."""
        height, width = (self.sampler.scale * length for length in lr.shape[-2:])
        if any(length % self.multiple for length in lr.shape[-2:]) or max(height, width) > self.largest:
            fail(f"{self.sampler.model}: sides of LR should be multiples of {self.multiple} px and at most "
                     f"{self.largest // self.sampler.scale}, these are {lr.shape[-1]} x {lr.shape[-2]}: choose hr_size "
                     "and scale in stage 01, large_size in 05 so")
        image = F.interpolate(lr, (height, width), mode="bicubic", antialias=True).clamp(0, 1)  # antialias: as Pillow
        coded = [self.vae.encode(2 * one[None] - 1).latent_dist for one in image]       # one by one: large
        mean, std = torch.cat([one.mean for one in coded]), torch.cat([one.std for one in coded])
        noise = sr_policy.draw_noise([(*key, "lr") for key in keys], mean.shape[1:], lr.device)
        shift = 0 if self.unpooled else self.vae.config.shift_factor
        return (mean + std * noise - shift) * self.vae.config.scaling_factor

    def velocity(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """Predicted noise - clean [B, C, h, w], float32, for a state x [B, C, h, w] at times 1000 sigma [B]."""
        text, pooled = self.text.expand(len(x), -1, -1), self.pooled.expand(len(x), -1)     # [B, L, D], [B, P]
        told = text if self.controlnet.config.joint_attention_dim is not None else None
        with torch.no_grad():
            blocks = self.controlnet(hidden_states=x, timestep=time, encoder_hidden_states=told, controlnet_cond=seen,
                                     pooled_projections=torch.zeros_like(pooled) if self.unpooled else pooled)
        return self.unet(hidden_states=x, timestep=time, encoder_hidden_states=text, pooled_projections=pooled,
                         block_controlnet_hidden_states=blocks.controlnet_block_samples).sample.float()

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise, float32, in state x [B, C, h, w] before denoising step `index` [B] (0..T-1)."""
        v = self.velocity(x, self.times[index], seen)
        return sr_policy.clean_and_noise("flow", x, v, sr_policy.at(self.levels, index))

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        """Clean latent [B, C, h, w] -> SR [B, 3, H, W] in 0..1."""
        latent = latent / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)

    def write(self, folder: Path) -> None:
        """A whole pipeline that diffusers loads, with this transformer and the ControlNet; sampler.json last."""
        pipeline = load_pipeline(self.sampler)
        pipeline.register_modules(transformer=self.unet)
        pipeline.save_pretrained(folder)
        run.write_json(folder / "sampler.json", asdict(replace(self.sampler, model=".", controlnet="")))
