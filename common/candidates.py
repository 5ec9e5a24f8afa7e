"""
Super-resolution candidates with a known fault, made from the ground truth or from the LR image.

Each function takes float images [H, W, 3] in 0..1 and a generator and returns (image, record); record holds the
`method`, its `strength` (0 barely visible .. 1 gross, uniform: amounts are log-uniform) and amounts. Their ranges are
chosen so that the proxy scores of all methods spread alike, and the name of a method says little about its rank.
Lengths are in px of HR, whatever its size.
"""
import math

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, median_filter

from common.degrade import blur, jpeg, kernel
from common.images import resize, to_uint8
from common.metrics import down

RESAMPLERS = ("nearest", "bilinear", "bicubic", "lanczos")
POST_FILTERS = ("none", "unsharp", "median", "denoise")
INCONSISTENT = ("warp", "color_drift", "foreign", "texture")
# faults and how often each is drawn: most often what SR networks do
UNNATURAL = {"blur": 2, "smear": 3, "invented": 3, "grain": 4, "oversharpen": 2, "ringing": 1, "motion_blur": 1,
             "noise": 1, "gray_noise": 1, "jpeg": 1, "mosaic": 1}

# Hacking probes of 03: name -> axis that it hurts, what was done to HR. Fixed strengths, plainly visible at 64 px and
# inside the range that stage 01 trains on, so that a probe tests the judge and not the eye.
PROBES = {
    "oversharpened": ("naturalness", "unsharp mask: Gaussian of 1.5 px, gain 2"),
    "noisy": ("naturalness", "Gaussian noise in every channel, sigma 0.06 of 1"),
    "texture": ("consistency", "detail of another photograph on top: its luma minus a Gaussian of 4 px, std 0.12 of 1"),
    "color": ("consistency", "red x 1.15, blue x 0.85"),
    "swapped": ("consistency", "the middle quarter shows another photograph, in the colors of this one"),
    "bicubic": ("naturalness", "LR up-sampled instead")}


def amount(strength: float, low: float, high: float) -> float:
    """Log-uniform position between the mild and the gross end."""
    return float(low * (high / low) ** strength)


def smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(image, (sigma, sigma, 0), mode="reflect")


def resampled(lr: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Classical up-scaling of the LR image [h, w, 3] to size (W, H), often followed by a filter."""
    how, after = str(rng.choice(RESAMPLERS)), str(rng.choice(POST_FILTERS, p=(0.4, 0.2, 0.2, 0.2)))
    strength = float(rng.random())
    image = resize(lr, size, how)
    if after == "unsharp":
        image = image + amount(strength, 0.3, 4) * (image - smooth(image, 2.0))
    elif after == "median":
        image = median(image, 2 * round(amount(strength, 1, 4)) + 1)
    elif after == "denoise":
        image = smooth(image, amount(strength, 0.5, 3))
    method, strength = (how, 0.0) if after == "none" else (f"{how}+{after}", strength)
    return image.clip(0, 1), {"method": method, "strength": strength}


def median(image: np.ndarray, size: int) -> np.ndarray:
    return median_filter(image, (size, size, 1), mode="reflect")


def inconsistent(hr: np.ndarray, foreign: np.ndarray, rng: np.random.Generator, *,
                 strongest: float = 1.0) -> tuple[np.ndarray, dict]:
    """Natural but not what the LR image shows: moved, recolored, or with content or detail of `foreign`."""
    method, strength = str(rng.choice(INCONSISTENT)), float(strongest * rng.random())
    shape, record = hr.shape[:2], {"method": method, "strength": strength}
    if method == "warp":
        record["pixels"] = amount(strength, 1.2, 16)                        # largest shift
        width = min(shape) / rng.uniform(5, 10)
        field = gaussian_filter(rng.standard_normal((2, *shape)), (0, width, width))
        where = np.mgrid[:shape[0], :shape[1]] + field * (record["pixels"] / np.abs(field).max())
        image = np.stack([map_coordinates(hr[..., c], where, order=3, mode="mirror") for c in range(3)], 2)
    elif method == "color_drift":
        record["amount"] = amount(strength, 0.03, 0.5)
        gain, shift = (drift / np.abs(drift).max() for drift in rng.uniform(-1, 1, size=(2, 3)))
        image = hr * (1 + record["amount"] * gain) + 0.4 * record["amount"] * shift
    elif method == "foreign":
        record["area"], record["matched"] = amount(strength, 0.004, 0.5), bool(rng.random() < 0.5)
        other = match_colors(foreign, hr) if record["matched"] else foreign
        image = hr + soft_mask(shape, record["area"], rng) * (other - hr)
    else:
        record["contrast"], record["area"] = amount(strength, 0.03, 0.35), amount(rng.random(), 0.2, 1)
        gray = foreign.mean(axis=2, keepdims=True)
        detail = gray - smooth(gray, 4.0)                       # periods up to some 20 px: seen at LR size
        detail = detail * (record["contrast"] / max(float(detail.std()), 0.02))
        image = hr + soft_mask(shape, record["area"], rng) * detail
    return image.clip(0, 1).astype(np.float32), record


def soft_mask(shape: tuple[int, int], area: float, rng: np.random.Generator) -> np.ndarray:
    """[H, W, 1] in 0..1: random blobs that cover the given share of the image, their edges 2 px soft."""
    field = gaussian_filter(rng.standard_normal(shape), min(shape) / 8, mode="reflect")
    hard = (field >= np.quantile(field, 1 - area)).astype(np.float32)
    return gaussian_filter(hard, 2.0, mode="reflect")[..., None]


def match_colors(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Give each channel of `image` the mean of `like` and, as far as a factor of 2 reaches, its spread."""
    gain = np.clip(like.std((0, 1)) / np.maximum(image.std((0, 1)), 1e-3), 0.5, 2)
    return (image - image.mean((0, 1))) * gain + like.mean((0, 1))


def unnatural(natural: np.ndarray, foreign: np.ndarray, scale: int, rng: np.random.Generator, *,
              strongest: float = 1.0) -> tuple[np.ndarray, dict]:
    """A fault that no photograph has; what it changes at LR size is put back, so that consistency is kept."""
    image, record = add_fault(natural, foreign, strongest * float(rng.random()), rng)
    lost = (down(natural, scale) - down(image, scale)).astype(np.float32)
    image = image + resize(lost, natural.shape[1::-1], "bicubic")
    return image.clip(0, 1).astype(np.float32), record


def add_fault(image: np.ndarray, foreign: np.ndarray, strength: float,
              rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """One of UNNATURAL at the given strength; `value` is its amount. Some take detail of `foreign`."""
    method = str(rng.choice(list(UNNATURAL), p=np.array(list(UNNATURAL.values())) / sum(UNNATURAL.values())))
    if method == "blur":
        value = amount(strength, 0.4, 3)                                      # sigma, px
        image = smooth(image, value)
    elif method == "motion_blur":
        value = amount(strength, 1.5, 12)                                     # length, px
        image = blur(image, line_kernel(value, rng.uniform(0, math.pi)))
    elif method == "ringing":
        value = amount(strength, 0.8, 0.22) * math.pi                         # cutoff, radians per px
        image = blur(image, kernel({"shape": "sinc", "size": 21, "cutoff": value}))
    elif method == "oversharpen":
        value = amount(strength, 0.15, 3.5)                                   # gain
        image = image + value * (image - smooth(image, float(rng.uniform(0.8, 2))))
    elif method in ("noise", "gray_noise"):
        value = amount(strength, 0.008, 0.1)                                  # sigma, of 1
        image = image + value * rng.standard_normal((*image.shape[:2], 3 if method == "noise" else 1))
    elif method == "jpeg":
        value = round(amount(strength, 30, 3))                                # quality
        image = jpeg(image, value)
    elif method == "mosaic":
        value, block = amount(strength, 0.25, 1), int(rng.integers(3, 7))     # opacity, px
        small = resize(image, tuple(math.ceil(side / block) for side in image.shape[1::-1]), "area")
        image = image + value * (resize(small, image.shape[1::-1], "nearest") - image)
    elif method == "invented":                                               # detail of another photograph
        value, width = amount(strength, 0.1, 1), float(rng.uniform(0.7, 2))
        own, other = image - smooth(image, width), foreign - smooth(foreign, width)
        ours, theirs = (smooth((detail ** 2).mean(2, keepdims=True), 4) ** 0.5 for detail in (own, other))
        image = image + value * (other * np.clip(ours / (theirs + 0.01), 0, 4) - own)
    elif method == "grain":                                                  # what weak generative SR invents
        value, channels = amount(strength, 0.2, 1.6), int(rng.choice((1, 3)))
        contrast = np.sqrt(smooth((image - smooth(image, 3)) ** 2, 4).mean(2, keepdims=True))
        speckle = smooth(rng.standard_normal((*image.shape[:2], channels)), float(rng.uniform(0.4, 1.4)))
        image = smooth(image, 0.4 + 1.6 * strength) + value * contrast * speckle / speckle.std()
    else:                                                                     # smear: oil paint
        value, size = amount(strength, 0.25, 1), 2 * int(rng.integers(2, 6)) + 1
        image = image + value * (median(image, size) - image)
    return image.clip(0, 1), {"method": method, "strength": strength, "value": float(value)}


def painted(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Crisp edges around flat areas, as SR networks trained with a GAN draw them, and the strength: a shock filter."""
    strength, width, rounds = float(rng.random()), rng.uniform(1, 2.2), int(rng.integers(1, 4))
    for _ in range(rounds):
        gain = amount(strength, 0.4, 3) / math.sqrt(rounds)
        image = (image + gain * (image - smooth(image, width))).clip(0, 1)
        if rng.random() < 0.75:
            image = median(image, int(rng.choice((3, 3, 5))))
    return image, strength


def line_kernel(length: float, angle: float) -> np.ndarray:
    """Motion along a line: [size, size], sum 1, symmetric about its center."""
    half = math.ceil(length / 2) + 1
    y, x = np.mgrid[-half:half + 1, -half:half + 1].astype(np.float64)
    along, across = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    weights = np.clip(length / 2 + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    return weights / weights.sum()


def tamper(hr: np.ndarray, lr: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """One uint8 image per entry of PROBES, in its order, of an HR image, its LR image and another HR image."""
    (height, width), image = hr.shape[:2], hr / 255.0
    other = other if other.shape == hr.shape else resize(other, (width, height), "bicubic")
    foreign = other / 255.0
    gray = foreign.mean(axis=2, keepdims=True)
    detail = gray - smooth(gray, 4.0)
    top, left = height // 4, width // 4
    swapped = image.copy()
    inside = slice(top, top + height // 2), slice(left, left + width // 2)
    swapped[inside] = match_colors(foreign, image)[inside]
    changed = (image + 2 * (image - smooth(image, 1.5)),
               image + 0.06 * rng.standard_normal(image.shape),
               image + 0.12 / max(float(detail.std()), 0.02) * detail,
               image * np.array([1.15, 1.0, 0.85]),
               swapped)
    return [*map(to_uint8, changed), resize(lr, (width, height), "bicubic")]
