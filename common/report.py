"""
report.html: one file without links to anything, for a person who was not there; every function returns a piece of it.

curves.png: what a metrics.jsonl holds, a small plot per number.
"""
import base64
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from matplotlib.figure import Figure

from common import dist, run

COLUMNS = 4                             # small plots side by side
LONG = 34                               # characters of a table cell from which it may wrap
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7e; --line: #dde3ea; --card: #f5f7fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf2; --soft: #9aa8ba; --line: #2f3947; --card: #1b222c } }
body { margin: 0 auto; padding: 1.2rem; max-width: 1080px; font: 16px/1.55 system-ui, sans-serif; color: var(--ink) }
h2 { margin: 2.6rem 0 .4rem } p, figcaption, li { color: var(--soft) } p { max-width: 46rem } b { color: var(--ink) }
.cards, .row { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)) }
.card { background: var(--card); border-radius: 12px; padding: .9rem 1.1rem }
.card strong { display: block; font-size: 1.5rem } .card span { color: var(--soft); font-size: .9rem }
.scroll { overflow-x: auto; margin: .4rem 0 1.2rem }
table { border-collapse: collapse; font-size: .82rem; min-width: 100% }
td, th { padding: .4rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:first-child, th:first-child, td.text { text-align: left } th { white-space: normal; vertical-align: bottom }
td.text { white-space: normal; min-width: 13rem } tr.mine td { background: var(--card); font-weight: 600 }
figure { margin: 1.2rem 0 } .row { grid-template-columns: repeat(var(--columns), 1fr) }
.row div { font-size: .78rem; color: var(--soft); text-align: center } .row b { display: block }
img { width: 100%; display: block; border-radius: 6px } .pixels img { image-rendering: pixelated }
.plot { background: #fff; padding: 6px; border-radius: 8px }
.compare { position: relative; max-width: 560px } .compare img + img { position: absolute; inset: 0 }
.compare input { width: 100%; margin: .5rem 0 }
"""


# pieces of a page ----------------------------------------------------------------------------------------------------

def png_tag(image: np.ndarray | bytes, name: str, attributes: str = "") -> str:
    """<img> of uint8 [H, W, 3] or of the bytes of a PNG file, inside the page."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        image = buffer.getvalue()
    code = base64.b64encode(image).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{code}" {attributes}>'


def row(images: dict[str, np.ndarray], below: dict[str, str]) -> str:
    """Images side by side under their names; `below`: a line of HTML under some of them."""
    cells = [f"<div><b>{html.escape(name)}</b>{png_tag(image, name)}{below.get(name, '')}</div>"
             for name, image in images.items()]
    return f'<div class="row pixels" style="--columns: {max(5, len(images))}">{"".join(cells)}</div>'


def compare(left: np.ndarray, right: np.ndarray, names: tuple[str, str] = ("before GRPO", "after GRPO")) -> str:
    """Two images on top of each other and a slider that moves the border between them."""
    script = "this.parentNode.children[1].style.clipPath='inset(0 0 0 '+this.value+'%)'"
    clip = "style='clip-path: inset(0 0 0 50%)'"
    return (f'<div class="compare pixels">{png_tag(left, names[0])}{png_tag(right, names[1], clip)}'
            f'<input type="range" min="0" max="100" value="50" aria-label="border" oninput="{script}"></div>')


def figure(inside: str, caption: str) -> str:
    """Something to look at, and what it is; both are HTML."""
    return f"<figure>{inside}<figcaption>{caption}</figcaption></figure>"


def table(rows: list[list[str]], highlight: str = "") -> str:
    """The first row is the head; the row whose first cell is `highlight` stands out. In wide tables `[a, b]` wraps."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = ""
    for cells in rows[1:]:
        body += '<tr class="mine">' if cells[0] == highlight else "<tr>"
        for cell in cells:
            text = html.escape(cell).replace(" [", "<br>[") if len(cells) > 5 else html.escape(cell)
            body += f'<td class="text">{text}</td>' if len(cell) > LONG else f"<td>{text}</td>"
        body += "</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def interval(rate: dict) -> str:
    """{value, ci95} as a table cell; either may be None."""
    if rate["value"] is None:
        return "-"
    ends = " [{:.3f}, {:.3f}]".format(*rate["ci95"]) if rate["ci95"] else ""
    return f"{rate['value']:.3f}{ends}"


Parts = list[str | list[list[str]]]     # a heading ("## ..") or paragraph, or the rows of a table, the head first


def markdown(parts: Parts) -> str:
    """The text of a .md file."""
    blocks = []
    for part in parts:
        if isinstance(part, list):
            head, *body = [f"| {' | '.join(row)} |" for row in part]
            part = "\n".join([head, "|" + " --- |" * len(part[0]), *body])
        blocks.append(part)
    return "\n\n".join(blocks) + "\n"


def text(parts: Parts) -> str:
    """The same as HTML."""
    pieces = []
    for part in parts:
        if isinstance(part, list):
            pieces.append(table(part))
        elif part.startswith("## "):
            pieces.append(f"<h3>{html.escape(part[3:])}</h3>")
        else:
            pieces.append(f"<p>{html.escape(part)}</p>")
    return "".join(pieces)


def cards(items: list[tuple[str, str, str]]) -> str:
    """(label, large number, small print) each."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><span>{html.escape(label)}</span><strong>{html.escape(number)}</strong>'
        f'<span>{html.escape(note)}</span></div>' for label, number, note in items) + "</div>"


def page(title: str, parts: list[str]) -> str:
    """The whole file."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
            f'<body><h1>{html.escape(title)}</h1>{"".join(parts)}</body></html>\n')


def curves(metrics: Path, keys: Iterable[str]) -> str:
    """Plots of some keys of a stage's metrics.jsonl, as far as they change there."""
    series = read_series(metrics, keys) if metrics.exists() else {}
    if not series:
        return f"<p>No curves: nothing of them in {html.escape(str(metrics))}.</p>"
    return f'<div class="plot">{png_tag(plot(series), "curves")}</div>'


# curves --------------------------------------------------------------------------------------------------------------

def log(folder: Path, step: int, values: dict) -> None:
    """Append values to metrics.jsonl, and draw curves.png anew after an evaluation (main rank only)."""
    run.log_metrics(folder, step, values)
    if dist.is_main() and any(key.startswith("val_") for key in values):
        write_curves(folder)


def write_curves(folder: Path) -> None:
    """Draw <folder>/curves.png: a plot of each number of metrics.jsonl that changes."""
    series = read_series(folder / "metrics.jsonl")
    if series:
        run.write_bytes(folder / "curves.png", plot(series))


def read_series(metrics: Path, keys: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """
    Key -> [2, n], the steps and values of a number in metrics.jsonl, if it changes.

    keys: only these; else all, those of evaluations (val_) first.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    logged = dict.fromkeys(key for row in rows for key in row if key not in ("step", "time"))
    names = list(keys) or sorted(logged, key=lambda key: not key.startswith("val_"))
    series = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        if len({value for _, value in points}) > 1:
            series[name] = np.array(points, dtype=float).T
    return series


def plot(series: dict[str, np.ndarray]) -> bytes:
    """PNG with a small plot for each of the series; long ones faintly, and their running mean on top."""
    height = -(-len(series) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.2 * height))
    places = figure.subplots(height, COLUMNS, squeeze=False, gridspec_kw={"hspace": 0.4}).flatten()
    for axes, (name, (steps, values)) in zip(places, series.items()):
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if len(values) <= 30:
            axes.plot(steps, values, "o-", color="tab:blue", markersize=3)
            continue
        width = len(values) // 15
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        mean = np.convolve(values, np.full(width, 1 / width), "valid")
        axes.plot(steps[width // 2:][:len(mean)], mean, color="tab:blue")
    for axes in places[len(series):]:
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()
