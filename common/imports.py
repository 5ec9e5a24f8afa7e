"""
A preference set that exists becomes stage 01's groups: `import_from` names a table, or a folder in RefSR-18K's layout.

A table (.csv, its first line names the columns, or .jsonl) has a line for each candidate. Paths are relative to it.

    lr, candidate, method               needed: the two pictures, and the name of the SR method
    hr, source, split                   optional, the same on all lines of an LR image. source: the photograph, which
                                        lies in one split only (default: lr); split: train, val or test
    overall, consistency, naturalness   scores, higher is better (`mos` is read as `overall`)
    rank_overall, rank_consistency, ..  ranks, 1 is best
    votes_overall, .. and raters        votes that the candidate got from so many people; half ones for ties are fine
                                        (`best_votes` and `n_raters` are read as `votes_overall` and `raters`)

An axis has one kind of these columns, filled in for all candidates of an LR image or for none. Equal values tie.
All other columns are kept under `extra` of the candidate.

The other layout is a folder with a numbered folder for each LR image, as RefSR-18K has it: six pictures in each, as far
as one knows without having seen it.

    hf download casyssong/RefSR-18K --repo-type dataset --local-dir data/RefSR-18K

`import_roles` says by patterns which file is what: lr, ranks, perhaps hr; every other role is a candidate and names its
method.

    import_roles: [lr=LR.*, hr=HR.*, a=1.*, b=2.*, c=3.*, d=4.*, ranks=ranks.json]

ranks.json holds [2, 1, 3, 4] in the order of the roles, or {"a": 2, ..}, or one of these for each axis,
{"naturalness": [2, 1, 3, 4]}; a .txt holds 2 1 3 4. A folder above the numbers, train/00001, names the split.
"""
import csv
import hashlib
import io
import json
import math
from pathlib import Path

from common import metrics, run
from common.config import fail
from common.images import SUFFIXES, copy_png, read_image
from common.metrics import AXES

SAME_COLUMN = {"mos": "overall", "best_votes": "votes_overall", "n_raters": "raters"}
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test"}
KINDS = ("", "rank_", "votes_")             # before the name of an axis: scores, ranks, votes
COLUMNS = ("lr", "candidate", "method", "hr", "source", "split", "raters", *(kind + axis for kind in KINDS
                                                                             for axis in AXES))


def parse_roles(entries: list[str]) -> dict[str, str]:
    """{role: pattern} of the setting import_roles; AssertionError if an entry is not ROLE=PATTERN."""
    roles = dict(entry.partition("=")[::2] for entry in entries)
    assert all(roles) and all(roles.values()), f"import_roles: each entry should look like ROLE=PATTERN, got {entries}"
    assert len(roles) == len(entries), f"import_roles: a role is given twice in {entries}"
    return roles


def read(place: Path, roles: dict[str, str]) -> list[dict]:
    """
    Groups {lr, hr or None, files (LR, HR, candidates), source, split or None, candidates [{method, file, extra}],
    labels, extra, where}. Everything but the pixels of candidates is checked; stops with one line that names file and
    line (or folder).

    Groups whose LR images have the same pixels need one source, so that they cannot lie in two splits.
    """
    if not place.exists():
        fail(f"import_from: {place} does not exist: give a table (.csv or .jsonl) or a folder of numbered folders")
    rows, by_lr = folder_rows(place, roles) if place.is_dir() else table_rows(place), {}
    for where, row in rows:
        for key in ("lr", "candidate", "method"):
            if not row.get(key) or not isinstance(row[key], str):
                fail(f"{where}: {key!r} is missing, or no text: a line needs lr, candidate and method")
        by_lr.setdefault(row["lr"], []).append((where, row))
    root = place if place.is_dir() else place.parent
    groups = [read_group(root, lines) for lines in by_lr.values()]
    twins, splits = {}, {}
    for group in groups:
        where, count = group["where"], len(group["candidates"])
        if count != len(groups[0]["candidates"]) or count < 2:
            fail(f"{where}: {count} candidate(s) of {group['extra']['lr']}, but {len(groups[0]['candidates'])} of "
                 f"{groups[0]['extra']['lr']}: later stages compare in batches, so all LR images need the same number, "
                 "2 or more; remove some, or import each number into its own run=")
        try:
            pixels = read_image(group["lr"])
        except ValueError as error:
            fail(f"{where}: {group['lr']} cannot be read ({error}): repair the file or remove the group")
        twin = twins.setdefault(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), group)
        group["source"] = group["source"] or twin["source"] or group["extra"]["lr"]
        if group["source"] != twin["source"]:
            fail(f"{where}: {group['lr']} has the same pixels as {twin['lr']}, but another source: one photograph may "
                 "lie in one split only; give both the same source")
        if splits.setdefault(group["source"], group["split"]) != group["split"]:
            fail(f"{where}: source {group['source']!r} is in {splits[group['source']]} and in {group['split']}: one "
                 "photograph may lie in one split only; correct the set")
        if (group["split"] is None) != (groups[0]["split"] is None):
            fail(f"{where}: some groups have a split and some have none: give it for all or none")
    return groups


def table_rows(path: Path) -> list[tuple[str, dict]]:
    """[(where, row)] of a .csv or .jsonl file."""
    if path.suffix not in (".csv", ".jsonl"):
        fail(f"import_from: {path}: expected a table that ends in .csv or .jsonl: rename or convert it")
    text, rows = read_text(path), []
    if path.suffix == ".jsonl":
        lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, parse_json(where, line)) for where, line in lines]
        for where, row in rows:
            if not isinstance(row, dict):
                fail(f"{where}: expected a JSON object: repair the line")
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            names = next(reader, [])
            for cells in filter(None, reader):
                if len(cells) != len(names):
                    fail(f"{path} line {reader.line_num}: {len(cells)} cells, but {len(names)} columns "
                         f"({', '.join(names)}): quote cells that hold a comma")
                rows.append((f"{path} line {reader.line_num}", list(zip(names, cells))))
        except csv.Error as error:
            fail(f"{path} line {reader.line_num}: not a well-formed table ({error}): check the quotes")
    if not rows:
        fail(f"{path} line 1: no lines; expected the columns lr, candidate, method and labels: give the whole set")
    for number, (where, cells) in enumerate(rows):
        if isinstance(cells, dict):
            cells = list(cells.items())
        row = {SAME_COLUMN.get(name, name): value for name, value in cells}
        if len(row) < len(cells):
            fail(f"{where}: a column is there twice (of {', '.join(name for name, _ in cells)}): remove one")
        rows[number] = where, row
    return rows


def folder_rows(root: Path, roles: dict[str, str]) -> list[tuple[str, dict]]:
    """[(where, row)] of numbered folders, as if a table had said it."""
    if not {"lr", "ranks"} <= set(roles):
        fail("import_roles: lr or ranks is missing: set, for example, import_roles: "
             "[lr=LR.*, hr=HR.*, a=1.*, b=2.*, c=3.*, d=4.*, ranks=ranks.json]")
    methods = [role for role in roles if role not in ("lr", "hr", "ranks")]
    folders = sorted(path for path in root.rglob("*") if path.is_dir() and path.name.isdigit())
    if not folders:
        fail(f"import_from: {root} holds no folder with a number for a name, such as {root / '00001'}: give such a one")
    rows = []
    for folder in folders:
        files = {}
        for role, pattern in roles.items():
            try:
                matches = sorted(folder.glob(pattern))
            except (ValueError, NotImplementedError) as error:
                fail(f"import_roles: {role}={pattern}: {error}: give a pattern below the numbered folders")
            if len(matches) != 1:
                fail(f"{folder}: {len(matches)} files match the role {role}={pattern}, expected one: correct "
                     "import_roles or the folder")
            files[role] = matches[0].relative_to(root).as_posix()
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and path.relative_to(root).as_posix() not in files.values():
                fail(f"{path} has no role: name it in import_roles or remove it")
        ranks = folder_ranks(root / files["ranks"], methods)
        split = next((part for part in folder.relative_to(root).parts if part in SPLIT_NAMES), None)
        common = {"lr": files["lr"], "hr": files.get("hr"), "split": split}
        rows += [(str(folder), common | {"candidate": files[role], "method": role}
                  | {f"rank_{axis}": values[index] for axis, values in ranks.items()})
                 for index, role in enumerate(methods)]
    return rows


def folder_ranks(path: Path, methods: list[str]) -> dict[str, list]:
    """{axis: ranks in the order of `methods`} of a .json or .txt."""
    text = read_text(path)
    ranks = parse_json(str(path), text) if path.suffix == ".json" else text.replace(",", " ").split()
    if not (isinstance(ranks, dict) and ranks and set(ranks) <= set(AXES)):
        ranks = {"overall": ranks}
    for axis, values in ranks.items():
        if isinstance(values, dict) and set(values) == set(methods):
            ranks[axis] = values = [values[role] for role in methods]
        if not isinstance(values, list) or len(values) != len(methods):
            fail(f"{path}: {axis}: expected {len(methods)} ranks ({', '.join(methods)}), got {values!r}: correct it")
    return ranks


def read_group(root: Path, lines: list[tuple[str, dict]]) -> dict:
    """The group of the (where, row) lines of one LR image; paths in rows are relative to root."""
    first_where, first = lines[0]
    candidates = []
    for where, row in lines:
        for key in ("hr", "source", "split"):
            if row.get(key) != first.get(key):
                fail(f"{where}: {key} of {row['lr']} was another one before ({first_where}): make them the same")
        file = picture(where, root, row["candidate"])
        if file in [candidate["file"] for candidate in candidates]:
            fail(f"{where}: {row['candidate']} is there twice for {row['lr']}: keep one line")
        rest = {key: value for key, value in row.items() if key not in COLUMNS}
        candidates.append({"method": row["method"], "file": file, "extra": {"file": row["candidate"]} | rest})
    hr, source, split = (first.get(key) or None for key in ("hr", "source", "split"))
    if split and split not in SPLIT_NAMES:
        fail(f"{first_where}: split {split!r} is none of {', '.join(SPLIT_NAMES)}: correct it")
    labels = {axis: read_label(lines, axis) for axis in AXES}
    lr, *hrs = (picture(first_where, root, name) for name in (first["lr"], hr) if name)
    return {"lr": lr, "hr": hrs[0] if hrs else None, "files": [lr, *hrs, *(one["file"] for one in candidates)],
            "source": source and str(source), "split": SPLIT_NAMES.get(split), "candidates": candidates,
            "labels": {axis: label for axis, label in labels.items() if label},
            "extra": {"lr": first["lr"]} | ({"hr": hr} if hr else {}), "where": first_where}


def read_label(lines: list[tuple[str, dict]], axis: str) -> dict | None:
    """{ranks, source, votes, scores or raters} of one group on one axis; None where its columns are empty."""
    filled = [kind for kind in KINDS if any(row.get(kind + axis) not in (None, "") for _, row in lines)]
    if not filled:
        return None
    if len(filled) > 1:
        fail(f"{lines[0][0]}: both {filled[0]}{axis} and {filled[1]}{axis} are given: remove one of the columns")
    values = [number(where, row, filled[0] + axis) for where, row in lines]
    sign = -1 if filled[0] == "rank_" else 1
    label = {"ranks": metrics.ranks([sign * value for value in values], 1e-9), "source": "import", "votes": None}
    if filled[0] == "":
        label["scores"] = values
    if filled[0] == "votes_":
        raters = number(*lines[0], "raters")
        for (where, row), votes in zip(lines, values):
            if number(where, row, "raters") != raters or not 0 <= votes <= raters:
                fail(f"{where}: {votes:g} votes of {row['raters']} raters: expected 0 to {raters:g} votes, and "
                     f"{raters:g} raters as for the other candidates of {row['lr']}: correct it")
        label |= {"votes": values, "raters": int(raters)}
    return label


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read as UTF-8 text ({error}): repair or replace it")


def parse_json(where: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON ({error}): repair it")


def number(where: str, row: dict, column: str) -> float:
    try:
        value = float(row.get(column))
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or isinstance(row[column], bool):
        fail(f"{where}: {column} should be a number, got {row.get(column)!r}: correct it (an axis is given for all "
             "candidates of an LR image or for none)")
    return value


def picture(where: str, root: Path, name: object) -> str:
    if not isinstance(name, str) or not (root / name).is_file():
        fail(f"{where}: there is no picture {root / str(name)}: add the file or correct the name")
    return str(root / name)


def copy_group(folder: Path, group: dict) -> dict:
    """
    Copy the pictures of a group of `read`, which by now has an id and a split, to folder/lr, hr and candidates, as PNG;
    returns its line of groups.jsonl.
    """
    name, hr = group["id"], f"hr/{group['id']}.png" if group["hr"] else None
    candidates = [{"id": f"{name}_{index}", "path": f"candidates/{name}_{index}.png", "method": candidate["method"],
                   "extra": candidate["extra"]} for index, candidate in enumerate(group["candidates"])]
    paths = [f"lr/{name}.png", *([hr] if hr else []), *(candidate["path"] for candidate in candidates)]
    try:
        sizes = [copy_png(file, folder / path) for file, path in zip(group["files"], paths)]
    except ValueError as error:
        fail(f"{group['where']}: {error}: repair the file or remove the group")
    scale = sizes[1][0] // sizes[0][0]
    for file, (height, width) in zip(group["files"][1:], sizes[1:]):
        if scale < 1 or (height, width) != (scale * sizes[0][0], scale * sizes[0][1]):
            fail(f"{group['where']}: {file} is {width}x{height}; expected all candidates (and HR) to have one size, a "
                 f"whole multiple of the LR image's {sizes[0][1]}x{sizes[0][0]}: correct the group or remove it")
    return {"id": name, "split": group["split"], "source": group["source"], "scale": scale, "lr": paths[0], "hr": hr,
            "degradation": {}, "candidates": candidates, "labels": group["labels"], "extra": group["extra"],
            "sha256": {path: run.sha256(folder / path) for path in paths}}
