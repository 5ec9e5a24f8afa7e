"""
How far annotators agree, with themselves and with each other: annotation_report.json and .md.

Agreement is counted over pairs of candidates. Chance: two people who answer at random, with the overall share of ties
and no favorite, agree at the rate t^2 + (1 - t)^2 / 2; kappa = (rate - chance) / (1 - chance), as Scott 1955 and Cohen
1960 do for categories. Kendall's W is computed from Friedman's statistic of complete rankings, corrected for ties.
"""
import itertools
from collections import defaultdict

import numpy as np
from scipy.stats import binomtest, friedmanchisquare

from common.judgements import ASKED, verdicts

# our rules of thumb for whom to doubt
FEW_REPEATS, LEAST_SELF = 6, 0.6        # repeated pairs; rate of agreement with oneself
FEW_SHARED, LEAST_KAPPA = 12, 0.2       # pairs shared with others
SIDE_P, LEAST_SECONDS = 0.001, 1.0      # chance of such a leaning to one side; median time of a judgement


def kappa(rate: float, ties: float) -> float | None:
    """Agreement corrected for chance; ties: share of ties among the answers. None where chance is 1."""
    chance = ties**2 + (1 - ties) ** 2 / 2
    return None if chance == 1 else (rate - chance) / (1 - chance)


def shared_pairs(judged: list[dict]) -> list[tuple[str, str, str, bool, list[float]]]:
    """(axis, annotator, other, whether they agree, both answers) for every pair of candidates that two judged."""
    answers = defaultdict(dict)
    for j in judged:
        if not j["repeat_of"]:
            for a, b, better in verdicts(j):
                answers[j["axis"], j["group"], a, b][j["annotator"]] = better
    return [(key[0], x, y, own[x] == own[y], [own[x], own[y]])
            for key, own in answers.items() for x, y in itertools.combinations(sorted(own), 2)]


def repeated_pairs(judged: list[dict]) -> list[tuple[str, str, bool, list[float]]]:
    """(axis, annotator, whether the repeat agrees, both answers) for every pair of candidates shown twice."""
    first = {(j["task"], j["axis"]): j for j in judged}
    found = []
    for j in judged:
        before = first.get((j["repeat_of"], j["axis"]))
        if before:
            old = {(a, b): better for a, b, better in verdicts(before)}
            found += [(j["axis"], j["annotator"], old[a, b] == better, [old[a, b], better])
                      for a, b, better in verdicts(j) if (a, b) in old]
    return found


def rate(found: list[tuple[bool, list[float]]]) -> dict:
    """{pairs, rate, kappa} of (agree, answers) items."""
    if not found:
        return {"pairs": 0, "rate": None, "kappa": None}
    share = float(np.mean([agree for agree, _ in found]))
    ties = float(np.mean([answer == 0.5 for _, both in found for answer in both]))
    corrected = kappa(share, ties)
    return {"pairs": len(found), "rate": round(share, 4), "kappa": None if corrected is None else round(corrected, 4)}


def kendall_w(rankings: np.ndarray) -> float | None:
    """Concordance 0..1 of rankings [annotators, candidates], two and three or more; None if all tie everything."""
    raters, count = rankings.shape
    if not np.ptp(rankings, axis=1).any():
        return None                                                 # 0 / 0
    return float(friedmanchisquare(*rankings.T).statistic) / (raters * (count - 1))


def concordance(groups: dict[str, list[str]], judged: list[dict], axis: str) -> dict:
    """{groups, kendall_w: mean} over the groups of which two or more annotators compared all pairs of candidates."""
    wins = defaultdict(dict)
    for j in judged:
        if j["axis"] == axis and not j["repeat_of"]:
            wins[j["group"], j["annotator"]].update({(a, b): better for a, b, better in verdicts(j)})
    rankings = defaultdict(list)
    for (group, _), own in wins.items():
        names = groups[group]
        if len(names) >= 3 and len(own) == len(names) * (len(names) - 1) // 2:
            rankings[group].append([sum(better if name == a else 1 - better for (a, b), better in own.items()
                                        if name in (a, b)) for name in names])
    values = [kendall_w(np.array(own)) for own in rankings.values() if len(own) >= 2]
    values = [value for value in values if value is not None]
    return {"groups": len(values), "kendall_w": round(float(np.mean(values)), 4) if values else None}


def side(judged: list[dict]) -> dict:
    """How often the left of two was preferred to the right one, and the chance of that without a leaning."""
    left = [j["ranks"] == [1, 2] for j in judged if j["ranks"] in ([1, 2], [2, 1])]
    p = float(f"{binomtest(sum(left), len(left)).pvalue:.3g}") if left else None
    return {"pairs": len(left), "left": round(float(np.mean(left)), 4) if left else None, "p": p}


def annotator(name: str, judged: list[dict], *, shared: list[tuple], repeated: list[tuple]) -> dict:
    """What is known of one annotator, and `doubts`: reasons to call the judgements unreliable."""
    own = [j for j in judged if j["annotator"] == name]
    facts = {"judgements": len(own), "cannot_tell": sum(j["ranks"] is None for j in own),
             "median_seconds": round(float(np.median([j["seconds"] for j in own])), 2),
             "with_oneself": rate([item[2:] for item in repeated if item[1] == name]),
             "with_others": rate([item[3:] for item in shared if name in item[1:3]]), "side": side(own)}
    doubts = []
    again, others, leaning = facts["with_oneself"], facts["with_others"], facts["side"]
    if again["pairs"] >= FEW_REPEATS and again["rate"] < LEAST_SELF:
        doubts.append(f"only {again['rate']:.0%} of {again['pairs']} repeated pairs were answered alike")
    if others["pairs"] >= FEW_SHARED and others["kappa"] is not None and others["kappa"] < LEAST_KAPPA:
        doubts.append(f"agrees with others on {others['rate']:.0%} of {others['pairs']} pairs, hardly above chance")
    if leaning["pairs"] and leaning["p"] < SIDE_P:
        doubts.append(f"prefers the left one in {leaning['left']:.0%} of {leaning['pairs']} pairs")
    if facts["median_seconds"] < LEAST_SECONDS:
        doubts.append(f"takes {facts['median_seconds']} seconds per judgement")
    return facts | {"doubts": doubts}


def report(groups: dict[str, list[str]], judged: list[dict], without: list[str]) -> dict:
    """annotation_report.json without the labels. without: annotators whose judgements were left out of the labels."""
    shared, repeated = shared_pairs(judged), repeated_pairs(judged)
    axes = {axis: {"judgements": sum(j["axis"] == axis for j in judged),
                   "between_annotators": rate([item[3:] for item in shared if item[0] == axis]),
                   "with_oneself": rate([item[2:] for item in repeated if item[0] == axis]),
                   **concordance(groups, judged, axis)} for axis in ASKED}
    names = sorted({j["annotator"] for j in judged})
    return {"axes": axes, "left_out": sorted(without), "annotators": {
        name: annotator(name, judged, shared=shared, repeated=repeated) for name in names}}


def markdown(found: dict) -> str:
    """annotation_report.md."""
    def cell(own: dict) -> str:
        chance = "" if own["kappa"] is None else f", kappa {own['kappa']:.2f}"
        return "-" if own["rate"] is None else f"{own['rate']:.2f}{chance} ({own['pairs']} pairs)"

    told = found["labels"]
    counts = ", ".join(f"{count} of {split}" for split, count in told["labeled_groups"].items())
    lines = ["# Human labels", "", f"Groups with labels: {counts}; {told['labeled_overall']} of them on both axes, "
             f"{told['pairs']} untied pairs overall.", "",
             "| axis | judgements | between annotators | with oneself | Kendall's W |", "| --- " * 5 + "|"]
    for axis, own in found["axes"].items():
        w = "-" if own["kendall_w"] is None else f"{own['kendall_w']:.2f} ({own['groups']} groups)"
        lines.append(f"| {axis} | {own['judgements']} | {cell(own['between_annotators'])} | "
                     f"{cell(own['with_oneself'])} | {w} |")
    lines += ["", "| annotator | judgements | cannot tell | median s | with others | with oneself | left | doubts |",
              "| --- " * 8 + "|"]
    for name, own in found["annotators"].items():
        left = "-" if own["side"]["left"] is None else f"{own['side']['left']:.2f} of {own['side']['pairs']}"
        out = ["left out of the labels"] * (name in found["left_out"])
        lines.append(f"| {name.replace('|', '/')} | {own['judgements']} | {own['cannot_tell']} | "
                     f"{own['median_seconds']} | {cell(own['with_others'])} | {cell(own['with_oneself'])} | {left} | "
                     f"{'; '.join(out + own['doubts']) or '-'} |")
    return "\n".join(lines) + "\n"
