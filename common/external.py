"""SR candidates of pretrained models that diffusers or transformers load (`hf:NAME=MODEL` in stage 01)."""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import dist, run
from common.config import fail
from common.images import read_image, write_png

Restore = Callable[[list[np.ndarray], list[torch.Generator]], list[np.ndarray]]


def restore_folder(model: str, lr_folder: Path, out: Path, *, names: list[str], steps: int, seed: int, batch: int = 1,
                   options: dict | None = None) -> None:
    """
    Write out/<name>.png for this rank's share of lr_folder/<name>.png that has none yet, on the GPU if there is one.

    model: a folder or hub id with model_index.json (diffusers pipeline) or config.json (transformers
    image-to-image model), weights as safetensors. steps: denoising steps of a pipeline. options: {steps, guidance,
    prompt, seeds: number of the seed}; a network takes none but the prompt, which it does not see. Ranks share the
    names by turns; what lies there is kept. An image depends on (seed, model, options, name) only: its noise is its
    own, and a short batch is filled up, so that all have one shape (another `batch` may round differently).
    """
    given = sorted(set(options or {}) - {"prompt"})
    options = {"steps": steps, "guidance": 1.0, "prompt": "", "seeds": 1} | (options or {})
    left = [name for name in names[dist.rank()::dist.world_size()] if not (out / f"{name}.png").exists()]
    if not left:
        return
    out.mkdir(parents=True, exist_ok=True)
    restore = load(model, options, given)
    for start in tqdm(range(0, len(left), batch), desc=out.name, mininterval=1, disable=not dist.is_main()):
        part = left[start:start + batch]
        full = part + part[-1:] * (batch - len(part))
        more = [options["seeds"]] if options["seeds"] > 1 else []
        generators = [run.generator(seed, "hf", model, name, *more) for name in full]
        images = restore([read_image(lr_folder / f"{name}.png") for name in full], generators)
        for name, image in zip(part, images):
            write_png(out / f"{name}.png", image)


def load(model: str, options: dict, given: list[str]) -> Restore:
    """The model as a function of LR images; given: options that the user has set."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if has_pipeline(model):
        return load_pipeline(model, device, options)
    if given:
        fail(f"candidates: hf: {model} is a network without randomness: remove {' and '.join(given)} of it")
    return load_network(model, device)


def has_pipeline(model: str) -> bool:
    """Whether diffusers finds a model_index.json there; stops when there is nothing at all."""
    from diffusers import DiffusionPipeline                 # slow to import: only runs with an hf: source pay
    try:
        DiffusionPipeline.load_config(model)
        return True
    except OSError:
        if Path(model).exists() and not (Path(model) / "config.json").exists():
            fail(f"candidates: hf: {model} holds neither model_index.json (diffusers) nor config.json "
                     "(transformers): give the folder of a saved model")
        return False


def load_pipeline(model: str, device: torch.device, options: dict) -> Restore:
    """A diffusers SR pipeline, without or with a text encoder."""
    from diffusers import DiffusionPipeline, LDMSuperResolutionPipeline, StableDiffusionUpscalePipeline
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True).to(device)
    except (OSError, ValueError) as error:
        fail(f"candidates: hf: {model} cannot be loaded by diffusers (safetensors only): {error}")
    pipeline.set_progress_bar_config(disable=True)
    with_text = isinstance(pipeline, StableDiffusionUpscalePipeline)
    if not with_text and not isinstance(pipeline, LDMSuperResolutionPipeline):
        fail(f"candidates: hf: {model} is a {type(pipeline).__name__}; supported are "
                 "LDMSuperResolutionPipeline and StableDiffusionUpscalePipeline")
    if not with_text and options["guidance"] != 1:
        fail(f"candidates: hf: {model} sees no text: remove guidance of it")

    def restore(lrs: list[np.ndarray], generators: list[torch.Generator]) -> list[np.ndarray]:
        settings = {"num_inference_steps": options["steps"], "generator": generators}
        if with_text:
            images = pipeline(prompt=[options["prompt"]] * len(lrs), image=[Image.fromarray(lr) for lr in lrs],
                              guidance_scale=options["guidance"], **settings).images
        else:
            height, width = lrs[0].shape[:2]
            if height % 32 or width % 32:
                fail(f"candidates: hf: {model} needs LR images in multiples of 32 px, these are {width}x{height}: "
                         "choose hr_size and scale so")
            images = pipeline(image=pixels(lrs) * 2 - 1, **settings).images
        return [np.array(image.convert("RGB")) for image in images]
    return restore


def pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 [h, w, 3] each -> float32 [B, 3, h, w] in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)


def load_network(model: str, device: torch.device) -> Restore:
    """A transformers image-to-image model such as Swin2SR, which pads its input by itself."""
    from transformers import AutoModelForImageToImage
    try:
        network = AutoModelForImageToImage.from_pretrained(model, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        fail(f"candidates: hf: {model} cannot be loaded by transformers (safetensors only): {error}")

    @torch.no_grad()
    def restore(lrs: list[np.ndarray], generators: list[torch.Generator]) -> list[np.ndarray]:
        output = network(pixel_values=pixels(lrs).to(device)).reconstruction.clamp(0, 1)   # [B, 3, H, W]
        return list(output.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return restore
