"""
Images that other programs and published models make, as candidates of stage 01.

    folder:NAME=PATH                                    outputs of any SR program, matched by the name of the LR image
    hf:NAME=MODEL?seeds=2&steps=10+20&guidance=1+4      MODEL: a hub id or folder; what follows it is optional

Each combination of seed, steps and guidance is a candidate of every group. Its method is NAME, with -stepsN and
-guidanceG where these are given; seeds of one setting are the same method. Models have safetensors weights and are
diffusers' LDM or x4-upscaler pipelines, or image-to-image networks of transformers such as Swin2SR.
"""
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import candidates, dist, run
from common.config import fail
from common.images import SUFFIXES, from_pixels, read_image, to_pixels, write_png

BUILT_IN = ("hr", "resample", "inconsistent", "unnatural")      # kinds of candidates that need no model
KINDS = (*BUILT_IN, "base", "partial")      # samples of base_policy.py; between these and the ground truth
WHOLE, NUMBER = r"[1-9]\d*", r"[1-9]\d*(?:\.\d+)?"
QUERY = re.compile(rf"(?:seeds=({WHOLE}))?&?(?:steps=({WHOLE}(?:\+{WHOLE})*))?"
                   rf"&?(?:guidance=({NUMBER}(?:\+{NUMBER})*))?")      # one value, or several: 10+20
STEPS = 50                                                      # denoising steps where an entry gives none
OPTIONS = ("seed", "steps", "guidance")
BFLOAT16 = ("cuda",)                                            # devices on which UNets multiply in it


def expand(entries: list[str]) -> list[dict]:
    """
    The setting `candidates`, one dict per candidate of a group; AssertionError where an entry is not well formed.

        a|b         {kinds: [a, b]}                     one of KINDS, drawn for each group
        folder:     {method, folder}
        hf:         {method, model} and those of seed, steps, guidance that the entry gives
    """
    expanded, names = [], {*KINDS, "early", "painted", "regressor", *candidates.RESAMPLERS, *candidates.INCONSISTENT,
                           *candidates.UNNATURAL}
    for entry in entries:
        if not entry.startswith(("folder:", "hf:")):
            for kind in entry.split("|"):
                assert kind in KINDS, \
                    f"candidates: {kind!r} is none of {', '.join(KINDS)}, folder:NAME=PATH, hf:NAME=MODEL"
            expanded.append({"kinds": entry.split("|")})
            continue
        name, _, place = entry.partition(":")[2].partition("=")
        model, _, query = place.partition("?")
        assert name.isidentifier() and model, \
            f"candidates: {entry!r} should look like folder:NAME=PATH or hf:NAME=MODEL, NAME of letters, digits and _"
        assert name not in names, f"candidates: {name} is a method of our own or there twice: give it another name"
        names.add(name)
        if entry.startswith("folder:"):
            expanded.append({"method": name, "folder": place})
            continue
        match = QUERY.fullmatch(query)
        assert match, f"candidates: {entry!r}: what follows ? should look like seeds=2&steps=10+20&guidance=1+4"
        seeds, steps, guidance = match.groups()
        values = {"seed": range(1, int(seeds) + 1)} if seeds else {}
        values |= {"steps": [int(number) for number in steps.split("+")]} if steps else {}
        values |= {"guidance": [float(number) for number in guidance.split("+")]} if guidance else {}
        for combination in itertools.product(*values.values()):
            options = dict(zip(values, combination))
            more = [f"-{key}{options[key]:g}" for key in ("steps", "guidance") if key in options]
            expanded.append({"method": name + "".join(more), "model": model} | options)
    return expanded


def record(source: dict) -> dict:
    """What groups.jsonl says of a candidate of this folder: or hf: source."""
    return {key: source[key] for key in ("method", *OPTIONS) if key in source}


def folder_of(source: dict, stage: Path) -> Path:
    """The folder with the outputs of a folder: or hf: source; stage: stage 01's folder."""
    if "folder" in source:
        return Path(source["folder"])
    return stage / "external" / (source["method"] + (f"-seed{source['seed']}" if "seed" in source else ""))


def run_models(sources: list[dict], stage: Path, names: list[str], *, seed: int, prompt: str, batch: int,
               device: torch.device) -> None:
    """
    Make what the hf: sources lack for the LR images `names`, every rank its share.

    An image depends on (seed, model, options, its name) only: its noise has a generator of its own, and a short batch
    is filled up, so that all have one shape (another `batch` may round differently).
    """
    for source in sources:
        if "model" not in source:
            continue
        out = folder_of(source, stage)
        left = [name for name in names[dist.rank()::dist.world_size()] if not (out / f"{name}.png").exists()]
        if not left:
            continue
        out.mkdir(parents=True, exist_ok=True)
        restore = load_model(source, prompt, device)
        keys = [source["seed"]] if source.get("seed", 1) > 1 else []
        for start in tqdm(range(0, len(left), batch), desc=out.name, mininterval=1, disable=not dist.is_main()):
            part = left[start:start + batch]
            full = part + part[-1:] * (batch - len(part))
            generators = [run.generator(seed, "hf", source["model"], name, *keys) for name in full]
            images = restore([read_image(stage / "lr" / f"{name}.png") for name in full], generators)
            for name, image in zip(part, images):
                write_png(out / f"{name}.png", image)


def load_model(source: dict, prompt: str, device: torch.device) -> Callable:
    """The model of an hf: source: (LR images uint8 [h, w, 3], generators) -> SR images uint8 [H, W, 3]."""
    from diffusers import DiffusionPipeline, LDMSuperResolutionPipeline, StableDiffusionUpscalePipeline    # slow
    from transformers import AutoModelForImageToImage

    name, options = source["model"], [key for key in OPTIONS if key in source]
    try:
        DiffusionPipeline.load_config(name)
        library = DiffusionPipeline
    except OSError:                                         # no model_index.json there
        library = AutoModelForImageToImage
    try:
        model = library.from_pretrained(name, use_safetensors=True).to(device)
    except (OSError, ValueError) as error:
        fail(f"candidates: hf: {name} cannot be loaded by diffusers or transformers (safetensors only): {error}")
    is_network, has_text = library is AutoModelForImageToImage, isinstance(model, StableDiffusionUpscalePipeline)
    if is_network and options:
        fail(f"candidates: hf: {name} is a network without randomness: remove {' and '.join(options)} of it")
    if not is_network and not isinstance(model, (LDMSuperResolutionPipeline, StableDiffusionUpscalePipeline)):
        fail(f"candidates: hf: {name} is a {type(model).__name__}; supported are LDMSuperResolutionPipeline and "
             "StableDiffusionUpscalePipeline")
    if not has_text and source.get("guidance", 1) != 1:
        fail(f"candidates: hf: {name} sees no text: remove guidance of it")
    if is_network:
        model.eval()
    else:
        model.set_progress_bar_config(disable=True)
        if device.type in BFLOAT16:                         # not the autoencoder: it rounds pixels
            model.unet.forward = torch.autocast(device.type, torch.bfloat16)(model.unet.forward)

    @torch.no_grad()
    def restore(lrs: list[np.ndarray], generators: list[torch.Generator]) -> list[np.ndarray]:
        pixels = from_pixels(np.stack(lrs))                                                    # [B, 3, h, w]
        if is_network:
            return list(to_pixels(model(pixel_values=pixels.to(device)).reconstruction.clamp(0, 1)))
        sampling = {"num_inference_steps": source.get("steps", STEPS), "generator": generators}
        if has_text:
            images = model(prompt=[prompt] * len(lrs), image=[Image.fromarray(lr) for lr in lrs],
                           guidance_scale=source.get("guidance", 1.0), **sampling).images
        elif pixels.shape[2] % 32 or pixels.shape[3] % 32:
            fail(f"candidates: hf: {name} needs LR images in multiples of 32 px, these are "
                 f"{pixels.shape[3]}x{pixels.shape[2]}: choose hr_size and scale so")
        else:
            images = model(image=pixels * 2 - 1, **sampling).images
        return [np.array(image.convert("RGB")) for image in images]
    return restore


def output_files(sources: list[dict], stage: Path, names: list[str], scale: int) -> list[list[str | None]]:
    """Per LR image its file from each source, None for built-in ones; stops if a folder lacks outputs."""
    columns = []
    for source in sources:
        if "kinds" in source:
            columns.append([None] * len(names))
            continue
        place, by_name = folder_of(source, stage), {}
        for path in sorted(path for path in place.glob("*") if path.suffix.lower() in SUFFIXES):
            if path.stem in by_name:
                fail(f"candidates: {by_name[path.stem]} and {path.name} are both for one LR image: remove one of them")
            by_name[path.stem] = str(path)
        missing = [name for name in names if name not in by_name]
        if missing:
            fail(f"candidates: {place} lacks {len(missing)} of {len(names)} outputs (first: {missing[0]}.png). Run the "
                 f"x{scale} SR program on {stage / 'lr'}, write its outputs to {place} under the same names, then run "
                 "this command again to go on")
        columns.append([by_name[name] for name in names])
    return list(map(list, zip(*columns)))


def read_output(path: str, side: int) -> np.ndarray:
    """An image from elsewhere, uint8 [side, side, 3]; stops if it is not one."""
    try:
        image = read_image(path)
    except ValueError as error:
        fail(f"candidates: {path} cannot be read ({error}): make it again")
    if image.shape[:2] != (side, side):
        fail(f"candidates: {path} is {image.shape[1]}x{image.shape[0]}, expected {side}x{side}: make it from the LR "
             "image of that name")
    return image
