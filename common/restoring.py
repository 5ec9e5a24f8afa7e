"""
Restore a folder of pictures with SR policies: which pictures, what is done already, and the work itself.

restored.jsonl: {file, sha256, settings, outputs {variant: {path, sha256}}, size, scores} per picture, or a reason.
While a run lasts each rank writes a file of its own. A picture is done if input, settings and outputs match its line.
"""
import collections
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import color_fix, dist, images, mllm, run, sr_tiles
from common.config import fail
from common.images import cut, grid, read_image, to_pixels, write_png
from common.run import write_lines
from common.metrics import AXES
from common.mllm import Judge
from common.sr_policy import Policy, upsample

BICUBIC = "bicubic"                     # scored for comparison, not written
STATE = "restored.jsonl"
SMALLEST = 8                            # px, side of an LR image that the judge can make something of


@dataclass
class Picture:
    file: str                           # path below lr_dir
    path: Path
    output: str                         # path below a variant's folder


def find(lr_dir: str, out: Path) -> list[Picture]:
    """The pictures below lr_dir but not below `out`, which may lie inside; stops where `out` could do damage."""
    root, target = Path(lr_dir).resolve(), out.resolve()
    if root.is_relative_to(target):
        fail(f"out: {out} is or holds lr_dir={lr_dir}: give a folder of its own, so that no picture is overwritten")
    if out.exists() and any(out.iterdir()) and not (out / "config.yaml").exists():
        fail(f"out: {out} has files that this command did not write: give a new or empty folder")
    found = [(name, path) for name, path in images.find(lr_dir, "lr_dir")
             if not path.resolve().is_relative_to(target)]
    if not found:
        fail(f"lr_dir: {lr_dir} holds no picture but those in out={out}")
    taken = collections.Counter(name for name, _ in found)              # a.png and a.jpg: keep the suffix, too
    pictures = [Picture(f"{name}{path.suffix}", path, f"{name}{path.suffix * (taken[name] > 1)}.png")
                for name, path in found]
    twice, count = collections.Counter(picture.output for picture in pictures).most_common(1)[0]
    if count > 1:
        fail(f"lr_dir: {count} pictures would be restored as {twice}: rename one of them")
    return pictures


def read_state(folder: Path) -> dict[str, dict]:
    """file -> its last line in restored.jsonl and in what ranks have written since; a torn last line is no line."""
    state = {}
    for path in sorted(folder.glob("restored*.jsonl"), key=lambda path: path.name != STATE):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("}\n")]
        state |= {record["file"]: record for record in records}
    return state


def keep(folder: Path, lines: list[dict]) -> None:
    """Write restored.jsonl, and skipped.jsonl from it, in place of what ranks have written; all have read that."""
    dist.barrier()
    if dist.is_main():
        write_lines(folder / STATE, lines)
        write_lines(folder / "skipped.jsonl", [{"file": line["file"], "reason": line["reason"]}
                                               for line in lines if "reason" in line])
        for path in folder.glob("restored_*.jsonl"):
            path.unlink()
    dist.barrier()


def is_done(folder: Path, record: dict | None, wanted: dict) -> bool:
    """Whether `wanted`, {file, sha256, settings}, was restored, and its outputs lie there unchanged."""
    if not record or "reason" in record or any(record[key] != value for key, value in wanted.items()):
        return False
    return all((folder / made["path"]).is_file() and run.sha256(folder / made["path"]) == made["sha256"]
               for made in record["outputs"].values())


def settings_hash(cfg, stage: Path) -> str:
    """Of what a restored image depends on besides its input: settings, and stage 04 by its manifest."""
    names = ("seed", "policy", "hybrid", "tile", "overlap", "color_fix", "judge_crops")
    values = {name: vars(cfg)[name] for name in names} | {"stage": run.sha256(stage / "manifest.json")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def score(judge: Judge, side: int, lr: np.ndarray, images: dict[str, np.ndarray], *, limit: int) -> dict[str, dict]:
    """Variant -> axis -> mean score over crops of `side` px, evenly spread, at most `limit`; as stage 03 ranks."""
    scale = len(next(iter(images.values()))) // len(lr)
    corners = grid(*lr.shape[:2], side // scale, limit)
    cuts = [cut(lr, at, side // scale, 1) for at in corners]
    made = [[cut(image, at, side // scale, scale) for image in images.values()] for at in corners]
    scores = mllm.expected_scores(judge, cuts, made).double().mean(0)                           # [variants, 3]
    return {name: dict(zip(AXES, row.numpy().round(4).tolist())) for name, row in zip(images, scores)}


def restore_one(cfg, folder: Path, picture: Picture, lr: np.ndarray, *, policies: dict[str, Policy],
                judge: tuple[Judge, int] | None) -> dict:
    """Restore LR uint8 [h, w, 3] with every policy, write the outputs, and return them, the size, and the scores."""
    outputs, images, key = {}, {}, (cfg.seed, "folder", picture.file)
    scale, pixels = next(iter(policies.values())).sampler.scale, torch.from_numpy(lr).permute(2, 0, 1)[None]
    smooth = upsample(pixels.float().div(255), scale).clamp(0, 1)
    for name, policy in policies.items():
        image = sr_tiles.restore(policy, lr, key, tile=cfg.tile, overlap=cfg.overlap, batch=cfg.images_per_gpu)
        kind = color_fix.default_of(policy) if cfg.color_fix == "auto" else cfg.color_fix
        images[name] = to_pixels(color_fix.fix(image, smooth, kind))[0]
        path = folder / name / picture.output
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, images[name])
        outputs[name] = {"path": f"{name}/{picture.output}", "sha256": run.sha256(path)}
    images = {BICUBIC: to_pixels(smooth)[0], **images}
    scored = judge and min(lr.shape[:2]) >= SMALLEST
    scores = score(*judge, lr, images, limit=cfg.judge_crops) if scored else {}
    return {"outputs": outputs, "size": [lr.shape[1], lr.shape[0]], "scores": scores}


def restore_all(cfg, folder: Path, pictures: list[Picture], *, settings: str, policies: dict[str, Policy],
                judge: tuple[Judge, int] | None) -> tuple[list[dict], int]:
    """Restore what is not done yet, over all ranks; the lines of all pictures, and how many were restored now."""
    state, count = read_state(folder), 0
    keep(folder, list(state.values()))
    own = pictures[dist.rank()::dist.world_size()]
    with open(folder / f"restored_{dist.rank()}.jsonl", "w", encoding="utf-8") as file:
        bar = tqdm(own, desc="restore", unit="image", disable=not dist.is_main())
        for picture in bar:
            line = {"file": picture.file}
            try:
                line |= {"sha256": run.sha256(picture.path), "settings": settings}
                if is_done(folder, state.get(picture.file), line):
                    continue
                lr = read_image(picture.path)
            except (OSError, ValueError) as error:
                line["reason"] = f"cannot be read: {error}"
            else:
                line |= restore_one(cfg, folder, picture, lr, policies=policies, judge=judge)
                count += 1
            file.write(json.dumps(line) + "\n")
            file.flush()
    count = int(dist.all_sum(torch.tensor(count)))          # and every rank is done
    state = read_state(folder)
    lines = [state[picture.file] for picture in pictures]
    keep(folder, lines)
    return lines, count
