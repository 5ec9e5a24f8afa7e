"""How stage 03 shows its results: table.md, plot.png and examples.png."""
import io
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from common import metrics, mllm
from common.groups import group_images

# scorer -> (name, what it sees), in the order of table and plot
SCORERS = {
    "judge": ("judge", "LR, candidate"),
    "before_grpo": ("judge before GRPO", "LR, candidate"),
    "lr_shuffled": ("judge, LR of another group", "wrong LR, candidate"),
    "lr_gray": ("judge, gray LR (LR-blind)", "candidate"),
    "method_prior": ("method prior", "name of the method, no pixel"),
    "psnr": ("PSNR (full-reference)", "ground truth, candidate"),
    "ssim": ("SSIM (full-reference)", "ground truth, candidate"),
    "lr_psnr": ("LR-PSNR", "LR, candidate"),
    "sharpness": ("sharpness", "candidate")}
SHOWN = {"overall": "#20639b", "consistency": "#23857b", "naturalness": "#c26a00"}     # axes and colors


def interval(found: dict) -> str:
    """A rate {value, ci95} as a table cell; a single group or image has no interval."""
    if found["value"] is None or found["ci95"] is None:
        return "-" if found["value"] is None else f"{found['value']:.3f}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(found["value"], *found["ci95"])


def told(reply: str) -> str:
    """A reply for people: its reasoning and digits without the tags, or that it is not in the asked form."""
    match = mllm.ANSWER.fullmatch(reply)
    if not match:
        return f"not in the asked form: {' '.join(reply.split())}"
    digits = ", ".join(f"{axis} {digit}" for axis, digit in zip(metrics.AXES, match.groups()[1:]))
    return f"\"{' '.join(match[1].split())}\" {digits}"


def table(head: list[str], rows: list[list]) -> list[str]:
    """Lines of a markdown table, and an empty one."""
    rows = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |" for row in rows), ""]


def markdown(results: dict) -> str:
    """table.md: what a reader wants to see of results.json."""
    lines = ["# Reward model on unseen photographs", "", f"{results['summary']}.", ""]
    rows = [[*SCORERS[name], *(interval(found[axis]) for axis in SHOWN)]
            for name in SCORERS if (found := results["accuracy"].get(name))]
    lines += ["## Pair accuracy", ""]
    lines += table(["pair accuracy [95 % interval over groups]", "sees", *SHOWN], rows)
    rows = [[SCORERS[name][0], *(interval(found[axis]) for axis in SHOWN)]
            for name, found in results["judge_minus"].items()]
    lines += table(["the judge is better, on the same pairs, than", *SHOWN], rows)
    rows = [[axis, f"{row['from']:g} .. {row['to']:g} in {row['gap']}", row["pairs"], interval(row)]
            for axis in SHOWN for row in results["judge_by_gap"][axis]]
    lines += ["## By the gap between the labels", ""]
    lines += table(["axis", "gap between the two labels", "pairs", "judge"], rows)
    if results["readouts"]:
        found = results["readouts"]
        rows = [[axis, *(interval(found["accuracy"][kind][axis]) for kind in ("sampled", "expected")),
                 found["correlation"][axis], *((found["difference"][axis] or {}).get(key)
                                               for key in ("mean", "mean_absolute"))] for axis in SHOWN]
        lines += ["## Two read-outs", "",
                  f"On {found['groups']} groups: mean of {found['replies_per_candidate']} sampled replies "
                  f"({found['parse_rate']:.1%} of them parse), and expectation over the digits, "
                  f"which hold {found['digit_mass']:.1%} of the probability of all tokens there.", "",
                  *table(["axis", "sampled", "expected", "correlation", "sampled - expected, mean", "mean absolute"],
                         rows)]
    return "\n".join(lines + [f"- {note}" for note in results["notes"]]).rstrip() + "\n"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def error_bars(rates: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Values [n], and the distances [2, n] to the ends of their intervals; NaN where there are none."""
    ends = np.array([[rate["value"], *(rate["ci95"] or [None, None])] for rate in rates], dtype=float)
    return ends[:, 0], np.abs(ends[:, 1:] - ends[:, :1]).T


def plot(results: dict) -> bytes:
    """PNG. Left: pair accuracy of all scorers; right: the judge's by the gap between the labels of a pair."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    figure.suptitle(results["summary"], fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    names = [name for name in SCORERS if name in results["accuracy"]]
    for i, (axis, color) in enumerate(SHOWN.items()):
        places = np.arange(len(names)) + 0.27 * (i - 1)
        values, errors = error_bars([results["accuracy"][name][axis] for name in names])
        left.barh(places, values, 0.25, xerr=errors, color=color, label=axis,
                  error_kw={"lw": 1, "capsize": 2})
        for place, value in zip(places, values):
            if not np.isnan(value):
                left.text(0.01, place, f"{value:.2f}", va="center", fontsize=8, color="white")
        rows = results["judge_by_gap"][axis]
        if rows:
            values, errors = error_bars(rows)
            places = np.array([row["quarter"] for row in rows]) + 0.06 * (i - 1)
            right.errorbar(places, values, errors, color=color, marker="o", capsize=3)
    left.axvline(0.5, color="black", lw=1, ls="--")
    left.set_yticks(range(len(names)), [SCORERS[name][0] for name in names])
    left.invert_yaxis()
    left.set(xlim=(0, 1), xlabel="pair accuracy, 95 % interval over groups (dashed: chance)")
    right.axhline(0.5, color="black", lw=1, ls="--")
    right.set_xticks(range(1, 5), ["smallest\nquarter", "second", "third", "largest\nquarter"])
    right.set(xlim=(0.6, 4.4), ylim=(0, 1.02), ylabel="pair accuracy of the judge",
              xlabel="pairs by the gap between their two labels")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN))
    return png(figure)


def examples(source: Path, groups: list[dict], *, scores: np.ndarray, ranks: np.ndarray, axis: str) -> bytes:
    """
    PNG, a row per group: LR, then the candidates, the judge's best first, framed from green (rank 1) to red.

    scores, ranks: [G, C] of the judge and of the labels on the axis.
    """
    count = ranks.shape[1]
    figure = Figure(figsize=(2.1 * (count + 1), 2.65 * len(groups) + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    figure.suptitle(f"Sorted by the judge ({axis}): its best candidate on the left, its worst on the right.\n"
                    "Frame: the label, from green = best to red = worst.", fontsize=11)
    for g, group in enumerate(groups):
        lr, images, _ = group_images(source, group)
        own = group["labels"][axis].get("scores") or [None] * count
        first = g * (count + 1) + 1
        cells = [figure.add_subplot(len(groups), count + 1, first + i) for i in range(count + 1)]
        cells[0].imshow(lr, interpolation="nearest")
        cells[0].set_xlabel(f"LR, {lr.shape[1]} x {lr.shape[0]} px\n{group['source'][-24:]}\n{group['id']}")
        for cell, c in zip(cells[1:], np.argsort(-scores[g], kind="stable")):
            cell.imshow(images[c], interpolation="nearest")
            label = f"label rank {ranks[g, c]:g}" + (f" ({own[c]:.2f})" if own[c] is not None else "")
            cell.set_xlabel(f"judge {scores[g, c]:.2f}\n{label}\n{group['candidates'][c]['method'][:26]}")
            shade = colormaps["RdYlGn"](1 - (ranks[g, c] - 1) / max(ranks[g].max() - 1, 1))
            cell.spines[:].set(color=shade, linewidth=5)
        for cell in cells:
            cell.set(xticks=[], yticks=[])
    return png(figure)
