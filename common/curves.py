"""curves.png: what metrics.jsonl of 02, of 04 and of its cold start holds, as small plots on one page."""
import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common import dist
from common.files import log_metrics, write_bytes

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
        write(folder)


def write(folder: Path) -> None:
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
        draw(axes, {key: series[key] for key in keys})
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


def draw(axes, series: dict[str, np.ndarray]) -> None:
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
