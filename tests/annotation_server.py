"""For the tests of the annotation page: requests, and the page in this process."""
import json
import shutil
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from common import annotate
from common.groups import all_groups


def copy_toy(toy_run: Path, folder: Path) -> Path:
    """A copy of toy_run's data set that nobody has judged: folder/01_build_dataset."""
    return Path(shutil.copytree(toy_run / "01_build_dataset", folder / "01_build_dataset"))


def read_lines(folder: Path) -> list[dict]:
    """judgements.jsonl as it lies on the disk."""
    return [json.loads(line) for line in (folder / annotate.LOG).read_text().splitlines()]


class Client:
    """Requests below an address with its token."""

    def __init__(self, base: str):
        self.base = base

    def call(self, path: str, body: dict | bytes | None = None, base: str | None = None) -> tuple[int, dict | bytes]:
        """(status, answer) of a GET, or of a POST of this body."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            with urllib.request.urlopen((base or self.base) + path, data, timeout=60) as answer:
                status, kind, text = answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            status, kind, text = error.code, error.headers["Content-Type"], error.read()
        return status, json.loads(text) if kind == "application/json" else text

    def task(self, annotator: str) -> dict:
        return self.call(f"task?annotator={quote(annotator)}")[1]

    def answer(self, annotator: str, task: dict, ranks: list[int] | None) -> tuple[int, dict]:
        return self.call("judge", {"annotator": annotator, "task": task["id"], "axis": task["axis"], "ranks": ranks,
                                   "seconds": 2.5})


@contextmanager
def serving(folder: Path, shown: int = 2):
    """The page about two LR images per split, in this process; yields a client."""
    page = annotate.Page(folder, all_groups(folder), seed=0, shown=shown, per_split=2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), annotate.Handler)
    server.page = page
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Client(f"http://127.0.0.1:{server.server_port}/{page.token}/")
    finally:
        server.shutdown()
        server.server_close()
        page.log.close()
