"""
Numbers of stage 05 beyond means: luck of the seed, degradation strength, other step counts, cost.

Shapes: n test images, V variants, M seeds, K metrics. Intervals are 95 % paired bootstraps over images.
"""
import io
import math

import numpy as np
from matplotlib.figure import Figure

from common import metrics

DRAWN = ("reward", "heldout", "lr_psnr", "psnr")                # plotted
KINDS = ("best", "mean", "worst")
STRENGTHS = ("mild", "middle", "strong")
LINES = {"best": (0, (4, 2)), "mean": "-", "worst": (0, (1, 1.5))}
COLORS = ("#8a94a3", "#2a5fb0", "#b06a2a")                      # base, tuned, hybrid


def of_draws(values: np.ndarray) -> dict[str, np.ndarray]:
    """
    Best@m, Mean@m, Worst@m of values [.., M], each [.., M] for m = 1..M, as DP2O-SR (arXiv 2510.18851) plots them.

    Expected maximum, mean, minimum of m of the M samples, drawn without repetition: the mean over all subsets, as the
    i-th smallest is the largest of C(i - 1, m - 1) of the C(M, m).
    """
    ordered, count = np.sort(values, -1), values.shape[-1]
    chance = np.array([[math.comb(i, m - 1) / math.comb(count, m) for i in range(count)] for m in range(1, count + 1)])
    mean = np.repeat(values.mean(-1, keepdims=True), count, -1)
    return {"best": ordered @ chance.T, "mean": mean, "worst": ordered[..., ::-1] @ chance.T}


def change(before: np.ndarray, after: np.ndarray, seed: int) -> dict:
    """{gain, ci95} of after - before, each [n]; no interval for a single image."""
    gains = after - before
    ends = [round(end, 4) for end in metrics.bootstrap_ci(gains, seed)] if len(gains) > 1 else None
    return {"gain": round(float(gains.mean()), 4), "ci95": ends}


def by_draws(samples: np.ndarray, variants: list[str], names: list[str], seed: int) -> dict:
    """
    Metric of DRAWN -> best, mean, worst -> {variant: [M] means, <variant>_gain: [M] of change}; samples [n, V, M, K].

    The gain is of every variant but the first, base, over it, with m = 1..M samples each.
    """
    found = {}
    for name in DRAWN:
        drawn = of_draws(samples[..., names.index(name)])                                       # [n, V, M] each
        found[name] = {kind: {
            **{variant: drawn[kind][:, v].mean(0).round(4).tolist() for v, variant in enumerate(variants)},
            **{f"{variant}_gain": [change(drawn[kind][:, 0, m], drawn[kind][:, v, m], seed)
                                   for m in range(samples.shape[2])]
               for v, variant in enumerate(variants) if v}} for kind in KINDS}
    return found


def compare(values: np.ndarray, variants: list[str], names: list[str], seed: int) -> dict:
    """{mean, gain} of values [n, V, K]: means per variant, and of every variant but the first its gain over that."""
    return {"mean": {variant: dict(zip(names, values[:, v].mean(0).round(4).tolist()))
                     for v, variant in enumerate(variants)},
            "gain": {variant: {name: change(values[:, 0, k], values[:, v, k], seed) for k, name in enumerate(names)}
                     for v, variant in enumerate(variants) if v}}


def by_strength(lr_psnr_of_hr: np.ndarray, values: np.ndarray, variants: list[str], names: list[str],
                seed: int) -> list[dict]:
    """
    One entry per tercile of degradation strength: {strength, lr_psnr_of_hr, images, mean, gain} from values [n, V, K].

    The strength of an image's degradation is minus the LR-PSNR of its ground truth: how far LR is from the plainly
    down-sampled ground truth, in dB. It needs no parameters, so it orders imported pairs, too.
    """
    order = np.argsort(-lr_psnr_of_hr, kind="stable")
    found = []
    for strength, rows in zip(STRENGTHS, np.array_split(order, min(len(STRENGTHS), len(order)))):
        ends = [round(float(end), 2) for end in (lr_psnr_of_hr[rows].min(), lr_psnr_of_hr[rows].max())]
        found.append({"strength": strength, "images": len(rows), "lr_psnr_of_hr": ends,
                      **compare(values[rows], variants, names, seed)})
    return found


def plot_draws(draws: dict, titles: dict[str, str], variants: list[str]) -> bytes:
    """PNG: for each metric of by_draws, Best@m, Mean@m, Worst@m over the number of seeds m."""
    figure = Figure(figsize=(3.6 * len(titles), 3.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items()):
        for variant, color in zip(variants, COLORS):
            for kind, line in LINES.items():
                values = draws[name][kind][variant]
                axes.plot(range(1, len(values) + 1), values, color=color, linestyle=line, marker="o", markersize=3,
                          label=f"{variant}, {kind}")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("seeds", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(variants), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
