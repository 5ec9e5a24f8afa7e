"""
Colors of an SR image from LR: a latent diffusion model may shift them, and people see that first.

Images are [1, 3, H, W] in 0..1, `soft` is LR up-sampled to the size of SR. Sources: AdaIN arXiv 1703.06868 eq. 8; the
wavelet way as StableSR, arXiv 2305.07015, describes it: high frequencies of SR, low ones of LR.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from common.sr_policy import Sampler

KINDS = ("auto", "none", "adain", "wavelet")
LEVELS = 5                              # of the a-trous wavelet: low means wider than about 2 ** 5 px of SR


def default_of(policy) -> str:
    """What `auto` is: none for the pixel policy, whose color is bicubic's; wavelet where an autoencoder paints."""
    return "none" if isinstance(policy.sampler, Sampler) else "wavelet"


def adain(image: Tensor, soft: Tensor) -> Tensor:
    """SR with the mean and standard deviation that each channel of LR has over the whole image."""
    (std, mean), (wanted_std, wanted_mean) = (torch.std_mean(x, (2, 3), correction=0, keepdim=True)
                                              for x in (image, soft))
    return (image - mean) / std.clamp(min=1e-5) * wanted_std + wanted_mean


def low_frequencies(image: Tensor) -> Tensor:
    """What LEVELS passes of the kernel (1, 2, 1) / 4, each twice as wide as the last, leave; borders are repeated."""
    kernel = image.new_tensor([0.25, 0.5, 0.25])
    for level in range(LEVELS):
        step = 2 ** level
        for shape, padding in (((1, 1, 1, 3), (step, step, 0, 0)), ((1, 1, 3, 1), (0, 0, step, step))):
            padded = F.pad(image, padding, mode="replicate")
            weight = kernel.reshape(shape).expand(3, 1, -1, -1).contiguous()
            image = F.conv2d(padded, weight, dilation=step, groups=3)
    return image


def wavelet(image: Tensor, soft: Tensor) -> Tensor:
    """SR with the low frequencies of LR."""
    return image + low_frequencies(soft - image)


def fix(image: Tensor, soft: Tensor, kind: str) -> Tensor:
    """The image with its colors fixed, in 0..1; kind: none, adain or wavelet."""
    if kind == "none":
        return image
    return torch.clamp((adain if kind == "adain" else wavelet)(image, soft), 0, 1)
