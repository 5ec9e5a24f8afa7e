"""What the annotation page asks and does with answers; how that travels over HTTP is in common/annotate.py."""
import io
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from common import judgements, pairs
from common.groups import all_groups
from common.images import read_image, resize

LONGEST_NAME = 40
LONGEST_SECONDS = 86_400


@dataclass
class Page:                             # all that requests share
    seed: int
    shown: int                          # candidates at once
    groups: dict[str, list[str]]        # group id -> ids of its candidates
    pictures: dict[str, str]            # group id -> what judgements.pictures_of says
    images: dict[str, tuple]            # public id -> (path, side to enlarge to, or None)
    public: dict[tuple, str]            # (group id, "lr", "smooth" or candidate id) -> public id
    lines: list[dict]                   # of judgements.jsonl
    log: BinaryIO
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    issued: dict[str, dict] = field(default_factory=dict)        # annotator -> task on the screen
    lock: threading.Lock = field(default_factory=threading.Lock)


def open_page(folder: Path, seed: int, shown: int, splits: list[str], per_split: int) -> Page:
    """per_split: groups of each of `splits`, evenly spaced; 0: all."""
    groups, images, public = [], {}, {}
    listed = all_groups(folder)
    for split in splits:
        own = [group for group in listed if group["split"] == split and len(group["candidates"]) >= 2]
        count = min(per_split or len(own), len(own))
        groups += [own[i] for i in np.linspace(0, len(own) - 1, count).astype(int)]
    for group in groups:
        with Image.open(folder / group["candidates"][0]["path"]) as image:
            width = image.width
        files = {"lr": (group["lr"], None), "smooth": (group["lr"], width)}
        for name, (path, size) in (files | {c["id"]: (c["path"], None) for c in group["candidates"]}).items():
            public[group["id"], name] = secrets.token_hex(8)
            images[public[group["id"], name]] = folder / path, size
    names = {group["id"]: [candidate["id"] for candidate in group["candidates"]] for group in listed}
    pictures = {group["id"]: judgements.pictures_of(group) for group in listed}
    log = judgements.open_log(folder / judgements.NAME)
    lines = judgements.read(folder / judgements.NAME, names, pictures)
    own = {group["id"]: names[group["id"]] for group in groups}
    return Page(seed, shown, own, pictures, images, public, lines=lines, log=log)


def view(page: Page, annotator: str) -> dict:
    """What the page shows to an annotator; the lock is held."""
    if annotator not in page.issued:
        task = pairs.next_task(page.groups, page.lines, annotator, seed=page.seed, shown=page.shown)
        page.issued |= {annotator: task} if task else {}
    task, shown = page.issued.get(annotator), None
    if task:
        shown = {"id": task["id"], "axis": task["open"][0], "step": 3 - len(task["open"]),
                 "lr": page.public[task["group"], "lr"], "smooth": page.public[task["group"], "smooth"],
                 "candidates": [page.public[task["group"], name] for name in task["candidates"]]}
    own = any(line["annotator"] == annotator for line in judgements.live(page.lines))
    return {"task": shown, "progress": pairs.progress(page.groups, page.lines, annotator), "can_undo": own}


def judge(page: Page, body: dict) -> tuple[int, dict]:
    """Append a judgement; 409 if this is not what the annotator was asked (a second window, or sent twice)."""
    annotator, seconds = body["annotator"], body["seconds"]
    task = page.issued.get(annotator)
    if not task or body["task"] != task["id"] or body["axis"] != task["open"][0]:
        return 409, view(page, annotator) | {"error": "this was not the question asked last; here is what is"}
    ranks = body["ranks"]
    wrong = judgements.wrong_ranks(ranks, len(task["candidates"])) if ranks is not None else None
    if type(seconds) not in (int, float) or not 0 <= seconds <= LONGEST_SECONDS:
        wrong = f"seconds should be a number from 0 to {LONGEST_SECONDS}"
    if wrong:
        return 400, {"error": wrong}
    line = {"time": round(time.time(), 3), "annotator": annotator, "group": task["group"],
            "pictures": page.pictures[task["group"]], "task": task["id"], "candidates": task["candidates"],
            "axis": body["axis"], "ranks": ranks, "seconds": round(seconds, 2), "repeat_of": task["repeat_of"]}
    page.lines.append(judgements.append(page.log, line))
    page.issued.pop(annotator)
    return 200, view(page, annotator)


def undo(page: Page, body: dict) -> tuple[int, dict]:
    """Append a line that takes the annotator's last judgement back, and ask for it again."""
    annotator = body["annotator"]
    own = [line for line in judgements.live(page.lines) if line["annotator"] == annotator]
    if not own:
        return 409, view(page, annotator) | {"error": "there is nothing to take back"}
    line = {"time": round(time.time(), 3), "annotator": annotator, "revokes": own[-1]["id"]}
    page.lines.append(judgements.append(page.log, line))
    page.issued.pop(annotator, None)
    return 200, view(page, annotator)


ACTIONS = {"judge": (judge, {"annotator", "task", "axis", "ranks", "seconds"}), "undo": (undo, {"annotator"})}


def act(page: Page, action: Callable, body: dict) -> tuple[int, dict]:
    """Status and answer of an action; 507 if it cannot be written: then nothing has changed."""
    try:
        with page.lock:
            return action(page, body)
    except OSError as error:
        return 507, {"error": f"Not saved: {error.strerror}. Tell whoever runs this program."}


def wrong_name(name: object) -> str | None:
    """Why this cannot be an annotator's name, or None."""
    fine = isinstance(name, str) and name == name.strip() and 0 < len(name) <= LONGEST_NAME and name.isprintable()
    return None if fine else f"the name should have 1 to {LONGEST_NAME} printable characters"


def image_png(path: Path, size: int | None) -> bytes:
    """The file, or the picture enlarged to width `size` by bicubic interpolation."""
    if size is None:
        return path.read_bytes()
    image, buffer = read_image(path), io.BytesIO()
    big = resize(image, (size, round(size * image.shape[0] / image.shape[1])), "bicubic")
    Image.fromarray(big).save(buffer, format="PNG")
    return buffer.getvalue()
