"""
Published super-resolution pipelines of diffusers as policies (see sr_policy.py): loading, sampling, LoRA, saving.

    ldm         LDMSuperResolutionPipeline, e.g. CompVis/ldm-super-resolution-4x-openimages: the UNet sees LR.
    upscaler    StableDiffusionUpscalePipeline, e.g. stabilityai/stable-diffusion-x4-upscaler: the UNet sees LR with
                noise of a level that it is given as class label, and a text, by default the empty one.
    sd3         StableDiffusion3ControlNetPipeline, e.g. stabilityai/stable-diffusion-3-medium-diffusers with the
                ControlNet InstantX/SD3-Controlnet-Tile. A flow model: x = (1 - sigma) clean + sigma noise, and the
                transformer predicts noise - clean. LR is enlarged to the size of SR (bicubic, as Pillow does it) and
                encoded; the ControlNet turns that into what it adds to the transformer's blocks. One text for all.

No guidance (CFG 1). Sampling is on the model's own schedule; with eta 0 it is what the pipeline does (ldm and upscaler:
with a DDIMScheduler). Only the UNet or transformer is trained. All weights and arithmetic are float32 (in half
precision the autoencoder of the upscaler overflows), but CUDA may round the factors of products to TF32; before it
trains, 04 checks that log-probabilities in sampling and training agree in spite of that.

Shapes: B samples, C latent channels, h w size of the latent (ldm, upscaler: LR's; sd3: SR's divided by 8), H = s * LR's
height, W size of SR, T denoising steps.
Sources: LDM arXiv 2112.10752 section 4.4; noise on LR as augmentation arXiv 2106.15282; SD3 arXiv 2403.03206;
ControlNet arXiv 2302.05543; all pipelines as in diffusers 0.42.
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from common import dist, run, sr_policy
from common.config import fail
from common.images import to_pixels
from common.sr_policy import Policy
from common.training import merged

PIPELINES = {"ldm": "LDMSuperResolutionPipeline", "upscaler": "StableDiffusionUpscalePipeline",
             "sd3": "StableDiffusion3ControlNetPipeline"}
# attention, as in DDPO arXiv 2305.13301; the add_ ones, of the text in the transformer of sd3, as in Flow-GRPO's code
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass(frozen=True)
class Published:
    """A published model and how it is sampled: sampler.json in the policy's folder."""
    policy: str                     # a key of PIPELINES
    model: str                      # hub id or folder of the pipeline; in the file, "." is the file's own folder
    scale: int                      # s
    steps: int                      # T
    noise_level: int = 0            # upscaler: training time step up to which LR gets noise
    controlnet: str = ""            # sd3: hub id or folder; none: the one in the pipeline's own folder
    prompt: str = ""                # upscaler, sd3: the text that the network sees


# load and save ---------------------------------------------------------------------------------------------------

def load_policy(folder: Path, device: torch.device) -> "Policy | LatentPolicy | FlowPolicy":
    """
    The frozen policy in a folder, of any kind, or one line that says what is wrong with it.

    folder: of a policy (it has a sampler.json), or of a finished stage 04, whose tuned policy it then is.
    """
    folder = Path(folder)
    folder = folder / "policy" if (folder / "policy" / "sampler.json").exists() else folder
    if "policy" not in run.read_json(folder / "sampler.json"):
        return sr_policy.load_small(folder, device)
    sampler = sr_policy.read_sampler(Published, folder)
    sampler = replace(sampler, model=str(folder)) if sampler.model == "." else sampler
    kind = FlowPolicy if sampler.policy == "sd3" else LatentPolicy
    dist.allow_tf32(True)
    return kind(load_pipeline(sampler), sampler).to(device).eval().requires_grad_(False)


def point_to(folder: Path, sampler: Published) -> None:
    """Write sampler.json only: the policy of `folder` is the published model itself. Every rank calls it."""
    if dist.is_main():
        folder.mkdir(exist_ok=True)
        model, controlnet = (str(Path(name).resolve()) if name and Path(name).exists() else name
                             for name in (sampler.model, sampler.controlnet))
        run.write_json(folder / "sampler.json", asdict(replace(sampler, model=model, controlnet=controlnet)))
    dist.barrier()


def load_pipeline(sampler: Published):
    """
    The diffusers pipeline sampler.model, float32 on the CPU, or one line that says why it cannot be a policy. Of sd3
    the main rank alone holds the text encoders, as each rank's 20 GB of T5 would add up in the memory of a machine.
    """
    from diffusers import DiffusionPipeline, SD3ControlNetModel, StableDiffusion3ControlNetPipeline  # slow to import
    model, kind, parts = sampler.model, DiffusionPipeline, {}
    if sampler.controlnet:
        parts["controlnet"] = from_pretrained(SD3ControlNetModel, sampler.controlnet, "controlnet")
    if sampler.policy == "sd3":
        kind = StableDiffusion3ControlNetPipeline
        for name in (f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")):
            if not dist.is_main() or not has_part(model, name):         # T5 may be missing
                parts[name] = None
    pipeline = from_pretrained(kind, model, "model", **parts)
    if type(pipeline).__name__ != PIPELINES[sampler.policy]:
        fail(f"model: {model} is a {type(pipeline).__name__}; policy={sampler.policy} needs a "
             f"{PIPELINES[sampler.policy]}")
    schedule = pipeline.scheduler.config
    predicts = schedule.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        fail(f"model: {model} predicts {predicts}, not epsilon or v_prediction")
    if schedule.get("thresholding", False):
        fail(f"model: {model} thresholds its clean latents")
    if sampler.policy == "sd3":
        if pipeline.controlnet.config.extra_conditioning_channels:
            fail(f"model: {model} has a ControlNet for inpainting")
        return pipeline
    vae = pipeline.vqvae if sampler.policy == "ldm" else pipeline.vae
    enlarges = 2 ** (len(vae.config.block_out_channels) - 1)
    if enlarges != sampler.scale:
        fail(f"model: {model} enlarges by {enlarges}, the images of stage 01 need {sampler.scale}")
    highest = pipeline.config.get("max_noise_level", sampler.noise_level)
    if sampler.noise_level > highest:
        fail(f"model: {model} takes noise_level up to {highest}, not {sampler.noise_level}")
    return pipeline


def from_pretrained(kind: type, model: str, key: str, **parts):
    """kind.from_pretrained: weights as float32, safetensors only; or one line that says why not."""
    try:
        return kind.from_pretrained(model, use_safetensors=True, dtype=torch.float32, **parts)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{key}: {model} cannot be loaded by diffusers (safetensors only): {' '.join(str(error).split())}")


def has_part(model: str, name: str) -> bool:
    """Whether the pipeline's model_index.json names a class for this part."""
    from diffusers import DiffusionPipeline                             # slow to import
    try:
        return any(DiffusionPipeline.load_config(model).get(name) or [])
    except (OSError, ValueError) as error:
        fail(f"model: {model} cannot be loaded by diffusers: {' '.join(str(error).split())}")


def save_lora(network: nn.Module, part: str, folder: Path) -> None:
    """Write what `load_lora_weights(folder)` of diffusers reads, for the pipeline's `part` (unet or transformer)."""
    if not isinstance(network, PeftModel):
        return
    settings, weights = network.peft_config["default"], {}
    for name, weight in get_peft_model_state_dict(network).items():
        scale = settings.lora_alpha / settings.r if "lora_B" in name else 1.0       # diffusers takes alpha = rank
        weights[name.replace("base_model.model", part, 1)] = (scale * weight).detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


# ldm and upscaler ------------------------------------------------------------------------------------------------

class LatentPolicy(nn.Module):
    """UNet, autoencoder and schedule of a pipeline. `unet` may be wrapped by peft."""
    lora_layers, map = LORA_LAYERS, None

    def __init__(self, pipeline, sampler: Published):
        super().__init__()
        self.kind, self.sampler = sampler.policy, sampler
        self.unet, self.vae = pipeline.unet, pipeline.vqvae if self.kind == "ldm" else pipeline.vae
        self.channels = self.unet.config.out_channels
        self.multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.unit = 1.0 if self.kind == "ldm" else self.vae.config.scaling_factor   # latents are multiplied by it
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        count, spacing = scheduler.config.num_train_timesteps, scheduler.config.timestep_spacing
        if count % sampler.steps:
            fail(f"model: {sampler.model} has {count} time steps, which denoise_steps={sampler.steps} should divide")
        if spacing not in ("leading", "trailing"):
            fail(f"model: {sampler.model} has timestep_spacing {spacing}, not leading or trailing")
        scheduler.set_timesteps(sampler.steps)
        self.predicts = scheduler.config.prediction_type
        self.limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        times = scheduler.timesteps.long()
        power = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod[None]])           # [T + 1]
        constants = {"times": times, "levels": sr_policy.diffusion_levels(power)}
        if self.kind == "upscaler":
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
        if self.kind == "ldm":
            return 2 * lr - 1
        noise = sr_policy.draw_noise([(*key, "lr") for key in keys], lr.shape[1:], lr.device)
        return self.lr_signal.sqrt() * (2 * lr - 1) + (1 - self.lr_signal).sqrt() * noise

    def output(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """Output of the UNet [B, C, h, w], float32, for a noisy latent x [B, C, h, w] at training time steps [B]."""
        both = torch.cat([x, seen], 1)
        if self.kind == "ldm":
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
        """Clean latent [B, C, h, w] -> SR [B, 3, H, W] in 0..1; `seen` is not needed here."""
        return (self.vae.decode(latent / self.unit).sample / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """A whole pipeline that diffusers loads, LoRA merged and DDIM as scheduler; upscaler: LoRA by itself, too."""
        if self.kind == "upscaler":                                     # the other pipeline could not load it
            save_lora(self.unet, "unet", folder)
        self.unet, pipeline = merged(self.unet), load_pipeline(self.sampler)
        pipeline.register_modules(unet=self.unet, scheduler=DDIMScheduler.from_config(pipeline.scheduler.config))
        pipeline.save_pretrained(folder)
        run.write_json(folder / "sampler.json", asdict(replace(self.sampler, model=".")))       # last: it is whole


# sd3 -------------------------------------------------------------------------------------------------------------

class FlowPolicy(nn.Module):
    """Transformer, ControlNet, autoencoder and text of a StableDiffusion3ControlNetPipeline."""
    kind, lora_layers, map = "sd3", LORA_LAYERS, None

    def __init__(self, pipeline, sampler: Published):
        super().__init__()
        self.unet = pipeline.transformer            # the network that is trained, as in all policies; may have LoRA
        self.controlnet, self.vae, self.sampler = pipeline.controlnet, pipeline.vae, sampler
        settings = pipeline.transformer.config
        self.channels, side = settings.in_channels, pipeline.vae_scale_factor * settings.patch_size  # px of a token
        self.multiple, self.largest = side // math.gcd(side, sampler.scale), side * settings.pos_embed_max_size
        self.unpooled = self.controlnet.config.force_zeros_for_pooled_projection    # InstantX: no pooled text, no shift
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        if scheduler.config.use_dynamic_shifting or scheduler.config.invert_sigmas:
            fail(f"model: {sampler.model} shifts its noise levels with the size of the image, or counts them from "
                 "clean to noise; give another model")
        scheduler.set_timesteps(sampler.steps)
        text, pooled = encode_prompt(pipeline, sampler.prompt)
        constants = {"levels": sr_policy.flow_levels(scheduler.sigmas), "text": text, "pooled": pooled,
                     "times": scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps}
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
        codes = [self.vae.encode(2 * one[None] - 1).latent_dist for one in enlarged(lr, self.sampler.scale)]    # large
        mean, std = torch.cat([code.mean for code in codes]), torch.cat([code.std for code in codes])
        noise = sr_policy.draw_noise([(*key, "lr") for key in keys], mean.shape[1:], lr.device)
        shift = 0 if self.unpooled else self.vae.config.shift_factor
        return (mean + std * noise - shift) * self.vae.config.scaling_factor

    def velocity(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """Predicted noise - clean [B, C, h, w], float32, for a state x [B, C, h, w] at times 1000 sigma [B]."""
        text, pooled = self.text.expand(len(x), -1, -1), self.pooled.expand(len(x), -1)     # [B, L, D], [B, P]
        with torch.no_grad():
            blocks = self.controlnet(
                hidden_states=x, timestep=time, controlnet_cond=seen,
                encoder_hidden_states=None if self.controlnet.config.joint_attention_dim is None else text,
                pooled_projections=torch.zeros_like(pooled) if self.unpooled else pooled)
        return self.unet(hidden_states=x, timestep=time, encoder_hidden_states=text, pooled_projections=pooled,
                         block_controlnet_hidden_states=blocks.controlnet_block_samples).sample.float()

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise, float32, in state x [B, C, h, w] before denoising step `index` [B] (0..T-1)."""
        v = self.velocity(x, self.times[index], seen)
        return sr_policy.clean_and_noise("flow", x, v, sr_policy.at(self.levels, index))

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        """Clean latent [B, C, h, w] -> SR [B, 3, H, W] in 0..1; `seen` is not needed here."""
        latent = latent / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """LoRA by itself, and a whole pipeline that diffusers loads, LoRA merged, with the ControlNet."""
        save_lora(self.unet, "transformer", folder)
        self.unet, pipeline = merged(self.unet), load_pipeline(self.sampler)
        pipeline.register_modules(transformer=self.unet)
        pipeline.save_pretrained(folder)
        run.write_json(folder / "sampler.json", asdict(replace(self.sampler, model=".", controlnet="")))


def enlarged(lr: Tensor, scale: int) -> Tensor:
    """LR [B, 3, h, w] in 0..1 at SR's size, as Pillow enlarges it (antialias)."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def encode_prompt(pipeline, prompt: str) -> tuple[Tensor, Tensor]:
    """Tokens [1, L, D] and their summary [1, P], for every rank, by the main one: it alone has the text encoders."""
    text = pooled = torch.zeros(0)
    if dist.is_main():
        text, _, pooled, _ = pipeline.encode_prompt(*[prompt] * 3, device="cpu", do_classifier_free_guidance=False)
    text, pooled = (dist.gather_rows(part.flatten()) for part in (text, pooled))        # other ranks have no rows
    return text.view(1, -1, pipeline.transformer.config.joint_attention_dim), pooled[None]


# as published ----------------------------------------------------------------------------------------------------

def by_default(sampler: Published, device: torch.device) -> Callable[[Tensor, tuple], np.ndarray]:
    """
    The published pipeline as diffusers runs it, with its own scheduler, number of steps and guidance, away from no text
    (so it acts where there is a `prompt`): a function of LR [1, 3, h, w] in 0..1 and a key of its noise that returns
    SR, uint8 [H, W, 3]. Every rank calls it.
    """
    pipeline, texts = load_pipeline(sampler), {}
    pipeline.set_progress_bar_config(disable=True)
    if sampler.policy == "sd3":                                         # the text encoders have then done their work
        for name, prompt in (("", sampler.prompt), ("negative_", "")):
            text, pooled = encode_prompt(pipeline, prompt)
            texts |= {f"{name}prompt_embeds": text.to(device), f"{name}pooled_prompt_embeds": pooled.to(device)}
        pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.text_encoder_3 = None
    elif sampler.policy == "upscaler":
        texts = {"prompt": sampler.prompt}
    pipeline.to(device)

    @torch.no_grad()
    def restore(lr: Tensor, key: tuple) -> np.ndarray:
        image = {"image": lr if sampler.policy == "upscaler" else 2 * lr - 1}
        if sampler.policy == "sd3":
            large = 2 * enlarged(lr, sampler.scale) - 1
            image = {"control_image": large, "height": large.shape[-2], "width": large.shape[-1]}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):      # some noise is of torch's own
            torch.manual_seed(run.stable_seed(*key))
            images = pipeline(**image, **texts, output_type="np").images
        return to_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
    return restore
