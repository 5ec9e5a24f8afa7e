"""table.md and report.html of stage 03: everything that it measured about the judge."""
import html
from pathlib import Path

import numpy as np

from common import report, reward_report
from common.candidates import PROBES
from common.reward_report import SHOWN, interval, table

INTRO = """<p>How far can the reward model be trusted? It was asked about photographs that it never saw in training.
Pair accuracy: how often it orders two candidates of one low-resolution image as the labels do; 0.5 is chance.</p>"""


def probe_lines(found: dict) -> list[str]:
    """The table of hacking probes."""
    rows = [[name, how, interval(found["each"][name]["overall"]), f"{interval(found['each'][name][axis])} ({axis})",
             f"{found['mean_scores'][name]['overall']:.2f}"] for name, (axis, how) in PROBES.items()]
    rows.append(["all", "", interval(found["all"]), "", ""])
    return ["## Hacking probes", "", f"How often the judge scores the ground truth of {found['groups']} LR images, "
            f"{found['mean_scores']['hr']['overall']:.2f} overall on average, above a tampered version of it.", "",
            *table(["probe", "made how", "by the overall score", "by the axis that it hurts", "mean overall"], rows)]


def correlation_lines(results: dict) -> list[str]:
    """Correlations inside groups, and accuracy with ties."""
    names = {"srcc": "Spearman's", "plcc": "Pearson's", "krcc": "Kendall's tau-b"}
    rows = [[name, *(interval(results["correlation"][kind][axis]) for axis in SHOWN)] for kind, name in names.items()]
    lines = ["## Correlations and ties", ""]
    lines += table(["correlation inside a group, mean over groups", *SHOWN], rows)
    rows = [[axis, interval(own), own["pairs"], own["tied"], own["gap"]]
            for axis, own in ((axis, results["ties"][axis]) for axis in SHOWN)]
    return [*lines, "With ties (arXiv 2305.14324): all pairs count; one is right if both sides tie it or both order "
            "it alike. The judge ties two scores at most a gap apart: the gap that was best on validation.", "",
            *table(["axis", "accuracy with ties", "pairs", "tied by the labels", "gap"], rows)]


def method_lines(found: dict) -> list[str]:
    """Accuracy by method of a candidate."""
    rows = [[row["method"], "yes" if row["in_training"] else "no", row["candidates"], row["pairs"], interval(row)]
            for row in found["each"]]
    own = found["held_out"]
    told = (f"Pairs with a method that training never showed: {own['pairs']}, accuracy {interval(own)}." if own["pairs"]
            else "Every method of the test split occurs in training: nothing here is a held-out method.")
    near = found["within_tier"]
    if near["pairs"]:
        told += (f" Within a tier, the {near['pairs']} pairs whose methods' mean labels differ by at most "
                 f"{near['prior_gap']}: judge {interval(near['judge'])}, method prior "
                 f"{interval(near['method_prior'])}.")
    head = ["pairs with a candidate of method", "in training", "candidates", "pairs", "accuracy, overall"]
    return ["## By method", "", *table(head, rows), told, ""]


def pair_lines(found: dict | None) -> list[str]:
    """A model that was asked in pairs, beside the judge on the same groups."""
    if not found:
        return []
    rows = [[axis, *(interval(found[key][axis]) for key in ("accuracy", "judge_accuracy", "swap_consistency")),
             found["first_place"][axis]] for axis in SHOWN]
    return ["## Pair mode", "",
            f"{found['model']} was asked for the better of each two candidates of {found['groups']} groups, in both "
            "orders. An answer that changes with the order counts half.", "",
            *table(["axis", "accuracy in pairs", "judge, same pairs", "same answer in both orders", "answers A"], rows)]


def calibration_lines(found: dict) -> list[str]:
    """Errors before and after the isotonic map."""
    order = [(kind, when) for kind in ("mae", "rmse") for when in ("before", "after")]
    rows = [[axis, own["fitted_on"], *(f"{own[when][kind]:.3f}" for kind, when in order)]
            for axis in SHOWN if (own := found[axis])]
    head = ["error of the score as a label", "fitted on", *(f"{kind.upper()} {when}" for kind, when in order)]
    return ["## Calibration", "",
            "judge/calibration.json of 02 is an isotonic map from expected score to label, fitted on candidates "
            "of the validation split, tested here. Before: 1..9 stretched over the range of the labels.", "",
            *table(head, rows)] if rows else []


def case_title(case: dict) -> str:
    return (f"What the judge wrote: the group that it ordered {case['kind']} of those with sampled replies, "
            f"{case['group']}, pair accuracy {case['accuracy']:.2f}")


def case_figures(found: list[dict], views: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """The same with pictures, for the report; views: group -> LR and candidate id -> image."""
    parts = []
    for case in found:
        shown, below = {"LR": views[case["group"]]["LR"]}, {}
        for place, row in enumerate(case["candidates"], 1):
            name, reply = f"{place}. {row['method']}", html.escape(reward_report.told(row["replies"][0]))
            shown[name] = views[case["group"]][row["candidate"]]
            below[name] = f"score {row['score']:.2f}, label rank {row['label_rank']:g}<br><i>{reply}</i>"
        parts.append(f"<h2>{html.escape(case_title(case))}</h2><figure>{report.row(shown, below)}</figure>")
    return parts


def case_lines(found: list[dict]) -> list[str]:
    """What the judge wrote about the group that it ordered best, and the one that it ordered worst."""
    lines = []
    for case in found:
        rows = [[row["method"], f"{row['score']:.2f}", f"{row['label_rank']:g}",
                 reward_report.told(row["replies"][0]).replace("|", " ")] for row in case["candidates"]]
        lines += [f"## {case_title(case)}", "",
                  *table(["candidate", "expected score", "label rank", "first sampled reply"], rows)]
    return lines


def markdown(results: dict, costs: dict) -> str:
    """table.md."""
    lines = probe_lines(results["probes"]) if results["probes"] else []
    lines += correlation_lines(results) + method_lines(results["methods"]) + calibration_lines(results["calibration"])
    lines += pair_lines(results["pair_mode"])
    kinds = list(dict.fromkeys(key.rpartition("_")[0] for key in costs))
    rows = [[kind.replace("_", " "), costs[f"{kind}_p50"], costs[f"{kind}_p95"]] for kind in kinds]
    lines += ["## Cost", "", *table(["one candidate at a time", "median", "95th percentile"], rows)]
    lines += case_lines(results["cases"])
    return reward_report.markdown(results) + "\n" + "\n".join(lines).rstrip() + "\n"


def page(folder: Path, results: dict, costs: dict, views: dict[str, dict[str, np.ndarray]]) -> bytes:
    """report.html, with the pictures that lie in the folder by now; views: of the groups of results["cases"]."""
    found, probed = results["accuracy"]["judge"]["overall"], results["probes"]
    numbers = (found["value"], probed and probed["all"]["value"], results["srcc"]["overall"])
    shown = ["-" if number is None else f"{number:.3f}" for number in numbers]
    cards = [("pair accuracy", shown[0], "overall, unseen photographs"),
             ("probes below the truth", shown[1], "tampered images scored below the ground truth"),
             ("rank correlation", shown[2], "Spearman's, mean over groups")]
    pictures = {"plot.png": "Pair accuracy", "probes.png": "Hacking probes", "examples.png": "Sorted by the judge"}
    parts = [INTRO, f"<p>{html.escape(results['summary'])}.</p>", report.cards(cards)]
    for name, title in pictures.items():
        if (folder / name).exists():
            tag = report.png_tag((folder / name).read_bytes(), title)
            parts.append(f'<h2>{title}</h2><div class="plot">{tag}</div>')
    parts += case_figures(results["cases"], views)
    parts += ["<h2>In numbers</h2>", report.from_markdown(markdown(results | {"cases": []}, costs))]
    return report.page("The reward model on unseen photographs", parts).encode()
