"""A folder of LR images and folders of SR outputs: which files belong together, and which of them can be used."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import dist
from common.config import fail
from common.images import find, read_image, resize

BICUBIC = "bicubic"                     # made here, for comparison


@dataclass
class Scene:                            # one LR image and its outputs
    name: str                           # path below the folder, without suffix
    lr: Path
    outputs: dict[str, Path]            # method -> file
    size: tuple[int, int] = (0, 0)      # px of LR, once survey has looked
    scales: tuple[int, ...] = ()        # of the outputs, likewise


def named_folders(sr_dirs: list[str]) -> dict[str, Path]:
    """Method -> folder, from PATH (the method is the folder's name) or NAME=PATH; stops if two have one name."""
    found = {}
    for text in sr_dirs:
        name, _, path = text.rpartition("=")
        name = name or Path(path).resolve().name
        if name in found or name == BICUBIC:
            fail(f"sr_dirs: two methods would be called {name!r} ({BICUBIC!r} is made here): write NAME=PATH, "
                     f"e.g. sr_dirs=mine={path}")
        found[name] = Path(path)
    return found


def by_name(folder: Path, key: str) -> dict[str, Path]:
    """Name without suffix -> picture below the folder; stops if two pictures differ in their suffix only."""
    found = {}
    for name, path in find(str(folder), key):
        if name in found:
            fail(f"{key}: {found[name]} and {path} have the same name: leave one of them")
        found[name] = path
    return found


def match(lr_dir: str, methods: dict[str, Path], skip_bad: bool) -> tuple[list[Scene], list[dict]]:
    """
    The LR images with all their outputs, and {file, reason} of what has no counterpart.

    Stops at an LR image without an output unless skip_bad; an output without an LR image is only listed.
    """
    inside = [folder.resolve() for folder in methods.values()]             # outputs below lr_dir are no LR images
    lrs = {name: path for name, path in by_name(Path(lr_dir), "lr_dir").items()
           if not any(path.resolve().is_relative_to(folder) for folder in inside)}
    if not lrs:
        fail(f"lr_dir: {lr_dir} holds outputs of sr_dirs only, no LR image: give the folder of the LR images")
    outputs = {method: by_name(folder, "sr_dirs") for method, folder in methods.items()}
    skipped = []
    for method, files in outputs.items():
        missing = [name for name in lrs if name not in files]
        if missing and (not skip_bad or len(missing) == len(lrs)):
            fail(f"{methods[method]} has no picture for {len(missing)} of {len(lrs)} LR images, e.g. for "
                     f"{missing[0]!r}; it has e.g. {min(files)!r}: give an output the name of its LR image, or set "
                     "skip_bad=true to judge what is there")
        skipped += [{"file": str(lrs[name]), "reason": f"no output of {method}"} for name in missing]
        skipped += [{"file": str(path), "reason": "no LR image of this name"}
                    for name, path in files.items() if name not in lrs]
    scenes = [Scene(name, lr, {method: files[name] for method, files in outputs.items() if name in files})
              for name, lr in lrs.items()]
    return scenes, skipped


def size_fault(lr: np.ndarray, image: np.ndarray) -> str | None:
    """Why an output does not fit its LR image, or None."""
    (h, w), (height, width) = lr.shape[:2], image.shape[:2]
    if height % h or width % w or height // h != width // w:
        return f"{width}x{height} px is no whole multiple of its LR image, {w}x{h} px"
    return None


def survey(scenes: list[Scene], skip_bad: bool) -> tuple[list[Scene], list[dict]]:
    """
    The scenes with what can be read and fits, and {file, reason} of the rest. Unreadable files are always left out;
    an output of a wrong size stops the run unless skip_bad. Every rank looks at every file and finds the same.
    """
    good, skipped, wrong = [], [], []
    for scene in tqdm(scenes, desc="look at the images", unit="image", disable=not dist.is_main()):
        images = {}
        for key, path in {"": scene.lr, **scene.outputs}.items():
            try:
                images[key] = read_image(path)
            except ValueError as error:
                skipped.append({"file": str(path), "reason": f"cannot be read: {error}"})
                continue
            fault = size_fault(images[""], images[key]) if "" in images else None
            if fault:
                wrong.append({"file": str(path), "reason": fault})
                del images[key]
        if "" in images and len(images) > 1:
            lr = images.pop("")
            scales = {len(image) // len(lr) for image in images.values()}
            good.append(Scene(scene.name, scene.lr, {key: scene.outputs[key] for key in images}, lr.shape[:2],
                              tuple(sorted(scales))))
    if wrong and not skip_bad:
        fail(f"{wrong[0]['file']}: {wrong[0]['reason']} (files with a wrong size: {len(wrong)}): run the SR "
                 "program again on these LR images, or set skip_bad=true")
    return good, skipped + wrong


def read(scene: Scene, bicubic: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """LR image and method -> output; `bicubic` adds the LR image up-sampled to the size of the largest output."""
    lr, images = read_image(scene.lr), {key: read_image(path) for key, path in scene.outputs.items()}
    if bicubic:
        height, width = max(image.shape[:2] for image in images.values())
        images[BICUBIC] = resize(lr, (width, height), "bicubic")
    return lr, images


def notes(scenes: list[Scene], made: dict, *, side: int, limit: int) -> list[str]:
    """What a reader should know about how the images were judged; made: the settings of stage 01."""
    scales = sorted({scale for scene in scenes for scale in scene.scales})
    found = [f"judged in crops of {side} x {side} px, at most {limit} per image; a score is their mean",
             f"the judge learned from photographs degraded as '{made['degradation']}', in crops of "
             f"{made['hr_size']} px at scale {made['scale']}"]
    small = sum(min(scene.size) * min(scene.scales) < side for scene in scenes)
    if small:
        found.append(f"{small} images are smaller than {side} px and were judged whole")
    if len(scenes) < 20:
        found.append(f"{len(scenes)} images are few: the intervals are rough, and other images may rank otherwise")
    if scales != [made["scale"]]:
        found.append(f"scale here: {', '.join(map(str, scales))}; the judge learned on scale {made['scale']} only")
    return found
