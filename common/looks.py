"""What a judge is shown of a cohort: turned, flipped, in another order of colors; and the features of it."""
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common import mllm, sharding
from common.cohorts import Cohort
from common.mllm import Judge

CHANNEL_ORDERS = [list(order) for order in itertools.permutations(range(3))]


@dataclass
class Images:                           # what a judge is shown of a cohort: LR, candidate 1..C
    pixels: Tensor                      # [patches, 3 * 2 * p * p]
    grids: Tensor                       # [1 + C, 3]
    features: dict = field(default_factory=dict)    # by vision tower (its id), of frozen ones: 1 + C tensors


def turned(image: np.ndarray, look: int) -> np.ndarray:
    """The image in one of 48 ways: 0 as it is, below 4 in quarter turns, below 8 flipped, from 8 in other colors."""
    channels, turn = CHANNEL_ORDERS[look // 8], look % 8
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if turn & 4 else image, turn & 3)[..., channels])


def look_at(judge: Judge, cohort: Cohort, look: int) -> Images:
    """All of the cohort's images turned alike; labels are taken to stay as they are."""
    return Images(*mllm.pixel_patches(judge, [[turned(image, look) for image in [cohort.lr, *cohort.images]]]))


def encode(judge: Judge, images: list[Images]) -> tuple[list[Tensor], Tensor]:
    """
    Features and grids of LR, candidate 1..C, LR, candidate 1..C, ..: [cohorts * (1 + C)].

    A vision tower that does not train sees the same images once: rollout, reference and policy share what it found.
    One in shards sees them each time, as all ranks must make the same passes.
    """
    tower, grids = id(judge.net.model.visual), torch.cat([own.grids for own in images])
    if not all(tower in own.features for own in images):
        features = mllm.patch_features(judge, torch.cat([own.pixels for own in images]), grids)
        if mllm.tower_trained(judge) or sharding.units(judge):
            return features, grids
        found = iter(features)
        for own in images:
            own.features[tower] = [next(found) for _ in own.grids]
    return [feature for own in images for feature in own.features[tower]], grids


def encode_images(judge: Judge, cohorts: list[Cohort], looks: list[int]) -> tuple[list[Tensor], Tensor]:
    return encode(judge, [look_at(judge, cohort, look) for cohort, look in zip(cohorts, looks)])
