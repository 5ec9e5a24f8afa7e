"""
Which candidates an annotator compares next: a function of the seed, the annotator and the judgements so far.

1. A screen that was begun, or whose answer was taken back, comes first, so that a reload goes on where it stopped.
2. In every PERIOD screens one is a hidden repeat of an own screen at least GAP screens old, by turns in the same and
   in the opposite order (self-consistency, bias to one side), and one was judged by somebody else (agreement).
3. Else a group with the fewest screens so far, so that every group is seen once before any is seen twice, and in it
   the candidates that connect most of what was not yet compared, directly or through others; once all hang together,
   those that were compared least and are closest in rank.
"""
import hashlib
import itertools
from collections import Counter, defaultdict

import numpy as np
from scipy.stats import rankdata

from common import run
from common.judgements import ASKED, components, count_parts, live, verdicts

PERIOD, REPEAT_AT, SHARED_AT = 8, 7, 3      # screens; places in the period
GAP = 5                                     # screens


def next_task(groups: dict[str, list[str]], lines: list[dict], annotator: str, *, seed: int,
              shown: int) -> dict | None:
    """
    {id, group, candidates in the order to show, repeat_of, open: axes to be asked}, or None if nothing is left.

    groups: group id -> ids of its candidates. lines: of judgements.jsonl. shown: candidates at once.
    """
    judged = [judgement for judgement in live(lines) if judgement["group"] in groups]
    begun = unfinished(lines, judged, annotator)
    if begun and begun["group"] in groups:                                     # groups may have become fewer
        return begun
    tasks = {judgement["task"]: judgement for judgement in judged}             # screen -> its last judgement
    mine = [task for task in tasks.values() if task["annotator"] == annotator]
    rng = run.np_rng(seed, "annotate", annotator, len(mine))
    seen = {(task["group"], frozenset(task["candidates"])) for task in mine}
    found = None
    if len(mine) % PERIOD == REPEAT_AT:
        found = repeat(mine, rng)
    elif len(mine) % PERIOD == SHARED_AT:
        others = [task for task in tasks.values() if task["annotator"] != annotator and not task["repeat_of"]
                  and len(task["candidates"]) == shown
                  and (task["group"], frozenset(task["candidates"])) not in seen]
        found = shuffled(others[rng.integers(len(others))], rng) if others else None
    found = found or fresh(groups, judged, seen, rng=rng, shown=shown)
    if found is None:
        return None
    key = repr((annotator, len(mine), found))
    return {"id": hashlib.sha256(key.encode()).hexdigest()[:16], **found, "open": axes_for(annotator)}


def axes_for(annotator: str) -> list[str]:
    """The order of the questions: one for all screens of a person, balanced over people."""
    return list(ASKED[::1 - 2 * (run.stable_seed(0, "axes", annotator) % 2)])


def unfinished(lines: list[dict], judged: list[dict], annotator: str) -> dict | None:
    """The screen of this annotator's last line (of the judgement that it takes back), if an axis is open."""
    own = [line for line in lines if line["annotator"] == annotator]
    if not own:
        return None
    by_id = {line["id"]: line for line in own}
    last = by_id[own[-1].get("revokes", own[-1]["id"])]
    answered = {j["axis"] for j in judged if j["task"] == last["task"] and j["annotator"] == annotator}
    left = [axis for axis in axes_for(annotator) if axis not in answered]
    return {"id": last["task"], "group": last["group"], "candidates": last["candidates"],
            "repeat_of": last["repeat_of"], "open": left} if left else None


def repeat(mine: list[dict], rng: np.random.Generator) -> dict | None:
    """An own screen again, by turns as it was and in the opposite order."""
    repeated = [task["repeat_of"] for task in mine if task["repeat_of"]]
    old = [task for task in mine[:-GAP] if not task["repeat_of"] and task["task"] not in repeated]
    if not old:
        return None
    task = old[rng.integers(len(old))]
    order = task["candidates"][::1 if len(repeated) % 2 else -1]
    return {"group": task["group"], "candidates": order, "repeat_of": task["task"]}


def shuffled(task: dict, rng: np.random.Generator) -> dict:
    names = sorted(task["candidates"])
    return {"group": task["group"], "candidates": [names[i] for i in rng.permutation(len(names))], "repeat_of": None}


def fresh(groups: dict[str, list[str]], judged: list[dict], seen: set[tuple], *, rng: np.random.Generator,
          shown: int) -> dict | None:
    """Candidates that this annotator has not seen together, of a group with as few screens as possible."""
    by_group = sort_by_group(judged)
    screens = {group: len({j["task"] for j in by_group[group]}) for group in groups}
    order = rng.permutation(len(groups))
    names = list(groups)
    for group in sorted((names[i] for i in order), key=screens.get):
        members = groups[group]
        choices = [choice for choice in itertools.combinations(sorted(members), min(shown, len(members)))
                   if (group, frozenset(choice)) not in seen]
        if choices:
            costs = [cost(choice, members, by_group[group]) for choice in choices]
            best = [choice for choice, own in zip(choices, costs) if own == min(costs)]
            return shuffled({"group": group, "candidates": best[rng.integers(len(best))]}, rng)
    return None


def sort_by_group(judged: list[dict]) -> dict[str, list[dict]]:
    """Group id -> its judgements, hidden repeats left out."""
    found = defaultdict(list)
    for judgement in judged:
        if not judgement["repeat_of"]:
            found[judgement["group"]].append(judgement)
    return found


def cost(choice: tuple[str, ...], members: list[str], judged: list[dict]) -> tuple[float, float]:
    """Lower is better: minus the connections that it makes, then how often compared plus distance in rank."""
    links, times, wins = 0, Counter(), Counter(dict.fromkeys(members, 0))
    for axis in ASKED:
        own = [verdict for j in judged if j["axis"] == axis for verdict in verdicts(j)]
        part = components(members, {(a, b) for a, b, _ in own})
        links += len({part[name] for name in choice}) - 1
        for a, b, better in own:
            times[a, b] += 1 / len(ASKED)
            wins.update({a: better - 0.5, b: 0.5 - better})
    place = dict(zip(wins, rankdata([-value for value in wins.values()], "dense").tolist()))
    pairs = list(itertools.combinations(choice, 2))
    return -links, sum(times[a, b] + abs(place[a] - place[b]) for a, b in pairs) / len(pairs)


def progress(groups: dict[str, list[str]], lines: list[dict], annotator: str) -> dict:
    """What the page shows: own screens, and over all annotators how many groups were seen and can be ranked."""
    judged = [judgement for judgement in live(lines) if judgement["group"] in groups]
    by_group = sort_by_group(judged)
    parts = {group: count_parts(names, by_group[group]) for group, names in groups.items()}
    missing = sum(int(own.sum() - len(own)) for own in parts.values())
    needed = sum(len(ASKED) * (len(names) - 1) for names in groups.values())
    return {"mine": len({j["task"] for j in judged if j["annotator"] == annotator}), "groups": len(groups),
            "seen": sum(bool(by_group[group]) for group in groups),
            "ranked": sum(bool((own == 1).all()) for own in parts.values()),
            "share": round(1 - missing / needed, 4)}
