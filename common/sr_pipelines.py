"""
Published super-resolution pipelines of diffusers: loading them, their own denoising steps, and their LoRA files.

    ldm         LDMSuperResolutionPipeline, e.g. CompVis/ldm-super-resolution-4x-openimages
    upscaler    StableDiffusionUpscalePipeline, e.g. stabilityai/stable-diffusion-x4-upscaler
    sd3         StableDiffusion3ControlNetPipeline, e.g. stabilityai/stable-diffusion-3-medium-diffusers with the
                ControlNet InstantX/SD3-Controlnet-Tile
"""
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from common import dist, run
from common.config import fail

PIPELINES = {"ldm": "LDMSuperResolutionPipeline", "upscaler": "StableDiffusionUpscalePipeline",
             "sd3": "StableDiffusion3ControlNetPipeline"}
# attention, as in DDPO arXiv 2305.13301; the add_ ones, of the text in the transformer of sd3, as in Flow-GRPO's code
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass(frozen=True)
class LatentSampler:
    """sampler.json in the policy's folder."""
    policy: str                     # a key of PIPELINES
    model: str                      # hub id or folder of the pipeline; in the file, "." is the file's own folder
    scale: int                      # s
    steps: int                      # T
    noise_level: int                # upscaler: training time step up to which LR gets noise
    times: list[float] = field(default_factory=list)    # [T] falling: training time steps; of sd3 noise levels sigma
    solver: str = "euler"           # of the ODE steps: euler or dpm
    controlnet: str = ""            # sd3: hub id or folder; none: the one in the pipeline's own folder
    prompt: str = ""                # upscaler, sd3: the text that the network is told


# load ----------------------------------------------------------------------------------------------------

def read_sampler(kind: type, folder: Path):
    """The dataclass `kind` from the folder's sampler.json, or one line that says what is wrong with it."""
    saved, wanted = run.read_json(folder / "sampler.json"), [one.name for one in fields(kind)]
    if sorted(saved) != sorted(wanted):
        fail(f"{folder / 'sampler.json'}: has {', '.join(saved)}, expected {', '.join(wanted)}: written by another "
                 "version of this code? Run the stage that wrote it in a new run=")
    return kind(**saved)


def from_pretrained(kind: type, model: str, key: str, settings: dict):
    """kind.from_pretrained: weights as float32, safetensors only; or one line that says why not."""
    try:
        return kind.from_pretrained(model, **settings)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{key}: {model} cannot be loaded by diffusers (safetensors only): {' '.join(str(error).split())}")


def own_times(sampler: LatentSampler) -> list[float]:
    """The [T] times at which the pipeline's own scheduler denoises in T steps; LatentSampler says what they are."""
    is_flow, steps = sampler.policy == "sd3", sampler.steps
    kind = FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler
    scheduler = from_pretrained(kind, sampler.model, "model", {"subfolder": "scheduler"})
    settings = scheduler.config
    count, spacing = settings["num_train_timesteps"], settings.get("timestep_spacing", "leading")
    for wrong, why in (
            (not is_flow and count % steps, f"has {count} time steps, which denoise_steps={steps} should divide"),
            (not is_flow and spacing not in ("leading", "trailing"),
             f"has timestep_spacing {spacing}, not leading or trailing"),
            (is_flow and settings["use_dynamic_shifting"], "shifts its noise levels with the size of the image"),
            (is_flow and settings["invert_sigmas"], "counts its noise levels from clean to noise")):
        if wrong:
            fail(f"model: {sampler.model} {why}; give another model, or steps of your own in step_list")
    scheduler.set_timesteps(steps)
    return (scheduler.sigmas[:-1] if is_flow else scheduler.timesteps).tolist()


def has_part(model: str, name: str) -> bool:
    """Whether the pipeline's model_index.json names a class for this part."""
    from diffusers import DiffusionPipeline                             # slow to import
    try:
        return any(DiffusionPipeline.load_config(model).get(name) or [])
    except (OSError, ValueError) as error:
        fail(f"model: {model} cannot be loaded by diffusers: {' '.join(str(error).split())}")


def load_pipeline(sampler: LatentSampler):
    """
    The diffusers pipeline sampler.model, float32 on the CPU, or one line that says why it cannot be a policy. Of sd3
    the main rank alone holds the text encoders, as each rank's 20 GB of T5 would add up in the memory of a machine.
    """
    from diffusers import DiffusionPipeline, SD3ControlNetModel, StableDiffusion3ControlNetPipeline  # slow to import
    model, kind, is_flow = sampler.model, PIPELINES[sampler.policy], sampler.policy == "sd3"
    settings = {"use_safetensors": True, "dtype": torch.float32}
    parts = {"controlnet": from_pretrained(SD3ControlNetModel, sampler.controlnet, "controlnet", settings)} \
        if sampler.controlnet else {}
    if is_flow:
        texts = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
        parts |= {name: None for name in texts if not dist.is_main() or not has_part(model, name)}  # T5 may be missing
    pipeline = from_pretrained(StableDiffusion3ControlNetPipeline if is_flow else DiffusionPipeline, model, "model",
                               settings | parts)
    if type(pipeline).__name__ != kind:
        fail(f"model: {model} is a {type(pipeline).__name__}; policy={sampler.policy} needs a {kind}")
    vae = pipeline.vqvae if sampler.policy == "ldm" else pipeline.vae
    schedule, enlarges = pipeline.scheduler.config, 2 ** (len(vae.config.block_out_channels) - 1)
    predicts, highest = schedule.get("prediction_type", "epsilon"), pipeline.config.get("max_noise_level", 10 ** 6)
    first, last = max(sampler.times, default=0), 1 if is_flow else schedule["num_train_timesteps"] - 1
    for wrong, why in (
            (not is_flow and enlarges != sampler.scale,
             f"enlarges by {enlarges}, the images of stage 01 need {sampler.scale}"),
            (predicts not in ("epsilon", "v_prediction"), f"predicts {predicts}, not epsilon or v_prediction"),
            (schedule.get("thresholding", False), "thresholds its clean latents"),
            (first > last, f"denoises from {last} on, step_list from {first}"),
            (is_flow and pipeline.controlnet.config.extra_conditioning_channels, "has a ControlNet for inpainting"),
            (sampler.noise_level > highest, f"takes noise_level up to {highest}, not {sampler.noise_level}")):
        if wrong:
            fail(f"model: {model} {why}")
    return pipeline


# LoRA ----------------------------------------------------------------------------------------------------

def save_lora(network: PeftModel, part: str, folder: Path) -> None:
    """Write what `load_lora_weights(folder)` of diffusers reads, for the pipeline's `part` (unet or transformer)."""
    settings, weights = network.peft_config["default"], {}
    for name, weight in get_peft_model_state_dict(network).items():
        scale = settings.lora_alpha / settings.r if "lora_B" in name else 1.0       # diffusers takes alpha = rank
        weights[name.replace("base_model.model", part, 1)] = (scale * weight).detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
