"""Where crops come from: finding pictures, what can be used of them, their splits, their share."""
import hashlib

import numpy as np

from common import duplicates
from common.config import fail, nearest
from common.images import luma, read_image


def survey(size: int, min_detail: float, job: dict) -> dict:
    """
    {area, sha256 of the pixels, hash (see duplicates)} of the picture job["path"], or {reason} if it is
    unusable. area: px in tiles of the crop size whose luma has a standard deviation (of 255) of at least min_detail.
    """
    try:
        image = read_image(job["path"])
    except ValueError as error:
        return {"reason": str(error)}
    height, width = image.shape[:2]
    if min(height, width) < size:
        return {"reason": f"{width}x{height} is smaller than one crop of {size}x{size}"}
    rows, columns = height // size, width // size
    tiles = luma(image)[:rows * size, :columns * size].reshape(rows, size, columns, size)
    lively = int((tiles.std(axis=(1, 3)) >= min_detail).sum())
    if lively == 0:
        return {"reason": f"nearly flat everywhere (min_detail={min_detail})"}
    return {"area": lively * size**2, "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
            "hash": duplicates.dct_hash(image)}


def split_sources(names: list[str], named: dict[str, list[str]], fractions: dict[str, float], *,
                  seed: int) -> dict[str, str]:
    """
    Source name -> split. named: {"val": [...], "test": [...]}; where that is empty, fractions[split] of all
    sources (at least one, unless it is 0) in the order of a hash of seed and name. The rest is for training.
    """
    splits = {}
    for split, wanted in named.items():
        for name in wanted:
            if name not in names:
                fail(f"{split}_sources: there is no usable picture {name!r}; "
                         f"did you mean {nearest(name, names)!r}?")
            if name in splits:
                fail(f"{split}_sources: {name!r} is given twice: a picture has one split")
            splits[name] = split
    free = sorted((name for name in names if name not in splits),
                  key=lambda name: hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest())
    for split, fraction in fractions.items():
        count = max(1, round(fraction * len(names))) if fraction and not named[split] else 0
        splits |= dict.fromkeys(free[:count], split)
        free = free[count:]
    if not free:
        fail(f"{len(names)} usable picture(s) leave none for training: add some, or set val_groups=0 and "
                 "test_groups=0")
    return splits | dict.fromkeys(free, "train")


def split_families(names: list[str], near: list[dict], named: dict[str, list[str]], fractions: dict[str, float], *,
                   seed: int) -> dict[str, str]:
    """
    As split_sources, but near-duplicates share a split (that of the named one): a user with bursts of photographs
    loses none of them, and none leaks. Stops if val_sources and test_sources name near-duplicates of each other.
    """
    family = duplicates.families(names, near)
    wanted = {split: [family.get(name, name) for name in own] for split, own in named.items()}
    for name in named["val"]:
        for other in named["test"]:
            if name != other and family.get(name, name) == family.get(other, other):
                fail(f"val_sources: {name!r} looks like {other!r} of test_sources (see common/duplicates.py): put "
                         "both into the same split")
    for split, own in wanted.items():
        wanted[split] = own if len(set(named[split])) < len(own) else sorted(set(own), key=own.index)
    splits = split_sources(sorted(set(family.values())), wanted, fractions, seed=seed)
    return {name: splits[family[name]] for name in names}


def shares(photos: list[dict], count: int, cap: float) -> list[int]:
    """
    `count` groups over photos [{source, area}], in proportion to the area; what a source has above the share
    `cap` goes to the others (the cap is lifted to an equal share where there are few sources).
    """
    total = {}
    for photo in photos:
        total[photo["source"]] = total.get(photo["source"], 0) + photo["area"]
    weight = {name: area / sum(total.values()) for name, area in total.items()}
    cap = max(cap, 1 / max(1, len(total)))
    full = set()
    while any(weight[name] > cap + 1e-9 for name in weight):
        full |= {name for name in weight if weight[name] >= cap}
        rest = sum(total[name] for name in weight if name not in full)
        left = 1 - cap * len(full)
        weight = {name: cap if name in full else left * total[name] / rest for name in weight}
    ends = np.cumsum([count * weight[p["source"]] * p["area"] / total[p["source"]] for p in photos])
    return np.diff(np.round(ends), prepend=0).astype(int).tolist()
