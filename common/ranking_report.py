"""How stage 03 shows a ranking of SR methods: table.md, scores.csv, contact_sheet.png and report.html."""
import csv
import html
import io
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import calibration, report, run
from common.images import sheet, write_png
from common.run import write_lines
from common.metrics import AXES
from common.reward_report import SHOWN, error_bars, interval, png, table, told
from common.sr_folders import BICUBIC, Scene

READING = """<ul>
<li><b>overall, consistency, naturalness</b>: what the judge expects, 1 to 9. Consistency: does the image show what LR
shows; naturalness: does it look like a photograph. In brackets 95 % intervals, a bootstrap over images.</li>
<li><b>win rate</b>: share of images on which the method's overall score is the higher one, mean over the other
methods.</li>
<li><b>behind the best</b>: how far the overall score lies below the first method's on the same images. An interval
that holds 0 says that these images do not tell the two apart.</li>
<li>Scores of two judges, or of one judge with other crops, do not compare. A judge can be fooled by what it was never
trained on: look at the pictures, too.</li></ul>"""
BELOW = """<p>The images with its highest and lowest overall score, around the crop that scored highest or lowest.
Below: scores of whole images, and what the judge wrote about that crop (one sampled reply: its digits need not
agree).</p>"""


def rows_of(ranking: list[dict]) -> list[list]:
    """Head and body of the ranking table."""
    body = [[place, row["method"], *(interval(row[axis]) for axis in SHOWN), row["win_rate"],
             "-" if place == 1 else interval(row["behind_best"]), row["images"]]
            for place, row in enumerate(ranking, 1)]
    body = [["-" if cell is None else str(cell) for cell in row] for row in body]
    return [["", "method", *SHOWN, "win rate", "behind the best", "images"], *body]


def wins_of(wins: dict) -> list[list[str]]:
    """Head and body of the table of win rates, row against column."""
    return [["wins of row against column", *wins],
            *([a, *("" if a == b else interval(wins[a][b]) for b in wins)] for a in wins)]


def markdown(results: dict) -> str:
    """table.md."""
    lines = ["# SR methods ranked by the judge, without ground truth", "", f"{results['summary']}.", ""]
    for head, *body in (rows_of(results["ranking"]), wins_of(results["wins"])):
        lines += table(head, body)
    return "\n".join(lines + [f"- {note}" for note in results["notes"]]).rstrip() + "\n"


def scores_csv(lines: list[dict]) -> bytes:
    """scores.csv, for a spreadsheet: a row per image and method."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue().encode()


def plot(ranking: list[dict]) -> bytes:
    """PNG: the mean score of every method on every axis, with its interval."""
    figure = Figure(figsize=(9, 0.75 * len(ranking) + 1.3), layout="constrained")
    axes = figure.subplots()
    for i, (axis, color) in enumerate(SHOWN.items()):
        values, errors = error_bars([row[axis] for row in ranking])
        axes.errorbar(values, np.arange(len(ranking)) + 0.18 * (i - 1), xerr=errors, fmt="o", color=color, capsize=3,
                      label=axis)
    axes.set_yticks(range(len(ranking)), [row["method"] for row in ranking])
    axes.set(xlim=(1, 9), ylim=(len(ranking) - 0.5, -0.5), xlabel="mean score, 95 % interval over images")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(SHOWN))
    return png(figure)


def contact_sheet(examples: list[dict], methods: list[str]) -> np.ndarray:
    """A row per example: LR, then what every method made of it, with the judge's overall score."""
    blank = np.full((8, 8, 3), 255, np.uint8)
    rows = [[example["views"].get(key, blank) for key in ("LR", *methods)] for example in examples]
    below = [[f"{example['kind']} of {example['method']}"[:30],
              *(f"overall {score:.2f}" if (score := example["scores"].get(key)) else "" for key in methods)]
             for example in examples]
    return sheet(rows, ["LR", *(key[:26] for key in methods)], below=below)


def page(results: dict, examples: list[dict], skipped: list[dict]) -> bytes:
    """report.html, for a person who has not read anything else."""
    ranking, methods = results["ranking"], [row["method"] for row in results["ranking"]]
    best, first, accuracy = ranking[0], examples[0], results["judge_accuracy"]
    rival = BICUBIC if BICUBIC in first["views"] and best["method"] != BICUBIC else methods[-1]
    parts = [f"<p>{html.escape(results['summary'])}. Nobody needed the ground truth for this: the judge sees the "
             "low-resolution image and one result at a time, and scores the pair.</p>",
             report.cards([("first", best["method"], f"overall {best['overall']['value']:.2f} of 9"),
                           ("wins", "-" if best["win_rate"] is None else f"{best['win_rate']:.0%}",
                            "mean over the other methods, same image"),
                           ("images", str(results["lr_images"]), f"{len(skipped)} files left out"),
                           ("the judge itself", f"{accuracy:.0%}" if accuracy else "-",
                            "of pairs ordered rightly in its own test")])]
    if rival in first["views"] and rival != best["method"]:
        pair = report.compare(first["views"][rival], first["views"][best["method"]], (rival, best["method"]))
        parts.append(f"<figure>{pair}<figcaption>Drag: {html.escape(rival)} on the left, {html.escape(best['method'])} "
                     f"on the right; image {html.escape(first['image'])}.</figcaption></figure>")
    body = [row[1:] for row in rows_of(ranking)]
    parts += ["<h2>Ranking</h2>", report.table(body, best["method"]),
              f'<div class="plot">{report.png_tag(plot(ranking), "mean scores")}</div>', READING]
    if len(methods) > 1:
        parts += ["<h2>One against one</h2>", report.table(wins_of(results["wins"]))]
    parts.append(f"<h2>Best and worst of each method</h2>{BELOW}")
    for example in examples:
        below = {key: f"{value:.2f}" for key, value in example["scores"].items()}
        parts.append(f"<figure>{report.row(example['views'], below)}<figcaption><b>{example['kind']} of "
                     f"{html.escape(example['method'])}</b>: {html.escape(example['image'])}. "
                     f"<i>{html.escape(told(example['replies'][0]))}</i></figcaption></figure>")
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in results["notes"]), "</ul>"]
    if skipped:
        rows = [["file", "reason"], *([item["file"], item["reason"]] for item in skipped[:50])]
        parts += ["<h2>Files left out</h2>", report.table(rows)]
    return report.page("Super-resolution methods, ranked", parts).encode()


def write(folder: Path, results: dict, *, measured: np.ndarray, scenes: list[Scene], methods: list[str],
          shown: list[dict], skipped: list[dict], maps: dict) -> None:
    """All files of a ranking; measured: [N, M, CELLS] of score_all, shown: its examples, maps: of calibration.py."""
    results = {"lr_images": len(scenes), **results, "examples": [
        {key: value for key, value in example.items() if key != "views"} for example in shown]}
    lines = [{"image": scene.name, "method": method, **dict(zip(AXES, cells[:3])), "crops": int(cells[3])}
             for scene, row in zip(scenes, measured.tolist()) for method, cells in zip(methods, row)
             if not math.isnan(cells[0])]
    for line in lines:
        line |= {f"{axis}_calibrated": round(float(calibration.apply(found["knots"], line[axis])), 4)
                 for axis, found in maps.items() if found}
    for name, items in (("scores.jsonl", lines), ("skipped.jsonl", skipped)):
        write_lines(folder / name, items)
    run.write_bytes(folder / "scores.csv", scores_csv(lines))
    run.write_bytes(folder / "table.md", markdown(results).encode())
    run.write_json(folder / "results.json", results)
    write_png(folder / "contact_sheet.png", contact_sheet(shown, [row["method"] for row in results["ranking"]]))
    run.write_bytes(folder / "report.html", page(results, shown, skipped))
