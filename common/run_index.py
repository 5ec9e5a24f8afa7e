"""<run>/index.html: every stage's numbers, pictures and files on one page; it needs no script and opens from disk."""
import html
import json
import time
from pathlib import Path
from urllib.parse import quote

from common.config import STAGES
from common.files import write_bytes
from common.guide import PURPOSE, command, duration

# what is shown on the page itself, by name; everything else is a link
PICTURES = ("contact_sheet.png", "curves.png", "plot.png", "probes.png", "examples.png")
FOLDERS = ("cold_start", "images", "samples")               # whose pictures are shown, too
MEANING = {
    "annotation_report.md": "agreement between the people who judged", "calibration.json": "score to label",
    "best.safetensors": "trainable weights, best on validation", "checkpoints": "what an interrupted run goes on from",
    "config.yaml": "settings: a config that repeats the stage", "cold_start": "the model before GRPO",
    "curves.png": "curves of metrics.jsonl", "groups.jsonl": "one line per LR image: candidates and labels",
    "judge": "the reward model", "judgements.jsonl": "what people said",
    "manifest.json": "numbers, command, commit, versions, hashes of inputs", "metrics.jsonl": "one line per step",
    "per_image.jsonl": "measured, per test image", "policy": "the tuned SR model",
    "quality.json": "statistics of the set", "report.html": "the report, one file", "results.json": "all numbers",
    "samples": "the same inputs at each evaluation",
    "samples.jsonl": "what the judge wrote while it learned", "scores.jsonl": "each candidate's scores and reply",
    "skipped.jsonl": "files left out, and why", "table.md": "the tables", "tensorboard": "event files",
    "wandb": "runs of Weights & Biases"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7e; --line: #dde3ea; --paper: #fff; --card: #f5f7fa;
        --accent: #2a5fb0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf2; --soft: #9aa8ba; --line: #2f3947; --paper: #12171e;
        --card: #1b222c; --accent: #7fb0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 1080px; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
       background: var(--paper) }
h1 { font-size: 1.7rem } h2 { margin: 2.4rem 0 .3rem; font-size: 1.25rem; border-top: 1px solid var(--line);
     padding-top: 1.4rem } p, li, td + td, figcaption { color: var(--soft) } a { color: var(--accent) }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 0 1.6rem; margin: .8rem 0 }
.numbers div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
               padding: .2rem 0; font-size: .92rem } .numbers span { color: var(--soft) }
.numbers b { text-align: right; overflow-wrap: anywhere }
ul { columns: 2; padding-left: 1.1rem; font-size: .92rem }
figure { margin: 1rem 0 }
img { max-width: 100%; max-height: 60rem; background: #fff; border-radius: 6px }
code { background: var(--card); padding: .15rem .4rem; border-radius: 4px }
.missing { background: var(--card); border-radius: 10px; padding: .7rem 1rem }
@media (max-width: 640px) { ul { columns: 1 } body { padding: .8rem } }
"""


def write(run_folder: Path) -> None:
    """Write index.html anew from what lies in the run's folders now."""
    parts = [section(run_folder, stem) for stem in STAGES]
    more = [path.parent for path in sorted(run_folder.glob("*/manifest.json")) if path.parent.name not in STAGES]
    parts += [f"<h2>{html.escape(folder.name)}</h2>{finished(folder)}" for folder in more]
    title = html.escape(f"RefReward-SR: {run_folder.resolve().name}")
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
            f"<h1>{title}</h1><p>Written {time.strftime('%Y-%m-%d %H:%M')}, when the last of these stages ended.</p>"
            f"{''.join(parts)}</body></html>\n")
    write_bytes(run_folder / "index.html", page.encode())


def section(run_folder: Path, stem: str) -> str:
    """A stage of the pipeline: what it left, or the command that makes it."""
    folder, head = run_folder / stem, f"<h2>{stem}</h2><p>{PURPOSE[stem]}.</p>"
    if (folder / "manifest.json").exists():
        return head + finished(folder)
    state = "begun, not finished" if folder.exists() else "not yet run"
    return f'{head}<p class="missing">{state}: <code>{html.escape(command(stem))}</code></p>'


def finished(folder: Path) -> str:
    """Numbers, pictures and links of a folder with a manifest."""
    try:
        record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        head = numbers(record)
    except (ValueError, KeyError) as error:                     # of another stage: no reason to stop this one
        head = f'<p class="missing">manifest.json is damaged: {html.escape(repr(error))}</p>'
    return head + pictures(folder) + files(folder)


def numbers(record: dict) -> str:
    """Headline numbers of a manifest, and what they were made with."""
    commit = (record["git"]["commit"] or "no git")[:7] + (", changed files" if record["git"]["dirty"] else "")
    about = (f"{duration(record['seconds'])} since its last start, {record['world_size']} process(es), "
             f"{record['device']}, {record['peak_memory_gb']:.1f} GB, commit {commit}")
    cells = "".join(f"<div><span>{html.escape(key)}</span><b>{html.escape(text(value))}</b></div>"
                    for key, value in record["results"].items())
    return f'<p>{html.escape(about)}</p><div class="numbers">{cells}</div>'


def text(value: object) -> str:
    """A number or a list or a table of numbers as a person would write it; none: was not measured."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def pictures(folder: Path) -> str:
    """The stage's own pictures, then those of its folders: a contact sheet and curves, or else the newest."""
    shown = [folder / name for name in PICTURES if (folder / name).exists()]
    for inner in (folder / name for name in FOLDERS):
        own = [inner / name for name in PICTURES if (inner / name).exists()]
        shown += own or sorted(inner.glob("*.png"))[-1:]
    return "".join(f'<figure><a href="{link(path, folder)}"><img loading="lazy" alt="{label(path, folder)}" '
                   f'src="{link(path, folder)}"></a><figcaption>{label(path, folder)}</figcaption></figure>'
                   for path in shown)


def files(folder: Path) -> str:
    """A link to each file and folder right inside a stage's folder, reports first."""
    found = [path for path in folder.iterdir() if path.suffix != ".tmp" and not path.name.startswith(".")]
    found.sort(key=lambda path: (path.is_dir(), path.suffix not in (".html", ".md"), path.name))
    items = []
    for path in found:
        count = f" ({sum(1 for _ in path.iterdir())} entries)" if path.is_dir() else ""
        meaning = f": {MEANING[path.name]}" if path.name in MEANING else ""
        items.append(f'<li><a href="{link(path, folder)}">{label(path, folder)}</a>{count}{html.escape(meaning)}</li>')
    return f"<ul>{''.join(items)}</ul>"


def link(path: Path, folder: Path) -> str:
    """A path relative to the run's folder, as a browser takes it."""
    return quote(path.relative_to(folder.parent).as_posix()) + "/" * path.is_dir()


def label(path: Path, folder: Path) -> str:
    return html.escape(path.relative_to(folder).as_posix() + "/" * path.is_dir())
