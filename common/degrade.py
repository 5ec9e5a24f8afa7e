"""
HR to LR: Real-ESRGAN's second-order degradation (Wang et al. 2021, arXiv 2107.10833; ranges of their training
configuration), the `light` variant of SeeSR, a `mild` one of ours, and plain `bicubic`. Own code.

`sample_params(seed, kind, scale)` returns every random choice as a JSON dict whose `steps` are in order of
work; `apply(image, params)` only computes. Differences to Real-ESRGAN: resizing is anti-aliased (theirs samples
without a filter), HR is not sharpened first, and gray Poisson noise follows the mean of R, G, B (theirs the luma).
"""
import io
import math

import numpy as np
from PIL import Image
from scipy.signal import fftconvolve
from scipy.special import j1

from common.images import resize, to_uint8

KINDS = ("realesrgan", "light", "mild", "bicubic")
SHAPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
SHAPE_ODDS = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
BETAS = {"generalized": ((0.5, 1), (1, 4)), "plateau": ((1, 1), (1, 2))}   # exponent: two ranges, equal odds
WAYS = ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))   # per pass: odds of resizing up, down, not at all
# two passes each: chance and widest sigma (px) of the blur, range of resizing, Gaussian noise sigma (of 255),
# Poisson scale, JPEG quality
PASSES = {
    "realesrgan": (
        dict(blur=1.0, sigma=3.0, resize=(0.15, 1.5), gauss=(1, 30), poisson=(0.05, 3.0), jpeg=(30, 95)),
        dict(blur=0.8, sigma=1.5, resize=(0.3, 1.2), gauss=(1, 25), poisson=(0.05, 2.5), jpeg=(30, 95))),
    "light": (
        dict(blur=1.0, sigma=3.0, resize=(0.3, 1.5), gauss=(1, 15), poisson=(0.05, 2.0), jpeg=(60, 95)),
        dict(blur=0.5, sigma=1.5, resize=(0.6, 1.2), gauss=(1, 12), poisson=(0.05, 1.0), jpeg=(60, 100))),
    # ours, for the demo: median 26 dB between a 16-px LR and its clean version; `light` leaves 23, too little
    "mild": (
        dict(blur=1.0, sigma=1.5, resize=(0.5, 1.2), gauss=(1, 6), poisson=(0.05, 0.5), jpeg=(80, 98)),
        dict(blur=0.3, sigma=0.5, resize=(0.8, 1.2), gauss=(1, 4), poisson=(0.05, 0.3), jpeg=(90, 100))),
}
LAST_CUTOFF = {"realesrgan": math.pi / 3, "light": math.pi / 3, "mild": 0.6 * math.pi}   # radians per px


def sample_params(seed: int, kind: str, scale: int) -> dict:
    """Every random choice of one degradation: JSON {kind, scale, steps}. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"degradation kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "bicubic":
        return {"kind": kind, "scale": scale, "steps": [{"op": "resize", "part": 1 / scale, "mode": kind}]}
    rng = np.random.default_rng(seed)
    first = sample_pass(rng, PASSES[kind][0], WAYS[0], part=1.0)
    *second, jpeg_step = sample_pass(rng, PASSES[kind][1], WAYS[1], part=1 / scale)
    final = [resize_step(rng, 1 / scale)]
    if rng.random() < 0.8:
        final.append(sinc_step(rng, 2 * int(rng.integers(3, 11)) + 1, LAST_CUTOFF[kind]))
    # half of the time the last compression comes before the final resize and sinc filter
    final = final + [jpeg_step] if rng.random() < 0.5 else [jpeg_step] + final
    return {"kind": kind, "scale": scale, "steps": first + second + final}


def sample_pass(rng: np.random.Generator, table: dict, ways: tuple, *, part: float) -> list[dict]:
    """Blur, resize, noise and JPEG of one pass; part: the size, as a part of HR, that resizing refers to."""
    steps = [blur_step(rng, table["sigma"])] if rng.random() < table["blur"] else []
    low, high = table["resize"]
    factor = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[rng.choice(3, p=ways)]
    steps.append(resize_step(rng, part * factor))
    gaussian, gray = rng.random() < 0.5, rng.random() < 0.4
    amount = rng.uniform(*table["gauss"]) / 255 if gaussian else rng.uniform(*table["poisson"])
    steps.append({"op": "noise", "type": "gaussian" if gaussian else "poisson", "amount": float(amount),
                  "gray": bool(gray), "seed": int(rng.integers(2**32))})
    return steps + [{"op": "jpeg", "quality": int(rng.integers(table["jpeg"][0], table["jpeg"][1] + 1))}]


def blur_step(rng: np.random.Generator, sigma_max: float) -> dict:
    size = 2 * int(rng.integers(3, 11)) + 1                                # 7..21 px
    if rng.random() < 0.1:
        return sinc_step(rng, size, math.pi / 3 if size < 13 else math.pi / 5)
    shape = SHAPES[rng.choice(6, p=SHAPE_ODDS)]
    sigma_x, sigma_y, angle = *rng.uniform(0.2, sigma_max, size=2), rng.uniform(-math.pi, math.pi)
    if not shape.endswith("aniso"):
        sigma_y, angle = sigma_x, 0.0
    beta = rng.uniform(*BETAS.get(shape.split("_")[0], ((1, 1), (1, 1)))[rng.integers(2)])
    return {"op": "blur", "shape": shape, "size": size, "sigma_x": float(sigma_x), "sigma_y": float(sigma_y),
            "angle": float(angle), "beta": float(beta)}


def sinc_step(rng: np.random.Generator, size: int, lowest: float) -> dict:
    return {"op": "blur", "shape": "sinc", "size": size, "cutoff": float(rng.uniform(lowest, math.pi))}


def resize_step(rng: np.random.Generator, part: float) -> dict:
    return {"op": "resize", "part": float(part), "mode": ("area", "bilinear", "bicubic")[rng.integers(3)]}


def kernel(step: dict) -> np.ndarray:
    """Kernel [size, size] of a `blur` step, sum 1."""
    half = step["size"] // 2
    y, x = np.mgrid[-half:half + 1, -half:half + 1].astype(np.float64)
    if step["shape"] == "sinc":
        radius, cutoff = np.hypot(x, y), step["cutoff"]
        radius[half, half] = 1.0                                       # replaced below by the limit r -> 0
        weights = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
        weights[half, half] = cutoff**2 / (4 * math.pi)
        return weights / weights.sum()
    cos, sin = math.cos(step["angle"]), math.sin(step["angle"])
    along, across = (cos * x + sin * y) / step["sigma_x"], (-sin * x + cos * y) / step["sigma_y"]
    power = (along**2 + across**2) ** step["beta"]                         # (x^T Sigma^-1 x)^beta
    weights = 1 / (1 + power) if step["shape"].startswith("plateau") else np.exp(-0.5 * power)
    return weights / weights.sum()


def blur(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Filter [H, W, 3] with a symmetric kernel, reflecting at the border."""
    half = weights.shape[0] // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="reflect")
    return fftconvolve(padded, weights[..., None], mode="valid", axes=(0, 1)).astype(np.float32)


def noise(image: np.ndarray, step: dict) -> np.ndarray:
    """Gaussian (amount: sigma of 1) or Poisson (amount: scale) noise, the same for all channels if gray."""
    rng = np.random.default_rng(step["seed"])
    base = image.mean(axis=2, keepdims=True) if step["gray"] else image
    if step["type"] == "gaussian":
        added = rng.standard_normal(base.shape) * step["amount"]
    else:
        base = np.round(base.clip(0, 1) * 255) / 255
        levels = 2 ** math.ceil(math.log2(max(len(np.unique(base)), 2)))
        added = (rng.poisson(base * levels) / levels - base) * step["amount"]
    return (image + added).clip(0, 1).astype(np.float32)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress float [H, W, 3] with 4:2:0 color and decode it again."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer), dtype=np.float32) / 255


def apply(image: np.ndarray, params: dict) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [H/scale, W/scale, 3]; no randomness. H and W are multiples of the scale."""
    height, width = image.shape[:2]
    assert height % params["scale"] == 0 and width % params["scale"] == 0, (image.shape, params["scale"])
    x = image.astype(np.float32) / 255
    for step in params["steps"]:
        if step["op"] == "resize":
            x = resize(x, tuple(max(1, round(side * step["part"])) for side in (width, height)), step["mode"])
        elif step["op"] == "blur":
            x = blur(x, kernel(step))
        elif step["op"] == "noise":
            x = noise(x, step)
        else:
            x = jpeg(x, step["quality"])
    return to_uint8(x)
