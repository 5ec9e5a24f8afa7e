"""
Readers of preference sets that are folders (`import_format: refsr`, `sriqa`, `hf`); they return what those of
common/import_tables.py return. `import_roles` says which file is what, as NAME=PATTERN.
"""
import re
from pathlib import Path

from common.config import fail
from common.images import SUFFIXES
from common.import_tables import SPLIT_NAMES, rank_label, score_label
from common.metrics import AXES
from common.tables import choice, number, parse_json, picture, read_table, read_text, stop_at


def need(roles: dict[str, str], names: tuple[str, ...], example: str) -> None:
    """Stop unless all these roles are set."""
    missing = [name for name in names if name not in roles]
    if missing:
        fail(f"import_roles: {' and '.join(missing)} is missing: set, for example, import_roles: [{example}]")


# refsr: numbered folders of LR, HR, candidates, and their ranks -------------------------------------------------

def read_refsr(place: Path, roles: dict[str, str], margin: float) -> list[dict]:
    """
    Roles lr, hr (optional) and ranks; every other role is a candidate, and its name the method. Patterns match one file
    of the numbered folder. ranks: a .json or .txt there, or a .csv or .jsonl of all folders at import_from.
    """
    need(roles, ("lr", "ranks"), "lr=lr.*, hr=hr.*, a=1.*, b=2.*, c=3.*, d=4.*, ranks=ranks.json")
    methods = [role for role in roles if role not in ("lr", "hr", "ranks")]
    folders = sorted(path for path in place.rglob("*") if path.is_dir() and path.name.isdigit())
    if not folders:
        fail(f"import_from: {place} holds no folder with a number for a name: expected one per LR image, such as "
                 f"{place / '00001'}")
    by_table = (place / roles["ranks"]).is_file()
    table = rank_table(place / roles["ranks"], methods) if by_table else {}
    groups = []
    for folder in folders:
        name = folder.relative_to(place).as_posix()
        files = {role: one_file(folder, role, roles[role]) for role in roles if not (by_table and role == "ranks")}
        pictures = {path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
        spare = sorted(pictures - set(files.values()))
        if spare:
            fail(f"import_from: {spare[0]} has no role: name it in import_roles or remove it")
        if by_table and name not in table:
            fail(f"import_from: {place / roles['ranks']}: no line for folder {name!r}: add one, or remove the "
                     "folder")
        labels, extra = table[name] if by_table else rank_file(files["ranks"], methods)
        groups.append({"name": name, "source": name, "split": SPLIT_NAMES.get(name.split("/")[0]), "lr": files["lr"],
                       "hr": files.get("hr"), "labels": labels, "extra": extra, "where": str(folder),
                       "candidates": [{"method": m, "file": files[m], "extra": {}} for m in methods]})
    return groups


def one_file(folder: Path, role: str, pattern: str) -> Path:
    """The file of a folder that the pattern matches."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        fail(f"import_from: {folder}: {len(found)} files match the role {role}={pattern}, expected one: correct "
                 "import_roles or the folder")
    return found[0]


def rank_table(path: Path, methods: list[str]) -> dict[str, tuple[dict, dict]]:
    """folder -> (labels, extra) of a table with the columns folder, axis (optional: overall), and one per candidate."""
    found = {}
    for line, row in read_table(path, ("folder", *methods)):
        labels, extra = found.setdefault(str(row["folder"]), ({}, {}))
        axis = choice(row.get("axis") or "overall", AXES, path, line=line, what="axis")
        if axis in labels:
            stop_at(path, line, f"folder {row['folder']} has two lines for {axis}", do="keep one")
        rest = {key: value for key, value in row.items() if key not in ("folder", "axis", *methods)}
        labels[axis] = rank_label([number(row[m], path, line, what=f"rank of {m}") for m in methods], rest)
    return found


def rank_file(path: Path, methods: list[str]) -> tuple[dict, dict]:
    """
    (labels, extra). .txt: ranks in the order of import_roles. .json: such a list, or {role: rank}, or {axis: either},
    or an object with any of these under "ranks"; its other keys are kept.
    """
    extra, text = {}, read_text(path)
    ranks = parse_json(text, path, 1) if path.suffix == ".json" else text.replace(",", " ").split()
    if isinstance(ranks, dict) and "ranks" in ranks:
        extra = {key: value for key, value in ranks.items() if key != "ranks"}
        ranks = ranks["ranks"]
    if not (isinstance(ranks, dict) and ranks and set(ranks) <= set(AXES)):
        ranks = {"overall": ranks}
    labels = {}
    for axis, own in ranks.items():
        own = [own[m] for m in methods] if isinstance(own, dict) and set(own) == set(methods) else own
        if not isinstance(own, list) or len(own) != len(methods):
            stop_at(path, 1, f"{axis}: expected {len(methods)} ranks ({', '.join(methods)}), got {own!r}", do="correct it")
        labels[axis] = rank_label([number(rank, path, 1, what=f"{axis} rank") for rank in own], {})
    return labels, extra


# sriqa: LR images, folders of candidates, one list of mean opinion scores ---------------------------------------

def read_sriqa(place: Path, roles: dict[str, str], margin: float) -> list[dict]:
    """
    Roles: mos, a text file of lines `candidate score ...` (spaces or commas; more fields are kept); candidate, the form
    of these names, such as {method}/{scene}.png; lr and hr (optional), such as LRImages/{scene}.png.
    """
    need(roles, ("lr", "candidate", "mos"), "lr=LRImages/{scene}.png, candidate={method}/{scene}.png, mos=MOS.txt")
    table, shape = place / roles["mos"], re.escape(roles["candidate"])
    for key in ("scene", "method"):
        if shape.count(rf"\{{{key}\}}") != 1:
            fail(f"import_roles: candidate={roles['candidate']} should hold {{{key}}} once")
        shape = shape.replace(rf"\{{{key}\}}", f"(?P<{key}>[^/]+)")
    scenes = {}
    for line, text in enumerate(read_text(table).splitlines(), 1):
        cells = text.replace(",", " ").split()
        if not cells:
            continue
        match = re.fullmatch(shape, cells[0])
        if not match or len(cells) < 2:
            stop_at(table, line, f"expected `{roles['candidate']} score`, got {text!r}", do="correct it or import_roles")
        scene, method = match["scene"], match["method"]
        files = {key: picture(roles[key].replace("{scene}", scene), place, table, line=line)
                 for key in ("lr", "hr") if key in roles}
        group = scenes.setdefault(scene, {
            "name": scene, "source": scene, "split": None, "hr": None, "candidates": [], "labels": [], "extra": {},
            "where": f"{table} line {line}"} | files)
        if method in [candidate["method"] for candidate in group["candidates"]]:
            stop_at(table, line, f"{method} is rated twice for scene {scene}", do="keep one line")
        group["candidates"].append({"method": method, "file": picture(cells[0], place, table, line=line),
                                    "extra": {"fields": cells[2:]} if cells[2:] else {}})
        group["labels"].append(number(cells[1], table, line, what="score"))
    if not scenes:
        stop_at(table, 1, "no scores", do="fill it in")
    return [group | {"labels": {"overall": score_label(group["labels"], {})}} for group in scenes.values()]
