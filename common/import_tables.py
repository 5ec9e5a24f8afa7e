"""
Readers of preference sets that are one table (`import_format: csv`, `mos`); common/imports.py writes what they return.

Each takes (place, roles, margin): import_from, the parsed import_roles and tie_margin, and returns groups
    {name, source, split | None, lr, hr | None, candidates [{method, file, extra}], labels {axis: label}, extra, where}
with paths as Path. Every field of the source is kept: in a label, in a vote, or under `extra`.
"""
from pathlib import Path

from common import metrics, votes
from common.metrics import AXES
from common.tables import choice, number, picture, read_table, stop_at

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test"}
OF_GROUP = ("hr", "source", "split")                    # optional columns of the tables `csv` and `mos`


def rank_label(ranks: list[float], extra: dict) -> dict:
    """A label from ranks (1 = best; ties allowed) of any numbers: their order counts, other numbers stay in extra."""
    order = metrics.ranks([-rank for rank in ranks], 1e-9)
    extra = extra | ({"ranks": ranks} if ranks != order else {})
    return {"ranks": order, "source": "import", "votes": None} | ({"extra": extra} if extra else {})


def score_label(scores: list[float], extra: dict) -> dict:
    """A label from scores, higher is better; only equal scores tie."""
    return {"ranks": metrics.ranks(scores, 1e-9), "scores": scores, "source": "import", "votes": None} | (
        {"extra": extra} if extra else {})


def table_groups(place: Path, rows: list[tuple[int, dict]]) -> dict[str, dict]:
    """lr -> an empty group with what OF_GROUP says, which must be the same on all lines of an LR image."""
    groups = {}
    for line, row in rows:
        own = {key: row.get(key) or None for key in OF_GROUP}
        if own["split"]:
            own["split"] = SPLIT_NAMES[choice(own["split"], tuple(SPLIT_NAMES), place, line=line, what="split")]
        found = groups.setdefault(row["lr"], {"given": own, "lines": []})
        if found["given"] != own:
            stop_at(place, line, f"{row['lr']} had other values of {', '.join(OF_GROUP)} on line {found['lines'][0][0]}",
                 do="make them the same")
        found["lines"].append((line, row))
    for name, group in groups.items():
        line = group["lines"][0][0]
        group |= {"name": name, "source": group["given"]["source"] or Path(name).with_suffix("").as_posix(),
                  "split": group["given"]["split"], "lr": picture(name, place.parent, place, line=line), "hr": None,
                  "candidates": [], "labels": {}, "extra": {}, "where": f"{place} line {line}"}
        if group["given"]["hr"]:
            group["hr"] = picture(group["given"]["hr"], place.parent, place, line=line)
        del group["given"]
    return groups


# csv: lr, candidate_a, candidate_b, axis, choice, annotator -----------------------------------------------------

def read_csv(place: Path, roles: dict[str, str], margin: float) -> list[dict]:
    """
    A line per vote; choice: a, b, tie, cannot_tell. Ranks by votes.label; an axis whose votes leave a candidate of the
    group unconnected gets no label, and the votes stay under extra. method_a, method_b: optional columns.
    """
    needed = ("lr", "candidate_a", "candidate_b", "axis", "choice", "annotator")
    groups = table_groups(place, read_table(place, needed))
    for group in groups.values():
        index, cast = {}, {}
        for line, row in group["lines"]:
            axis = choice(row["axis"], AXES, place, line=line, what="axis")
            picked = choice(row["choice"], votes.CHOICES, place, line=line, what="choice")
            if row["candidate_a"] == row["candidate_b"]:
                stop_at(place, line, "candidate_a and candidate_b are the same", do="remove the line")
            vote = {}
            for side in "ab":
                name, method = row[f"candidate_{side}"], row.get(f"method_{side}")
                if name not in index:
                    index[name] = len(index)
                    file = picture(name, place.parent, place, line=line)
                    group["candidates"].append({"method": method, "file": file, "extra": {}})
                elif method != group["candidates"][index[name]]["method"]:
                    stop_at(place, line, f"{name} had another method before", do="make them the same")
                vote[side] = index[name]
            rest = {key: value for key, value in row.items() if key not in needed + OF_GROUP + ("method_a", "method_b")}
            cast.setdefault(axis, []).append(vote | {"choice": picked, "annotator": row["annotator"]} | rest)
        name_methods(group)
        for axis, own in cast.items():
            label = votes.label(len(index), own, margin, source="import")
            if label:
                group["labels"][axis] = label
            else:
                group["extra"].setdefault("unconnected_votes", {})[axis] = own
        del group["lines"]
    return list(groups.values())


def name_methods(group: dict) -> None:
    """Where no method is given: the folder of the candidate if these differ, else its file name without the LR's."""
    files = [candidate["file"] for candidate in group["candidates"]]
    by_folder = len({file.parent for file in files}) == len(files)
    for candidate in group["candidates"]:
        file = candidate["file"]
        short = file.parent.name if by_folder else file.stem.removeprefix(group["lr"].stem).strip("_-. ")
        candidate["method"] = candidate["method"] or short or file.stem


# mos: lr, candidate, method, mos (= overall), consistency, naturalness ------------------------------------------

def read_mos(place: Path, roles: dict[str, str], margin: float) -> list[dict]:
    """A line per candidate, higher is better; the two axis columns are optional. Only equal scores tie."""
    needed, columns = ("lr", "candidate", "method", "mos"), {"overall": "mos"} | {axis: axis for axis in AXES[:2]}
    groups = table_groups(place, read_table(place, needed))
    for group in groups.values():
        first = group["lines"][0][1]
        present = {axis: column for axis, column in columns.items() if first.get(column) not in (None, "")}
        scores = {axis: [] for axis in present}
        for line, row in group["lines"]:
            file = picture(row["candidate"], place.parent, place, line=line)
            if file in [candidate["file"] for candidate in group["candidates"]]:
                stop_at(place, line, f"{row['candidate']} is rated twice for {row['lr']}", do="keep one line")
            for axis, column in columns.items():
                if axis in present:
                    scores[axis].append(number(row.get(column), place, line, what=column))
                elif row.get(column) not in (None, ""):
                    stop_at(place, line, f"{column} is given here, not on the group's first line", do="give all or none")
            used = (*needed, *columns.values(), *OF_GROUP)
            rest = {key: value for key, value in row.items() if key not in used}
            group["candidates"].append({"method": row["method"], "file": file, "extra": rest})
        group["labels"] = {axis: score_label(values, {}) for axis, values in scores.items()}
        del group["lines"]
    return list(groups.values())
