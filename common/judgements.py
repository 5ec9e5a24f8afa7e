"""
judgements.jsonl: what people said, one JSON object per line, on the disk before the page is told that it is saved.

    a judgement   {id, time (seconds since 1970), annotator, group, pictures (see `pictures_of`), task, candidates (ids
                   in the order shown), axis, ranks (in that order, 1 is best, ties share one; null: cannot tell),
                   seconds, repeat_of}
    an undo       {id, time, annotator, revokes (the id of a judgement)}

A task is one screen: a choice of candidates of one group, judged on each axis of ASKED. repeat_of is the task that it
repeats, unknown to the annotator, or null. Lines are only ever appended.
"""
import errno
import fcntl
import hashlib
import itertools
import json
import os
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.config import fail

NAME = "judgements.jsonl"
ASKED = ("consistency", "naturalness")
KEYS = {"id", "time", "annotator", "group", "pictures", "task", "candidates", "axis", "ranks", "seconds", "repeat_of"}
OLDER_KEYS = KEYS - {"pictures"}
UNDO_KEYS = {"id", "time", "annotator", "revokes"}


def open_log(path: Path) -> BinaryIO:
    """Open for appending, for this process alone; a last line that was cut off (power failure) is removed."""
    log = open(path, "a+b", buffering=0)                    # nothing that failed is written later
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path} is in use: another program serves the annotation page of this run already; use that page "
                 "(several people can), or stop it")
    log.seek(0)
    log.truncate(log.read().rfind(b"\n") + 1)
    return log


def append(log: BinaryIO, record: dict) -> dict:
    """Add an id, write one line, and return the record when it is on the disk; OSError leaves the file as it was."""
    record = {"id": uuid.uuid4().hex[:16]} | record
    line, end = (json.dumps(record, allow_nan=False) + "\n").encode(), os.fstat(log.fileno()).st_size
    try:
        if log.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(log.fileno())
    except OSError:
        log.truncate(end)
        raise
    return record


def pictures_of(group: dict) -> str:
    """16 hex digits for the bytes of LR and candidates: ids are the same in every data set."""
    paths = group["lr"], *(one["path"] for one in group["candidates"])
    sums = [group.get("sha256", {}).get(path, "") for path in paths]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]


def read(path: Path, groups: dict[str, list[str]], pictures: dict[str, str]) -> list[dict]:
    """
    All whole lines; [] if there is no file. Stops with one line at anything that was not written by `append` or does
    not fit groups: group id -> ids of its candidates, and pictures: group id -> pictures_of it. A last line without
    its end (a write that was cut) is left out.
    """
    text = path.read_bytes() if path.exists() else b""
    lines, known = [], set()
    for number, raw in enumerate(text[:text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            fail(f"{path} line {number} is not JSON ({error}): remove or repair that line")
        reason = invalid(line, groups, pictures, known)
        if reason:
            fail(f"{path} line {number}: {reason}: remove that line, or use the file of this run")
        known.add(line["id"])
        lines.append(line)
    return lines


def invalid(line: object, groups: dict[str, list[str]], pictures: dict[str, str], known: set[str]) -> str | None:
    """What is wrong with a line, or None. known: the ids of the lines before it."""
    if not isinstance(line, dict) or set(line) not in (KEYS, OLDER_KEYS, UNDO_KEYS):
        return f"expected an object with the keys {', '.join(sorted(KEYS))}, or {', '.join(sorted(UNDO_KEYS))}"
    if "revokes" in line:
        return None if line["revokes"] in known else f"it revokes {line['revokes']!r}, which is not above it"
    if line["group"] not in groups:
        return f"group {line['group']!r} is not in this data set"
    if line.get("pictures", pictures[line["group"]]) != pictures[line["group"]]:
        return f"it was given for other pictures than those of {line['group']} here: this file belongs to another build"
    shown = line["candidates"]
    if not isinstance(shown, list) or len(set(map(str, shown))) < max(2, len(shown)):
        return "candidates should be two or more different ids"
    if not set(map(str, shown)) <= set(groups[line["group"]]):
        return f"group {line['group']!r} has no such candidates"
    if line["axis"] not in ASKED:
        return f"axis should be one of {', '.join(ASKED)}"
    return None if line["ranks"] is None else wrong_ranks(line["ranks"], len(shown))


def wrong_ranks(ranks: object, count: int) -> str | None:
    """What is wrong with the ranks of `count` candidates (whole numbers, 1 is best, ties allowed), or None."""
    whole = isinstance(ranks, list) and len(ranks) == count and all(type(rank) is int for rank in ranks)
    if not whole or sorted(set(ranks)) != list(range(1, len(set(ranks)) + 1)):
        return f"ranks should be {count} whole numbers: 1 for the best, 2 for the next, and so on; ties share one"
    return None


def live(lines: list[dict]) -> list[dict]:
    """The judgements that were not taken back, in order."""
    revoked = {line["revokes"] for line in lines if "revokes" in line}
    return [line for line in lines if "revokes" not in line and line["id"] not in revoked]


def verdicts(judgement: dict) -> list[tuple[str, str, float]]:
    """(a, b, 1: a is better, 1/2: a tie, 0: b is better) of every pair shown, a < b; [] for `cannot tell`."""
    if judgement["ranks"] is None:
        return []
    shown = sorted(zip(judgement["candidates"], judgement["ranks"]))
    return [(a, b, (1 + (j > i) - (j < i)) / 2) for (a, i), (b, j) in itertools.combinations(shown, 2)]


def components(names: list[str], pairs: set[tuple[str, str]]) -> dict[str, int]:
    """Candidate -> number of the part that it hangs together with through compared pairs."""
    part = {name: index for index, name in enumerate(names)}
    for a, b in pairs:
        old, new = part[a], part[b]
        part = {name: new if index == old else index for name, index in part.items()}
    return part


def count_parts(names: list[str], judgements: list[dict]) -> np.ndarray:
    """Into how many parts [axes of ASKED] one group falls; 1: its candidates can be ranked on that axis."""
    found = []
    for axis in ASKED:
        pairs = {(a, b) for j in judgements if j["axis"] == axis for a, b, _ in verdicts(j)}
        found.append(len(set(components(names, pairs).values())))
    return np.array(found)
