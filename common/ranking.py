"""
SR methods on a user's folder, ranked by the judge without ground truth: what lr_dir and sr_dirs of 03 open.

An output belongs to the LR image of the same name (its path below the folder, without suffix). An image larger than
those the judge learned on is cut into crops of that size, at the same place in LR and in every output; its score is the
mean over crops. So a fault that shows only in the image as a whole, such as a drift of color from one end to the other,
is seen in parts or not at all.

Shapes: N LR images, M methods, G crops of one image.
"""
import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import dist, images, metrics, mllm, report, run
from common.config import fail
from common.images import BICUBIC, cut, read_image, resize
from common.metrics import AXES, OVERALL
from common.mllm import Judge

VIEW = 192                              # px, at most, of what the page shows of an image around a judged crop
READING = """<ul>
<li><b>overall, consistency, naturalness</b>: what the judge expects, 1 to 9. Consistency: does the image show what LR
shows; naturalness: does it look like a photograph. In brackets 95 % intervals, a bootstrap over images.</li>
<li><b>win rate</b>: share of images on which the method's overall score is the higher one, mean over the other
methods.</li>
<li><b>behind the best</b>: how far the overall score lies below the first method's on the same images. An interval
that holds 0 says that these images do not tell the two apart.</li>
<li>Scores of two judges, or of one judge with other crops, do not compare. A judge can be fooled by what it was never
trained on: look at the pictures, too.</li></ul>"""


@dataclass
class Scene:                            # one LR image and its outputs
    name: str                           # path below the folder, without suffix
    lr: Path
    outputs: dict[str, Path]            # method -> file


# which files belong together -------------------------------------------------------------------------------

def method_folders(sr_dirs: list[str]) -> dict[str, Path]:
    """Method -> folder, from PATH (the method is the folder's name) or NAME=PATH; stops if two have one name."""
    folders = {}
    for text in sr_dirs:
        name, _, path = text.rpartition("=")
        name = name or Path(path).resolve().name
        if name in folders or name == BICUBIC:
            fail(f"sr_dirs: two methods would be called {name!r} ({BICUBIC!r} is made here): write NAME=PATH, "
                 f"e.g. sr_dirs=mine={path}")
        folders[name] = Path(path)
    return folders


def pictures_by_name(folder: Path, key: str) -> dict[str, Path]:
    """Name without suffix -> picture below the folder; stops if two pictures differ in their suffix only."""
    pictures = {}
    for name, path in images.find(str(folder), key):
        if name in pictures:
            fail(f"{key}: {pictures[name]} and {path} have the same name: leave one of them")
        pictures[name] = path
    return pictures


def match(lr_dir: str, methods: dict[str, Path], *, skip_bad: bool) -> tuple[list[Scene], list[dict]]:
    """
    The LR images with their outputs, and {file, reason} of what has no counterpart.

    Stops at an LR image without an output unless skip_bad; an output without an LR image is only listed.
    """
    folders = [folder.resolve() for folder in methods.values()]             # outputs below lr_dir are no LR images
    lrs = {name: path for name, path in pictures_by_name(Path(lr_dir), "lr_dir").items()
           if not any(path.resolve().is_relative_to(folder) for folder in folders)}
    if not lrs:
        fail(f"lr_dir: {lr_dir} holds outputs of sr_dirs only, no LR image: give the folder of the LR images")
    scenes, left_out = [Scene(name, lr, {}) for name, lr in lrs.items()], []
    for method, folder in methods.items():
        files = pictures_by_name(folder, "sr_dirs")
        missing = [name for name in lrs if name not in files]
        if missing and (not skip_bad or len(missing) == len(lrs)):
            fail(f"{folder} has no picture for {len(missing)} of {len(lrs)} LR images, e.g. for {missing[0]!r}; it has "
                 f"e.g. {min(files)!r}: give an output the name of its LR image, or set skip_bad=true to judge what is "
                 "there")
        for scene in scenes:
            scene.outputs |= {method: files[scene.name]} if scene.name in files else {}
        left_out += [{"file": str(lrs[name]), "reason": f"no output of {method}"} for name in missing]
        left_out += [{"file": str(path), "reason": "no LR image of this name"}
                     for name, path in files.items() if name not in lrs]
    return scenes, left_out


def survey(scenes: list[Scene], methods: list[str], *, skip_bad: bool) -> tuple[list[Scene], list[dict]]:
    """
    The scenes with what can be read and fits, and {file, reason} of the rest; every rank looks at every file.

    Unreadable files are left out; an output of a wrong size stops the run unless skip_bad. So does a method of which
    nothing is left.
    """
    good, unreadable, wrong = [], [], []
    for scene in tqdm(scenes, desc="look at the images", unit="image", disable=not dist.is_main()):
        sizes, outputs = {}, {}
        for path in (scene.lr, *scene.outputs.values()):
            try:
                sizes[path] = read_image(path).shape[:2]
            except ValueError as error:
                unreadable.append({"file": str(path), "reason": f"cannot be read: {error}"})
        for method, path in scene.outputs.items():
            if not {path, scene.lr} <= sizes.keys():
                continue
            (h, w), (height, width) = sizes[scene.lr], sizes[path]
            scale = height // h
            expected = next((sizes[other] for other in outputs.values()), (scale * h, scale * w))
            if (height, width) == expected:
                outputs[method] = path
            else:
                wrong.append({"file": str(path), "reason": f"{width}x{height} px is no whole multiple of its LR image, "
                              f"{w}x{h} px, or not the size of the other outputs"})
        good += [Scene(scene.name, scene.lr, outputs)] if outputs else []
    if wrong and not skip_bad:
        fail(f"{wrong[0]['file']}: {wrong[0]['reason']} (files of a wrong size: {len(wrong)}): run the SR program "
             "again on these LR images, or set skip_bad=true")
    left_out = unreadable + wrong
    for method in methods:
        if not any(method in scene.outputs for scene in good):
            fail(f"sr_dirs: nothing of {method} is left to judge; {left_out[0]['file']}: {left_out[0]['reason']}")
    return good, left_out


# scores ----------------------------------------------------------------------------------------------------

def read(scene: Scene) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """LR image, method -> output (all of one size; bicubic is made here), and the scale between them."""
    lr, outputs = read_image(scene.lr), {method: read_image(path) for method, path in scene.outputs.items()}
    height, width = next(iter(outputs.values())).shape[:2]
    return lr, outputs | {BICUBIC: resize(lr, (width, height), "bicubic")}, height // len(lr)


def score_all(judge: Judge, scenes: list[Scene], methods: list[str], *, side: int, limit: int, batch: int) -> Tensor:
    """
    float64 [n, M, 8] of this rank's scenes, NaN where a method has no output: 3 mean scores, number of crops, corners
    (y, x; LR px) of the crops with the lowest and the highest overall score.

    side: px of a judged crop of an output; limit: crops per image, at most; batch: crops per forward pass.
    """
    table = torch.full((len(dist.mine(scenes)), len(methods), 8), torch.nan, dtype=torch.float64)
    for n, scene in enumerate(tqdm(dist.mine(scenes), desc="judge", unit="image", disable=not dist.is_main())):
        lr, outputs, scale = read(scene)
        small = max(1, side // scale)
        corners = images.grid(*lr.shape[:2], small, limit)
        scores = mllm.expected_scores(
            judge, [cut(lr, at, small, 1) for at in corners],
            [[cut(image, at, small, scale) for image in outputs.values()] for at in corners],
            groups_per_forward=batch).double()                                              # [G, outputs, 3]
        places, overall = torch.tensor(corners), scores[..., OVERALL]
        lowest, highest = (overall.nan_to_num(unread) for unread in (torch.inf, -torch.inf))
        for column, method in enumerate(outputs):
            table[n, methods.index(method)] = torch.cat([
                scores[:, column].nanmean(0), torch.tensor([len(corners)]), places[lowest[:, column].argmin()],
                places[highest[:, column].argmax()]])
    return table


def mean_of(values: np.ndarray, seed: int) -> dict:
    """{value, ci95} of the mean of values [n]; NaNs are left out."""
    values = values[~np.isnan(values)]
    return metrics.rate(values, np.ones(len(values)), seed)


def rank_methods(scores: np.ndarray, methods: list[str], seed: int) -> list[dict]:
    """
    A row per method, the best first by the mean overall score, from scores [N, M, 3] (NaN: no output).

    `win_rate`: share of the images that two methods have on which this one scores higher, ties half, mean over the
    others. `behind_best`: mean overall score of the best method minus this one's, over the images that both have.
    """
    overall = scores[..., OVERALL]                                                                # [N, M]
    order, rows = np.argsort(-np.nanmean(overall, 0), kind="stable"), []
    for m in order:
        wins = [mean_of((1 + np.sign(overall[:, m] - overall[:, i])) / 2, seed)["value"] for i in order if i != m]
        wins = [value for value in wins if value is not None]
        rows.append({"method": methods[m], "images": int((~np.isnan(overall[:, m])).sum()),
                     **{axis: mean_of(scores[:, m, a], seed) for a, axis in enumerate(AXES)},
                     "win_rate": round(float(np.mean(wins)), 4),      # not empty: bicubic has all images
                     "behind_best": mean_of(overall[:, order[0]] - overall[:, m], seed)})
    return rows


# what people look at ---------------------------------------------------------------------------------------

def view(lr: np.ndarray, outputs: dict[str, np.ndarray], corner: list[int], side: int) -> dict[str, np.ndarray]:
    """LR, enlarged by repetition, and every output around a crop of `side` LR px at `corner` (y, x; LR px)."""
    scale = len(next(iter(outputs.values()))) // len(lr)
    size = min(max(side, VIEW // scale), *lr.shape[:2])
    at = tuple(int(np.clip(place + side // 2 - size // 2, 0, length - size))
               for place, length in zip(corner, lr.shape[:2]))
    return {"LR": resize(cut(lr, at, size, 1), (scale * size, scale * size), "nearest"),
            **{method: cut(image, at, size, scale) for method, image in outputs.items()}}


def examples(scenes: list[Scene], measured: np.ndarray, methods: list[str], ranking: list[str],
             side: int) -> list[tuple]:
    """
    (method, best or worst, name, views, method -> score) of the images with the highest and the lowest overall score of
    each method, around the crop that scored highest or lowest; measured: [N, M, 8] of score_all.
    """
    shown, overall = [], measured[..., OVERALL]
    for method in ranking:
        m = methods.index(method)
        for kind, n in (("best", np.nanargmax(overall[:, m])), ("worst", np.nanargmin(overall[:, m]))):
            lr, outputs, scale = read(scenes[n])
            corner = measured[n, m, 6:] if kind == "best" else measured[n, m, 4:6]
            scores = {key: float(overall[n, methods.index(key)]) for key in outputs}
            shown.append((method, kind, scenes[n].name, view(lr, outputs, corner.astype(int), side // scale), scores))
    return shown


def page(results: dict, shown: list[tuple]) -> bytes:
    """report.html, for a person who has not read anything else; shown: of `examples`."""
    best, last = results["ranking"][0], results["ranking"][-1]
    accuracy, left_out = results["judge_accuracy"], results["left_out"]
    parts = [f"<p>{html.escape(results['summary'])}. Nobody needed the ground truth for this: the judge sees the "
             "low-resolution image and one result at a time, and scores the pair.</p>",
             report.cards([("first", best["method"], f"overall {best['overall']['value']:.2f} of 9"),
                           ("wins", f"{best['win_rate']:.0%}", "mean over the other methods, same image"),
                           ("images", str(results["lr_images"]), f"{len(left_out)} files left out"),
                           ("the judge itself", f"{accuracy:.0%}" if accuracy else "-",
                            "of pairs ordered rightly in its own test")])]
    rival, (_, _, name, views, _) = BICUBIC if best["method"] != BICUBIC else last["method"], shown[0]
    if rival in views:
        slider = report.compare(views[rival], views[best["method"]], (rival, best["method"]))
        parts.append(report.figure(slider, html.escape(
            f"Drag: {rival} on the left, {best['method']} on the right; image {name}.")))
    rows = [[row["method"], *(report.interval(row[axis]) for axis in AXES[::-1]),
             f"{row['win_rate']:.3f}", "-" if row is best else report.interval(row["behind_best"]), str(row["images"])]
            for row in results["ranking"]]
    head = ["method", *AXES[::-1], "win rate", "behind the best", "images"]
    parts += ["<h2>Ranking</h2>", report.table([head, *rows], best["method"]), READING,
              "<h2>Best and worst of each method</h2><p>The images with its highest and lowest overall score, around "
              "the crop that scored highest or lowest. Below: scores of whole images.</p>"]
    for method, kind, name, views, scores in shown:
        below = {key: f"{value:.2f}" for key, value in scores.items()}
        parts.append(report.figure(report.row(views, below),
                                   f"<b>{kind} of {html.escape(method)}</b>: {html.escape(name)}"))
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in results["notes"]), "</ul>"]
    if left_out:
        rows = [["file", "reason"], *([item["file"], item["reason"]] for item in left_out[:50])]
        parts += ["<h2>Files left out</h2>", report.table(rows)]
    return report.page("Super-resolution methods, ranked", parts).encode(errors="replace")


def write(folder: Path, scenes: list[Scene], measured: np.ndarray, methods: list[str], *, side: int,
          results: dict) -> None:
    """report.html, scores.csv and results.json of a ranking; measured: [N, M, 8] of score_all."""
    shown = examples(scenes, measured, methods, [row["method"] for row in results["ranking"]], side)
    run.write_csv(folder / "scores.csv", [
        {"image": scene.name, "method": method, **dict(zip(AXES, cells[:3])), "crops": int(cells[3])}
        for scene, row in zip(scenes, measured.tolist()) for method, cells in zip(methods, row)
        if method in (*scene.outputs, BICUBIC)])
    run.write_bytes(folder / "report.html", page(results, shown))
    run.write_json(folder / "results.json", results)
