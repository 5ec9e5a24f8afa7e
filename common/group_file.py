"""groups.jsonl of stage 01, read with distrust: types, numbers, ids, and files that lie inside the folder."""
import json
import math
from pathlib import Path, PurePosixPath

AXES = ("consistency", "naturalness", "overall")
SPLITS = ("train", "val", "test")
TYPES = {"id": str, "split": str, "source": str, "scale": int, "lr": str, "hr": (str, type(None)), "degradation": dict,
         "candidates": list, "labels": dict}                        # of the keys that a group must have


def read_groups(folder: Path) -> list[dict]:
    """The lines of folder/groups.jsonl; ValueError that names the line and what is wrong with it."""
    groups, ids = [], set()
    for number, line in enumerate((folder / "groups.jsonl").read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            group = json.loads(line, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if reason := wrong(group, folder):
            raise ValueError(f"line {number}: {reason}")
        if group["id"] in ids:
            raise ValueError(f"line {number}: the id {group['id']!r} is given twice")
        ids.add(group["id"])
        groups.append(group)
    return groups


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")                        # NaN and Infinity, which Python would accept


def files_of(group: dict) -> list[str]:
    """LR, candidates, and HR if there is one: paths relative to the folder of the set."""
    return [group["lr"], *(one["path"] for one in group["candidates"]), *([group["hr"]] if group["hr"] else [])]


def wrong(group: object, folder: Path) -> str | None:
    """What is wrong with a line of groups.jsonl, or None. Whether files are the ones of `sha256` shows on reading."""
    if reason := wrong_record(group):
        return reason
    for name in files_of(group):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return f"the path {name!r} leads out of {folder}: paths are relative to it"
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    return None


def wrong_record(group: object) -> str | None:
    """The same of the line alone, without a look at files."""
    if not isinstance(group, dict):
        return "expected a JSON object"
    if reason := wrong_types(group, TYPES):
        return reason
    if group["split"] not in SPLITS:
        return f"split {group['split']!r} is not one of {', '.join(SPLITS)}"
    if not group["candidates"]:
        return "no candidates"
    for candidate in group["candidates"]:
        if not isinstance(candidate, dict):
            return "a candidate is not a JSON object"
        if reason := wrong_types(candidate, {"id": str, "path": str, "method": str}):
            return f"{reason} in a candidate"
    for axis, label in group["labels"].items():
        if reason := wrong_label(axis, label, len(group["candidates"])):
            return reason
    if not isinstance(group.get("sha256", {}), dict):
        return "sha256 should be an object"
    more = set(group.get("sha256", {})) - set(files_of(group))
    return f"sha256 names {sorted(more)[0]!r}, which is no file of the group" if more else None


def wrong_types(record: dict, types: dict) -> str | None:
    for key, kind in types.items():
        if key not in record:
            return f"key {key!r} is missing"
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            return f"key {key!r} should be {names}, not {record[key]!r}"
    return None


def wrong_label(axis: str, label: object, count: int) -> str | None:
    """What is wrong with the label of `count` candidates on an axis, or None."""
    if axis not in AXES or not isinstance(label, dict) or not isinstance(label.get("ranks"), list):
        return f"labels of {axis!r}: expected one of {', '.join(AXES)}, with a list of ranks"
    for key in ("ranks", "scores"):
        values = label.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != count:
            return f"labels of {axis!r} do not fit the {count} candidates"
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            return f"labels of {axis!r}: {key} should be numbers, not {values!r}"
    return None
