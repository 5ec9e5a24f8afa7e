"""What the vision tower is shown of a group [LR, candidate 1, .., candidate C]; images are uint8 [H, W, 3]."""
import numpy as np
from torch import Tensor

from common import metrics


def detail_mosaic(image: np.ndarray, processor) -> np.ndarray:
    """
    An image of at least twice the processor's pixel budget as 2 x 2 tiles that together fit the budget: the whole
    image, shrunk, and three places at full resolution, a quarter, a half and three quarters down in reading order.

    The places depend on the size alone, so that LR image and candidates stay aligned, and a judge without LR (stage
    03's comparison) sees the same of the candidate. Smaller images, and those too thin for tiles, stay as they are.
    """
    height, width = image.shape[:2]
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]             # pixels
    multiple, shrink = processor.patch_size * processor.merge_size, (most / (height * width)) ** 0.5 / 2
    h, w = (int(side * shrink) // multiple * multiple for side in (height, width))             # of a tile
    if height * width < 2 * most or 4 * h * w < max(least, 1):
        return image
    places = [(y, x) for y in range(0, height - h + 1, h) for x in range(0, width - w + 1, w)]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, 5).round().astype(int)[1:4]]
    tiles = [metrics.resize(image, (w, h), "bicubic"), *(image[y:y + h, x:x + w] for y, x in chosen)]
    return np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])


def pixel_patches(judge, groups: list[list[np.ndarray]]) -> tuple[Tensor, Tensor]:
    """
    What the vision tower of a mllm.Judge is fed, float32 [patches, 3 * 2 * p * p], and the patch grids [images, 3].

    The candidates of a group have one size. Qwen-VL cuts *two frames* into one patch and shows a still image twice;
    with candidate_view "clip" a candidate's first frame is the LR image: a patch holds both.
    """
    images, processor = [], judge.processor
    for lr, *shown in groups:
        height, width = shown[0].shape[:2]
        own = [lr if judge.lr_view == "native" else metrics.resize(lr, (width, height), "bicubic"), *shown]
        if judge.detail_view:
            own = [detail_mosaic(image, processor) for image in own]
        images += own
    batch = processor(images, return_tensors="pt")
    pixels, grids = batch["pixel_values"], batch["image_grid_thw"]                     # [patches, 3 * 2 * p * p]
    if judge.candidate_view == "clip":
        pixels = pixels.unflatten(1, (3, 2, -1)).clone()                               # [patches, 3, 2, p * p]
        counts, at = grids.prod(1).tolist(), 0
        for group in groups:
            n = counts[0]
            own = pixels[at:at + n * len(group)].unflatten(0, (len(group), n))         # a view
            own[1:, :, :, 0] = own[:1, :, :, 0]                                        # first frame: the LR image
            counts, at = counts[len(group):], at + n * len(group)
        pixels = pixels.flatten(1)
    return pixels, grids
