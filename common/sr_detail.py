"""
What bicubic up-sampling leaves out of a photograph, in units of LR's contrast: the latent space of the pixel policy.

Shapes: B images, C = s^2 channels of a pixel-unshuffled patch, h w size of LR, H W = s h, s w size of HR and SR.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)        # ITU-R BT.601
CONTRAST_FLOOR = 2 / 255            # about the noise of an 8-bit JPEG
CONDITION_CHANNELS = 7              # of condition()


def luma(image: Tensor) -> Tensor:
    """[B, 3, h, w] -> [B, 1, h, w]."""
    return (image * image.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def upsample(lr: Tensor, scale: int) -> Tensor:
    """Bicubic [B, 3, h, w] -> [B, 3, H, W]; may overshoot 0..1."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", align_corners=False)


def local_mean(image: Tensor) -> Tensor:
    """Mean of 3 x 3 px, same size."""
    return F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)


def contrast(lr: Tensor) -> Tensor:
    """Standard deviation of luma in 3 x 3 px of LR [B, 3, h, w], with a floor: [B, 1, h, w]."""
    y = luma(lr)
    return ((local_mean(y ** 2) - local_mean(y) ** 2).clamp(min=0) + CONTRAST_FLOOR ** 2).sqrt()


def detail_patches(hr: Tensor, lr: Tensor, power: float) -> Tensor:
    """Luma detail of HR [B, 3, H, W] in units of contrast(LR) ** power, pixel-unshuffled: [B, C, h, w]."""
    scale = hr.shape[-1] // lr.shape[-1]
    return F.pixel_unshuffle(luma(hr - upsample(lr, scale)), scale) / contrast(lr) ** power


def condition(lr: Tensor) -> Tensor:
    """[B, 7, h, w], what the UNet sees of LR [B, 3, h, w]: LR, its fine structure enlarged, its log contrast."""
    spread = contrast(lr)
    return torch.cat([2 * lr - 1, (lr - local_mean(lr)) / spread, spread.log() + 3], 1)
