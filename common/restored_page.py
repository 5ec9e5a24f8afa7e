"""What a restored folder looks like: index.html to open in a browser, contact_sheet.png, scores.csv."""
import html
from pathlib import Path
from urllib.parse import quote

import numpy as np

from common import ranking_report, report, run
from common.images import MAX_PIXELS, cut, grid, read_image, resize, sheet, write_png
from common.metrics import AXES
from common.images import luma
from common.restoring import BICUBIC, Picture

VIEW = 384                              # px of an output that are shown of each picture, at most
SCORES = """<p>Scores are the judge's, 1 to 9: is the image consistent with the low-resolution one, does it look like a
photograph, and overall. It never saw a ground truth, and it can be fooled: trust your eyes first.</p>"""


def liveliest(lr: np.ndarray, side: int) -> tuple[int, int]:
    """Corner (y, x) of the part of side x side px of LR with the most contrast, of an even grid."""
    y = luma(lr)
    return max(grid(*lr.shape[:2], side, 64), key=lambda at: y[at[0]:at[0] + side, at[1]:at[1] + side].std())


def view(folder: Path, picture: Picture, line: dict, scale: int) -> dict[str, np.ndarray]:
    """LR enlarged by repetition, bicubic, and every output: a part of the picture where something is to be seen."""
    lr, side = read_image(picture.path), VIEW // scale
    corner = liveliest(lr, side)
    small = cut(lr, corner, side, 1)
    size = tuple(scale * length for length in small.shape[1::-1])
    soft = resize(cut(lr, corner, side, 1), size, "bicubic")
    images = {"LR": resize(small, size, "nearest"), BICUBIC: soft}
    return images | {name: cut(read_image(folder / made["path"]), corner, side, scale)
                     for name, made in line["outputs"].items()}


def square(image: np.ndarray) -> np.ndarray:
    """The middle of an image as a square, for the contact sheet."""
    side = min(image.shape[:2])
    y, x = ((length - side) // 2 for length in image.shape[:2])
    return image[y:y + side, x:x + side]


def figure(line: dict, images: dict[str, np.ndarray]) -> str:
    """One picture: a slider from bicubic to the last variant, all images side by side, and links to the outputs."""
    last, below = list(images)[-1], {name: f"overall {axes['overall']:.2f}" for name, axes in line["scores"].items()}
    width, height = line["size"]
    links = ", ".join(f'<a href="{quote(made["path"])}">{html.escape(name)}</a>'
                      for name, made in line["outputs"].items())
    slider = report.compare(images[BICUBIC], images[last], (BICUBIC, last))
    return (f"<h2>{html.escape(line['file'])}</h2><figure>{slider}{report.row(images, below)}<figcaption>"
            f"{width} x {height} px. Whole image: {links}.</figcaption></figure>")


def means(lines: list[dict]) -> list[list[str]]:
    """Head, and a row per variant with its mean scores over the pictures."""
    scores = [line["scores"] for line in lines]
    return [["mean score", *AXES], *([name, *(f"{np.mean([own[name][axis] for own in scores]):.2f}" for axis in AXES)]
                                     for name in scores[0])]


def write(folder: Path, cfg, pictures: list[Picture], lines: list[dict], scale: int) -> None:
    """All of it; lines: of restoring.restore_all. At most cfg.shown_images pictures are shown, evenly spread."""
    whole = [(picture, line) for picture, line in zip(pictures, lines) if "reason" not in line
             and line["size"][0] * line["size"][1] * scale ** 2 <= MAX_PIXELS]
    picks = np.unique(np.linspace(0, len(whole) - 1, min(cfg.shown_images, len(whole))).astype(int))
    shown = [(line, view(folder, picture, line, scale)) for picture, line in (whole[i] for i in picks)]
    good, bad = ([line for line in lines if ("reason" in line) == is_bad] for is_bad in (False, True))
    parts = [f"<p>{len(good)} pictures of {html.escape(cfg.lr_dir)}, {scale} times as wide and high; shown: "
             f"{len(shown)}, evenly spread, each where it has most contrast. Drag the slider: bicubic on the left, "
             f"{html.escape(cfg.policy[-1])} on the right.</p>"]
    scored = [line for line in good if line["scores"]]
    if scored:
        parts += [report.table(means(scored), cfg.policy[-1]), SCORES]
        run.write_bytes(folder / "scores.csv", ranking_report.scores_csv(
            [{"image": line["file"], "variant": name, **axes} for line in scored
             for name, axes in line["scores"].items()]))
    parts += [figure(line, images) for line, images in shown]
    if bad:
        parts += ["<h2>Left out</h2>", report.table([["file", "reason"],
                                                     *([line["file"], line["reason"]] for line in bad[:50])])]
    run.write_bytes(folder / "index.html", report.page("Restored pictures", parts).encode())
    if shown:
        columns = list(shown[0][1])
        rows = [[square(images[key]) for key in columns] for _, images in shown]
        write_png(folder / "contact_sheet.png", sheet(rows, columns, VIEW))
