"""
ST-LPIPS, a learned perceptual distance that forgives small shifts (arXiv 2207.13686): AlexNet features, compared.

Nothing here was trained on it and nothing optimizes it: a check of another construction than label and judge. The
authors' weights (BSD license) lie in a wheel, of which one file is read and nothing is run; no package is needed
(HOW_TO_GET).

The wheel's own network, with which this agrees, is `invariant_networks.alexnet("shift_tolerant")`: every stride is a
blur, and convolution 1 is blurred before its ReLU.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import fail

WEIGHTS = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
HOW_TO_GET = "pip download --no-deps stlpips-pytorch==0.0.2 && python -m zipfile -e stlpips_pytorch-0.0.2-*.whl stlpips"


def load(folder: str | Path, device: torch.device) -> dict[str, Tensor]:
    """The weights by their names in the unpacked wheel, or one line that says how to get it."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        fail(f"stlpips: there is no {path}: `{HOW_TO_GET}`, then stlpips=stlpips")
    return torch.load(path, map_location=device, weights_only=True)


def blurred_half(x: Tensor, kernel: Tensor) -> Tensor:
    """Every second pixel of x [B, C, h, w], blurred by the kernel [C, 1, 3, 3] and with 2 px of reflected border."""
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def features(weights: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Five maps [B, C, h, w] of images [B, 3, H, W] in 0..1 of at least 20 px, each pixel of unit length."""
    def conv(x: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(x, weights[f"net.{name}.weight"], weights[f"net.{name}.bias"], padding=padding)

    x = (2 * images - 1 - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    first = blurred_half(conv(x, "slice1.0", 2), weights["net.slice1.1.filt"]).relu()
    second = conv(blurred_half(F.max_pool2d(first, 3, 1), weights["net.slice2.4.filt"]), "slice2.5", 2).relu()
    third = conv(blurred_half(F.max_pool2d(second, 3, 1), weights["net.slice3.8.filt"]), "slice3.9", 1).relu()
    fourth = conv(third, "slice4.11", 1).relu()
    fifth = conv(fourth, "slice5.13", 1).relu()
    return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (first, second, third, fourth, fifth)]


@torch.no_grad()
def distance(weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """[B], 0 and up, lower is more alike: images a, b [B, 3, H, W] in 0..1. LPIPS's eq. 1 (arXiv 1801.03924)."""
    maps = zip(features(weights, a), features(weights, b))
    return sum(F.conv2d((x - y) ** 2, weights[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
               for i, (x, y) in enumerate(maps))
