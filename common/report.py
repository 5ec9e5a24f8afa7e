"""
report.html: one file without links to anything, for a person who was not there.

curves.png: what metrics.jsonl of 02, of 04 and of its cold start holds, as small plots on one page.
"""
import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common import dist
from common.run import log_metrics, write_bytes

LONG = 34                               # characters of a table cell that is text rather than a number
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7e; --line: #dde3ea; --paper: #fff;
        --card: #f5f7fa; --accent: #2a5fb0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf2; --soft: #9aa8ba; --line: #2f3947; --paper: #12171e; --card: #1b222c;
          --accent: #7fb0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 1080px; font: 16px/1.55 system-ui, sans-serif;
       color: var(--ink); background: var(--paper) }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .6rem 0 } h2 { margin: 2.6rem 0 .4rem; font-size: 1.3rem }
p, figcaption, li { color: var(--soft) } p { max-width: 46rem } b { color: var(--ink) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem;
         margin: 1.2rem 0 }
.card { background: var(--card); border-radius: 12px; padding: .9rem 1.1rem }
.card strong { display: block; font-size: 1.55rem } .card span { color: var(--soft); font-size: .9rem }
h3 { margin: 1.8rem 0 .2rem; font-size: 1.05rem }
.scroll { overflow-x: auto; margin: .4rem 0 1.2rem }
table { border-collapse: collapse; font-size: .92rem; min-width: 100% }
td, th { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:first-child, th:first-child, td.text { text-align: left } th { white-space: normal; vertical-align: bottom }
td.text { white-space: normal; min-width: 13rem } tr.mine td { background: var(--card); font-weight: 600 }
figure { margin: 1.2rem 0 } .row { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 6px }
.row div { font-size: .78rem; color: var(--soft); text-align: center } .row b { display: block }
img { width: 100%; display: block; border-radius: 6px } .pixels img { image-rendering: pixelated }
.plot { background: #fff; padding: 6px; border-radius: 8px }
.compare { position: relative; max-width: 560px } .compare img + img { position: absolute; inset: 0 }
.compare input { width: 100%; margin: .5rem 0; accent-color: var(--accent) }
@media (max-width: 560px) { .row { grid-template-columns: repeat(3, 1fr) } body { padding: .8rem } }
"""


def png_tag(image: np.ndarray | bytes, name: str, attributes: str = "") -> str:
    """<img> of uint8 [H, W, 3] or of the bytes of a PNG file, inside the page."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        image = buffer.getvalue()
    code = base64.b64encode(image).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{code}" {attributes}>'


def row(images: dict[str, np.ndarray], below: dict[str, str]) -> str:
    """Images side by side under their names; `below`: a line under some of them."""
    cells = (f"<div><b>{html.escape(name)}</b>{png_tag(image, name)}{below.get(name, '')}</div>"
             for name, image in images.items())
    return f'<div class="row pixels" style="--columns: {max(5, len(images))}">{"".join(cells)}</div>'


def compare(left: np.ndarray, right: np.ndarray, names: tuple[str, str] = ("before GRPO", "after GRPO")) -> str:
    """Two images on top of each other and a slider that moves the border between them."""
    script = "this.parentNode.children[1].style.clipPath='inset(0 0 0 '+this.value+'%)'"
    clip = "style='clip-path: inset(0 0 0 50%)'"
    return (f'<div class="compare pixels">{png_tag(left, names[0])}{png_tag(right, names[1], clip)}'
            f'<input type="range" min="0" max="100" value="50" aria-label="border" oninput="{script}"></div>')


def table(rows: list[list[str]], highlight: str = "") -> str:
    """The first row is the head; the row whose first cell is `highlight` stands out."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body, between = "", "<br>[" if len(rows[0]) > 5 else " ["                    # intervals below, in wide tables
    for cells in rows[1:]:
        mark = ' class="mine"' if cells[0] == highlight else ""
        kinds = (' class="text"' * (len(cell) > LONG) for cell in cells)                    # wraps; numbers do not
        texts = (html.escape(cell).replace(" [", between) for cell in cells)
        body += f"<tr{mark}>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, texts)) + "</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def from_markdown(text: str) -> str:
    """The headings (##), tables, list items and paragraphs of a table.md; its title is left out."""
    parts, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows += [] if set("".join(cells)) <= set("-: ") else [cells]
            continue
        parts += [table(rows)] if rows else []
        rows = []
        if line.startswith("## "):
            parts.append(f"<h3>{html.escape(line[3:])}</h3>")
        elif line and not line.startswith("#"):
            parts.append(f"<p>{html.escape(line)}</p>")
    return "".join(parts)


def curves(metrics: Path, shown: dict[str, str]) -> str:
    """A small plot for each key of a stage's metrics.jsonl (key -> title) that occurs there."""
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    series = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in shown}
    series = {key: points for key, points in series.items() if points}
    if not series:
        return "<p>No curves: metrics.jsonl of that stage is missing.</p>"
    figure = Figure(figsize=(3.6 * len(series), 2.7), layout="constrained")
    for axes, (key, points) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items()):
        marker = "o" if len(points) < 20 else ""
        axes.plot(*zip(*points), color="#2a5fb0", linewidth=1.6, marker=marker, markersize=3)
        axes.set_title(shown[key], fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return f'<div class="plot">{png_tag(buffer.getvalue(), "curves")}</div>'


def cards(items: list[tuple[str, str, str]]) -> str:
    """(label, large number, small print) each."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><span>{html.escape(label)}</span><strong>{html.escape(number)}</strong>'
        f'<span>{html.escape(note)}</span></div>' for label, number, note in items) + "</div>"


def page(title: str, parts: list[str]) -> str:
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<style>{STYLE}</style></head>'
            f'<body><h1>{html.escape(title)}</h1>{"".join(parts)}</body></html>\n')


COLORS = ("#2a5fb0", "#d1603d", "#3f8f5b", "#7a5aa6")
LOGARITHMIC = ("grad_norm",)
STACKED = ("seconds_sample", "seconds_score", "seconds_update")
# folder -> title of a plot -> keys in it; a key that was not logged is left out, and a plot without any
PLOTS = {
    "02_train_reward": {
        "pair accuracy on validation": ("val_pair_accuracy", "val_consistency_accuracy", "val_naturalness_accuracy"),
        "cold start: loss": ("loss_direct", "loss_reply"),
        "sft_rank: loss": ("loss_rank",),
        "mean reward of the step": ("reward_mean", "digit_reward_mean"),
        "spread of rewards": ("reward_std",),
        "share of replies not in the asked form": ("judge_parse_failures",),
        "KL to the model before GRPO": ("ref_kl", "digit_ref_kl"),
        "gradient norm": ("grad_norm",),
        "seconds per step": STACKED},
    "04_train_sr_grpo": {
        "judge's score on validation": ("val_reward",),
        "held-out judge on validation": ("val_heldout",),
        "LR-PSNR on validation, dB": ("val_lr_psnr",),
        "judge's score, samples of the step": ("reward_mean",),
        "spread of scores inside a group": ("reward_std",),
        "LR-PSNR, samples of the step, dB": ("lr_psnr",),
        "KL to the policy before GRPO": ("ref_kl",),
        "gradient norm": ("grad_norm",),
        "seconds per step": STACKED},
    "cold_start": {"loss: squared error of v": ("loss",), "gradient norm": ("grad_norm",)}}


def log(folder: Path, step: int, row: dict) -> None:
    """Append row to metrics.jsonl, and draw curves.png anew after an evaluation (main rank only)."""
    log_metrics(folder, step, row)
    if dist.is_main() and any(key.startswith("val_") for key in row):
        write_curves(folder)


def write_curves(folder: Path) -> None:
    """Draw <folder>/curves.png from <folder>/metrics.jsonl: noisy series faintly, and their running mean on top."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows, kind = [json.loads(line) for line in lines], folder.name
    series = {key: points(rows, key) for keys in PLOTS[kind].values() for key in keys}
    shown = {title: [key for key in keys if len(series[key])] for title, keys in PLOTS[kind].items()}
    shown = {title: keys for title, keys in shown.items() if keys}
    if not shown:
        return
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.6 * height), layout="constrained")
    places = figure.subplots(height, columns, squeeze=False).flatten()
    border = [row["step"] for before, row in zip(rows, rows[1:]) if row.get("phase") != before.get("phase")]
    for axes, (title, keys) in zip(places, shown.items()):
        draw_curves(axes, {key: series[key] for key in keys})
        if len(border) and min(series[key][0, 0] for key in keys) < border[0]:
            axes.axvline(border[0], color="#9aa8ba", linewidth=1, linestyle="--", label="GRPO starts")
        axes.set_title(title, fontsize=10, loc="left")
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize=7, frameon=False)
    for axes in places[len(shown):]:
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(folder / "curves.png", buffer.getvalue())


def points(rows: list[dict], key: str) -> np.ndarray:
    """[n, 2] step and value, where it was logged and finite."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array(found, dtype=float).reshape(-1, 2)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and of up to `reach` on either side, as many on the left as on the right."""
    places = np.arange(len(values))
    reach = np.minimum(reach, np.minimum(places, places[::-1]))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def draw_curves(axes, series: dict[str, np.ndarray]) -> None:
    """The series of one plot; axes: of matplotlib."""
    if tuple(series) == STACKED:
        steps, stack = series[STACKED[0]][:, 0], np.stack([own[:, 1] for own in series.values()])
        axes.stackplot(steps, stack, labels=[key.removeprefix("seconds_") for key in STACKED], colors=COLORS, alpha=0.8)
        axes.set_ylim(0, 1.3 * np.quantile(stack.sum(0), 0.95))         # one slow step does not flatten the rest
    for color, (key, own) in zip(COLORS, {} if tuple(series) == STACKED else series.items()):
        noisy = len(own) > 30 and not key.startswith("val_")
        marker = "o" if len(own) <= 30 else ""
        axes.plot(*own.T, color=color, alpha=0.25 if noisy else 1, linewidth=1 if noisy else 1.6, marker=marker,
                  markersize=3, label=None if noisy else key)
        if noisy:
            axes.plot(own[:, 0], running_mean(own[:, 1], len(own) // 20), color=color, linewidth=1.8, label=key)
        if key in LOGARITHMIC and (own[:, 1] > 0).all():
            axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
