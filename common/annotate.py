"""
People compare candidates: the page, the log of what they said, what is asked next, their labels, how far they agree.

`annotate=true` of stage 01 serves annotate.html, to this machine alone by default, below a random token:

    GET  /<token>/              the page
    GET  /<token>/task          ?annotator=NAME: what to compare next, and progress
    GET  /<token>/image/<id>    PNG; ids are random, so that neither methods nor file names can be read off
    POST /<token>/judge         {annotator, task, axis, ranks, seconds}
    POST /<token>/undo          {annotator}: takes the last judgement back

No path of a request becomes a path on the disk. Whoever knows the address may judge, under any name. A POST is answered
once its line of judgements.jsonl is on the disk (507 if it cannot be written):

    a judgement   {id, time (seconds since 1970), annotator, group, pictures (see pictures_of), task, candidates (ids in
                   the order shown), axis, ranks (in that order, 1 is best, ties share one; null: cannot tell),
                   seconds, repeat_of}
    an undo       {id, time, annotator, revokes (the id of a judgement)}

A task is one screen: some candidates of one group, judged on each axis of ASKED. repeat_of is the task of the same
annotator that it repeats, or null. To leave an annotator out, remove the lines with that name.

`labels=human` turns judgements into labels. Within a group and axis candidate i has the strength s_i (log odds), and

    P(i is preferred to j) = 1 / (1 + exp(s_j - s_i))           Bradley and Terry 1952, Biometrika 39

A tie is half a vote for each, and a normal prior of width PRIOR keeps one-sided results finite; both are our choice.
"""
import errno
import fcntl
import hashlib
import hmac
import io
import itertools
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

from common import metrics, run
from common.config import fail
from common.groups import SPLITS
from common.images import evenly, read_image, resize

LOG = "judgements.jsonl"
ASKED = ("consistency", "naturalness")
JUDGEMENT = {"id", "time", "annotator", "group", "pictures", "task", "candidates", "axis", "ranks", "seconds",
             "repeat_of"}
UNDO = {"id", "time", "annotator", "revokes"}
TEXTS = ("id", "annotator", "group", "task", "revokes")     # of these keys the ones that are text
PERIOD, REPEAT_AT, SHARED_AT = 8, 7, 3      # of 8 screens one is an old one again, and one was judged by somebody else
GAP = 5                                     # screens between an old one and its repeat
PRIOR = 1.5                                 # log odds; one vote then pulls two candidates apart by about 1
TIE = 0.2                                   # log odds; candidates share a rank where votes would be 55 : 45 or closer
LARGEST_BODY = 10_000                       # bytes of a request
LONGEST_NAME, LONGEST_SECONDS = 40, 86_400
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'; "
                               "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


# the page -----------------------------------------------------------------------------------------------------

def serve(folder: Path, groups: list[dict], *, host: str, port: int, seed: int, shown: int, per_split: int) -> None:
    """
    Serve the page until Ctrl-C. folder, groups: a finished stage 01. port 0: any free one. shown: candidates at once;
    per_split: LR images of each split that are asked about, evenly spaced (0: all).
    """
    page = Page(folder, groups, seed=seed, shown=shown, per_split=per_split)
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        fail(f"annotate_host {host}, annotate_port {port}: {error.strerror or error}; choose another (0: any free)")
    server.page = page
    name = socket.gethostname() if host == "0.0.0.0" else host
    reach = "this machine alone" if host in ("127.0.0.1", "localhost") else "all who can reach this machine"
    print(f"{len(page.groups)} LR images to compare, {len(page.lines)} lines in {LOG}\n"
          f"open  http://{name}:{server.server_port}/{page.token}/\n"
          f"served to {reach}; each answer is on the disk at once; Ctrl-C stops, the same command goes on", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{len(page.lines)} lines in {LOG}\nlabels from them: {run.command(folder.name)} labels=human")
    finally:
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request; what all requests share is in self.server.page."""
    protocol_version = "HTTP/1.1"
    timeout = 60                            # s without a byte; browsers open a new connection by themselves

    def do_GET(self):
        page, route = self.server.page, self.route()
        if route == "":
            self.reply(200, Path(__file__).with_suffix(".html").read_bytes(), "text/html; charset=utf-8")
        elif route == "task":
            name = parse_qs(urlsplit(self.path).query, errors="replace").get("annotator", [""])[0]
            self.reply(*page.answer(page.view, {"annotator": name}))
        elif route and route.removeprefix("image/") in page.images:
            try:
                self.reply(200, page.image(route.removeprefix("image/")), "image/png")
            except (OSError, ValueError):   # the page says that a picture did not load
                self.reply(404, {"error": "this picture cannot be read"})
        elif route is not None:
            self.reply(404, {"error": "there is no such thing here"})

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > LARGEST_BODY:
            self.close_connection = True    # what is not read would be taken for the next request
            return self.reply(413, {"error": f"Content-Length should be at most {LARGEST_BODY} bytes"})
        body, page, route = self.rfile.read(int(length)), self.server.page, self.route()
        if route is None:
            return
        if route not in ("judge", "undo"):
            return self.reply(404, {"error": "there is no such thing here"})
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        keys = {"judge": {"annotator", "task", "axis", "ranks", "seconds"}, "undo": {"annotator"}}[route]
        if not isinstance(request, dict) or set(request) != keys:
            return self.reply(400, {"error": f"expected a JSON object with the keys {', '.join(sorted(keys))}"})
        self.reply(*page.answer(page.judge if route == "judge" else page.undo, request))

    def route(self) -> str | None:
        """What follows the token in the address; None, and an answer, where the token is wrong."""
        token, slash, rest = urlsplit(self.path).path.removeprefix("/").partition("/")
        if slash and hmac.compare_digest(token.encode(), self.server.page.token.encode()):
            return rest
        self.reply(403, {"error": "wrong address: open the one that the program has printed"})
        return None

    def reply(self, status: int, content: bytes | dict, kind: str = "application/json") -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        cache = "private, max-age=86400" if kind == "image/png" else "no-store"
        headers = {"Cache-Control": cache, "Content-Type": kind, "Content-Length": str(len(content))}
        for key, value in (HEADERS | headers | ({"Connection": "close"} if self.close_connection else {})).items():
            self.send_header(key, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except ConnectionError:             # the browser has gone on to something else
            self.close_connection = True

    def log_message(self, format, *values):
        """Print nothing."""


class Page:
    """What all requests share: the pictures, the log, and the question on the screen of each annotator."""

    def __init__(self, folder: Path, groups: list[dict], *, seed: int, shown: int, per_split: int):
        self.seed, self.shown = seed, shown
        self.log = open_log(folder / LOG)
        self.lines = read_log(folder / LOG, groups)
        self.token, self.lock = secrets.token_urlsafe(16), threading.Lock()
        self.groups, self.pictures = {}, {}                 # group id -> ids of its candidates; -> pictures_of
        self.images, self.public = {}, {}                   # public id -> (path, width or None); and back
        self.issued = {}                                    # annotator -> task on the screen
        for split in SPLITS:
            members = [group for group in groups if group["split"] == split]
            for index in evenly(len(members), per_split or len(members)):
                self.add(folder, members[index])

    def add(self, folder: Path, group: dict) -> None:
        self.groups[group["id"]] = [candidate["id"] for candidate in group["candidates"]]
        self.pictures[group["id"]] = pictures_of(group)
        with Image.open(folder / group["candidates"][0]["path"]) as image:
            files = {"lr": (group["lr"], None), "smooth": (group["lr"], image.width)}
        for name, (path, width) in (files | {one["id"]: (one["path"], None) for one in group["candidates"]}).items():
            self.public[group["id"], name] = secrets.token_hex(8)
            self.images[self.public[group["id"], name]] = folder / path, width

    def image(self, public: str) -> bytes:
        """The PNG as it is; "smooth": the LR image enlarged to the candidates' width by bicubic interpolation."""
        path, width = self.images[public]
        if width is None:
            return path.read_bytes()
        image, buffer = read_image(path), io.BytesIO()
        large = resize(image, (width, round(width * image.shape[0] / image.shape[1])), "bicubic")
        Image.fromarray(large).save(buffer, format="PNG")
        return buffer.getvalue()

    def answer(self, action: Callable, request: dict) -> tuple[int, dict]:
        """Status and answer of view, judge or undo; 507 if it cannot be written: then nothing has changed."""
        name = request["annotator"]
        if not isinstance(name, str) or name != name.strip() or not 0 < len(name) <= LONGEST_NAME or \
                not name.isprintable():
            return 400, {"error": f"the name should have 1 to {LONGEST_NAME} printable characters"}
        try:
            with self.lock:
                return action(request)
        except OSError as error:
            return 507, {"error": f"Not saved: {error.strerror}. Tell whoever runs this program."}

    def view(self, request: dict, status: int = 200, **more) -> tuple[int, dict]:
        """What an annotator sees. share: screens so far, of the fewest screens that can rank all candidates."""
        name, question = request["annotator"], None
        judged = [judgement for judgement in live(self.lines) if judgement["group"] in self.groups]
        if name not in self.issued:
            self.issued[name] = next_task(self.groups, judged, name, seed=self.seed, shown=self.shown)
        if task := self.issued[name]:
            public = {image: self.public[task["group"], image] for image in ("lr", "smooth", *task["candidates"])}
            question = {"id": task["id"], "axis": task["open"][0], "step": 1 + len(ASKED) - len(task["open"]),
                        "lr": public["lr"], "smooth": public["smooth"],
                        "candidates": [public[candidate] for candidate in task["candidates"]]}
        mine = {judgement["task"] for judgement in judged if judgement["annotator"] == name}
        screens = {(judgement["group"], judgement["task"]) for judgement in judged if not judgement["repeat_of"]}
        least = sum(-(-(len(names) - 1) // (self.shown - 1)) for names in self.groups.values())
        progress = {"mine": len(mine), "groups": len(self.groups), "seen": len({group for group, _ in screens}),
                    "share": round(min(1, len(screens) / max(1, least)), 4)}
        return status, {"task": question, "progress": progress, "can_undo": bool(mine), **more}

    def judge(self, request: dict) -> tuple[int, dict]:
        """Append a judgement; 409 if this is not what the annotator was asked (a second window, or sent twice)."""
        name, ranks, seconds = request["annotator"], request["ranks"], request["seconds"]
        task = self.issued.get(name)
        if not task or request["task"] != task["id"] or request["axis"] != task["open"][0]:
            return self.view(request, 409, error="this was not the question asked last; here is what is")
        if type(seconds) not in (int, float) or not 0 <= seconds <= LONGEST_SECONDS:
            return 400, {"error": f"seconds should be a number from 0 to {LONGEST_SECONDS}"}
        if not good_ranks(ranks, len(task["candidates"])):
            return 400, {"error": "ranks should be a whole number per candidate, 1 for the best; ties share one"}
        line = {"annotator": name, "group": task["group"], "pictures": self.pictures[task["group"]], "task": task["id"],
                "candidates": task["candidates"], "axis": request["axis"], "ranks": ranks,
                "seconds": round(seconds, 2), "repeat_of": task["repeat_of"]}
        self.lines.append(append(self.log, line))
        del self.issued[name]
        return self.view(request)

    def undo(self, request: dict) -> tuple[int, dict]:
        """Append a line that takes the annotator's last judgement back; what is asked next is then the same again."""
        name = request["annotator"]
        mine = [line for line in live(self.lines) if line["annotator"] == name]
        if not mine:
            return self.view(request, 409, error="there is nothing to take back")
        self.lines.append(append(self.log, {"annotator": name, "revokes": mine[-1]["id"]}))
        self.issued.pop(name, None)
        return self.view(request)


# the log ------------------------------------------------------------------------------------------------------

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
    """Add id and time, write one line, return the record when it is on the disk; OSError leaves the file as it was."""
    record = {"id": uuid.uuid4().hex[:16], "time": round(time.time(), 3)} | record
    line, end = (json.dumps(record, allow_nan=False) + "\n").encode(), os.fstat(log.fileno()).st_size
    try:
        if log.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(log.fileno())
    except OSError:
        log.truncate(end)
        raise
    return record


def read_log(path: Path, groups: list[dict]) -> list[dict]:
    """
    All whole lines; [] if there is no file. Stops with one line at anything that `append` has not written or that does
    not fit the groups. A last line without its end (a write that was cut) is left out.
    """
    by_id, text = {group["id"]: group for group in groups}, path.read_bytes() if path.exists() else b""
    lines, ids = [], set()
    for number, raw in enumerate(text[:text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            fail(f"{path} line {number} is not JSON ({error}): remove or repair that line")
        if reason := wrong_line(line, by_id, ids):
            fail(f"{path} line {number}: {reason}: remove that line, or use the file of this run")
        ids.add(line["id"])
        lines.append(line)
    return lines


def wrong_line(line: object, groups: dict[str, dict], ids: set[str]) -> str | None:
    """What is wrong with a line, or None. ids: of the lines before it."""
    if not isinstance(line, dict) or set(line) not in (JUDGEMENT, UNDO):
        return f"expected an object with the keys {', '.join(sorted(JUDGEMENT))}, or {', '.join(sorted(UNDO))}"
    for key in TEXTS:
        if not isinstance(line.get(key, ""), str):
            return f"{key} should be text"
    if "revokes" in line:
        return None if line["revokes"] in ids else f"it revokes {line['revokes']!r}, which is not above it"
    group = groups.get(line["group"])
    if group is None:
        return f"group {line['group']!r} is not in this data set"
    if line["pictures"] != pictures_of(group):
        return f"it is about other pictures than those of {group['id']} here: this file belongs to another build"
    if type(line["seconds"]) not in (int, float):
        return "seconds should be a number"
    shown, known = line["candidates"], {candidate["id"] for candidate in group["candidates"]}
    if not isinstance(shown, list) or len(shown) < 2 or len(known.intersection(map(str, shown))) < len(shown):
        return f"candidates should be two or more ids of group {group['id']!r}"
    if line["axis"] not in ASKED or not good_ranks(line["ranks"], len(shown)):
        return f"expected an axis ({', '.join(ASKED)}) and ranks 1, 2, .. (or null) of the {len(shown)} candidates"
    return None


def good_ranks(ranks: object, count: int) -> bool:
    """Whether these are ranks of `count` candidates (whole numbers, 1 is best, ties allowed) or None: cannot tell."""
    if ranks is None:
        return True
    whole = isinstance(ranks, list) and len(ranks) == count and all(type(rank) is int for rank in ranks)
    return whole and set(ranks) == set(range(1, len(set(ranks)) + 1))


def pictures_of(group: dict) -> str:
    """16 hex digits for the bytes of LR and candidates: ids are the same in every data set."""
    paths = group["lr"], *(candidate["path"] for candidate in group["candidates"])
    sums = [group.get("sha256", {}).get(path, "") for path in paths]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]


def live(lines: list[dict]) -> list[dict]:
    """The judgements that were not taken back, in order."""
    revoked = {line["revokes"] for line in lines if "revokes" in line}
    return [line for line in lines if "revokes" not in line and line["id"] not in revoked]


# what is asked next: a function of seed, annotator and judgements ------------------------------------------------

def next_task(groups: dict[str, list[str]], judged: list[dict], annotator: str, *, seed: int,
              shown: int) -> dict | None:
    """
    {id, group, candidates in the order to show, repeat_of, open: axes to be asked}, or None if nothing is left.

    groups: group id -> ids of its candidates; judged: their live judgements. First the second question of a screen.
    Else, of PERIOD screens one repeats an old one of this annotator, and one was judged by somebody else. Else what was
    judged least: of the groups with the fewest screens one by chance, in it the candidates shown least, of these the
    pairs compared least, and never what this annotator has seen.
    """
    axes = list(ASKED[::1 - 2 * (run.stable_seed(0, "axes", annotator) % 2)])       # one order per person
    screens = {judgement["task"]: judgement for judgement in judged}                # the last judgement of each
    mine = [screen for screen in screens.values() if screen["annotator"] == annotator]
    answered = [judgement["axis"] for judgement in judged if mine and judgement["task"] == mine[-1]["task"]]
    if mine and len(answered) < len(axes):
        last = mine[-1]
        return {"id": last["task"], "group": last["group"], "candidates": last["candidates"],
                "repeat_of": last["repeat_of"], "open": [axis for axis in axes if axis not in answered]}
    seen = {(screen["group"], frozenset(screen["candidates"])) for screen in mine}
    repeated = {screen["repeat_of"] for screen in mine}
    old = [screen for screen in mine[:-GAP] if not screen["repeat_of"] and screen["task"] not in repeated]
    first = [screen for screen in screens.values() if not screen["repeat_of"]]
    others = [screen for screen in first if len(screen["candidates"]) == shown
              and (screen["group"], frozenset(screen["candidates"])) not in seen]
    rng, place, repeat_of = run.np_rng(seed, "annotate", annotator, len(mine)), len(mine) % PERIOD, None
    if place == REPEAT_AT and old:
        screen = old[rng.integers(len(old))]
        group, names, repeat_of = screen["group"], screen["candidates"], screen["task"]
    elif place == SHARED_AT and others:
        screen = others[rng.integers(len(others))]
        group, names = screen["group"], screen["candidates"]
    else:
        group, names = least_judged(groups, first, seen, rng=rng, shown=shown)
        if group is None:
            return None
    names = [sorted(names)[index] for index in rng.permutation(len(names))]
    key = repr((annotator, len(mine), group, names))
    return {"id": hashlib.sha256(key.encode()).hexdigest()[:16], "group": group, "candidates": names,
            "repeat_of": repeat_of, "open": axes}


def least_judged(groups: dict[str, list[str]], screens: list[dict], seen: set[tuple], *, rng: np.random.Generator,
                 shown: int) -> tuple[str, list[str]] | tuple[None, None]:
    """Group and candidates that the annotator has not `seen` together, by the rule of next_task."""
    times = Counter()                                       # group, (group, a) and (group, a, b) -> screens
    for screen in screens:
        names = sorted(screen["candidates"])
        times.update([screen["group"], *((screen["group"], name) for name in names)])
        times.update((screen["group"], *pair) for pair in itertools.combinations(names, 2))
    order = [list(groups)[index] for index in rng.permutation(len(groups))]
    for group in sorted(order, key=lambda group: times[group]):
        members = [groups[group][index] for index in rng.permutation(len(groups[group]))]
        choices = [sorted(choice) for choice in itertools.combinations(members, min(shown, len(members)))]
        choices = [choice for choice in choices if (group, frozenset(choice)) not in seen]
        if choices:
            return group, min(choices, key=lambda names: (
                sum(times[group, name] for name in names),
                sum(times[group, a, b] for a, b in itertools.combinations(names, 2))))
    return None, None


# judgements -> labels -----------------------------------------------------------------------------------------

def verdicts(judgement: dict) -> list[tuple[str, str, float]]:
    """(a, b, 1: a is better, 1/2: a tie, 0: b is better) of every pair shown, a < b; [] for `cannot tell`."""
    if judgement["ranks"] is None:
        return []
    shown = sorted(zip(judgement["candidates"], judgement["ranks"]))
    return [(a, b, (1 + (j > i) - (j < i)) / 2) for (a, i), (b, j) in itertools.combinations(shown, 2)]


def human_labels(groups: list[dict], judged: list[dict]) -> dict[str, dict[str, dict]]:
    """
    Group id -> axis -> {ranks, scores (strengths), source, votes, raters, scale}; only where comparisons connect all
    candidates. judged: live judgements; repeats are no second vote. overall: the mean of both strengths.
    """
    by_axis, labels = defaultdict(list), {group["id"]: {} for group in groups}
    for judgement in judged:
        if judgement["repeat_of"] is None and judgement["ranks"] is not None:
            by_axis[judgement["group"], judgement["axis"]].append(judgement)
    for group in groups:
        names, parts = [candidate["id"] for candidate in group["candidates"]], []
        for axis in ASKED:
            judgements, wins = by_axis[group["id"], axis], np.zeros((len(names), len(names)))
            for a, b, better in itertools.chain.from_iterable(map(verdicts, judgements)):
                wins[names.index(a), names.index(b)] += better
                wins[names.index(b), names.index(a)] += 1 - better
            if connected_components(wins, directed=False)[0] == 1:
                parts.append((strengths(wins), wins.sum(1), {judgement["annotator"] for judgement in judgements}))
                labels[group["id"]][axis] = make_label(*parts[-1])
        if len(parts) == len(ASKED):
            (s, votes, raters), (other_s, other_votes, other_raters) = parts
            labels[group["id"]]["overall"] = make_label((s + other_s) / 2, votes + other_votes, raters | other_raters)
    return labels


def strengths(wins: np.ndarray) -> np.ndarray:
    """[K] log odds with mean 0, most probable for wins [K, K] of the row over the column."""
    def loss(s: np.ndarray) -> tuple[float, np.ndarray]:
        gap = s[:, None] - s                                                        # [K, K]
        surprise = wins * expit(-gap)
        return ((s**2).sum() / (2 * PRIOR**2) - (wins * log_expit(gap)).sum(),
                s / PRIOR**2 - surprise.sum(1) + surprise.sum(0))
    return minimize(loss, np.zeros(len(wins)), jac=True, method="BFGS", options={"gtol": 1e-7}).x


def make_label(s: np.ndarray, votes: np.ndarray, raters: set[str]) -> dict:
    """votes: comparisons that each candidate has won, a tie is half of one. scale: see groups.common_scores."""
    scores = [round(float(value), 4) for value in s]
    return {"ranks": metrics.ranks(scores, TIE), "scores": scores, "source": "human", "votes": votes.tolist(),
            "raters": len(raters), "scale": "group"}


# how far annotators agree -------------------------------------------------------------------------------------

def answered_twice(judged: list[dict]) -> list[tuple[str, set[str], float, float]]:
    """(axis, the one or two annotators, both answers) for all two answers to the same pair of candidates."""
    answers = defaultdict(list)
    for judgement in judged:
        for a, b, better in verdicts(judgement):
            answers[judgement["axis"], judgement["group"], a, b].append((judgement["annotator"], better))
    return [(axis, {name, other}, x, y) for (axis, *_), people in answers.items()
            for (name, x), (other, y) in itertools.combinations(people, 2)]


def agreement(pairs: list[tuple[str, set[str], float, float]]) -> str:
    """
    Rate of equal answers, kappa, and number of pairs, as text. kappa = (rate - chance) / (1 - chance), as Scott 1955,
    Public Opinion Quarterly 19; chance: two people who answer at random, with the overall share t of ties and no
    favorite, agree at the rate t^2 + (1 - t)^2 / 2.
    """
    if not pairs:
        return "-"
    answers = np.array([[x, y] for *_, x, y in pairs])                              # [P, 2]
    rate, ties = (answers[:, 0] == answers[:, 1]).mean(), (answers == 0.5).mean()
    chance = ties**2 + (1 - ties)**2 / 2
    kappa = f", kappa {(rate - chance) / (1 - chance):.2f}" if chance < 1 else ""
    return f"{rate:.2f}{kappa} ({len(pairs)} pairs)"


def report(groups: list[dict], judged: list[dict], labels: dict[str, dict]) -> str:
    """annotation_report.md: agreement between annotators and with oneself, per axis and per annotator."""
    pairs = answered_twice(judged)
    both = sum("overall" in axes for axes in labels.values())
    lines = ["# Human labels", "", f"{sum(map(bool, labels.values()))} of {len(groups)} LR images have labels, {both} "
             "on both axes. Agreement is over pairs of candidates; kappa is corrected for chance.", "",
             "| axis | judgements | between annotators | with oneself |", "| --- | --- | --- | --- |"]
    for axis in ASKED:
        between, oneself = ([pair for pair in pairs if pair[0] == axis and len(pair[1]) == people] for people in (2, 1))
        count = sum(judgement["axis"] == axis for judgement in judged)
        lines.append(f"| {axis} | {count} | {agreement(between)} | {agreement(oneself)} |")
    lines += ["", "| annotator | judgements | cannot tell | median seconds | with others | with oneself |",
              "| --- | --- | --- | --- | --- | --- |"]
    for name in sorted({judgement["annotator"] for judgement in judged}):
        mine = [judgement for judgement in judged if judgement["annotator"] == name]
        others, oneself = ([pair for pair in pairs if name in pair[1] and len(pair[1]) == people] for people in (2, 1))
        unsure, seconds = sum(one["ranks"] is None for one in mine), np.median([one["seconds"] for one in mine])
        lines.append(f"| {name.replace('|', '/')} | {len(mine)} | {unsure} | {seconds:.1f} | {agreement(others)} | "
                     f"{agreement(oneself)} |")
    return "\n".join(lines) + "\n"
