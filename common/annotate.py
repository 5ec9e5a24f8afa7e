"""
The annotation page: a small HTTP server for people who compare candidates; the page itself is annotate.html.

    GET  /<token>/              the page
    GET  /<token>/task          ?annotator=NAME: what to judge next, and progress
    GET  /<token>/image/<id>    PNG; ids are random, so that neither names nor methods can be read off
    POST /<token>/judge         {annotator, task, axis, ranks, seconds}; answers like `task` once it is on the disk,
                                507 if it cannot be written
    POST /<token>/undo          {annotator}: takes the last judgement back

No path of a request ever becomes a path on the disk. Whoever knows the token may judge, under any name.
"""
import hmac
import json
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from common import annotation, human_labels, run
from common.config import fail

LARGEST_BODY = 10_000                   # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'; "
                               "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
HTML, JSON, TEXT, PNG = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8", "image/png"


class Handler(BaseHTTPRequestHandler):
    """One request; what all share is in self.server.page."""
    protocol_version = "HTTP/1.1"
    timeout = 60                        # s without a byte; browsers open a new connection by themselves

    def do_GET(self):
        page, route = self.server.page, self.route()
        if route is None:
            return
        if route == "":
            self.reply(200, (Path(__file__).parent / "annotate.html").read_bytes(), HTML)
        elif route == "task":
            name = parse_qs(urlsplit(self.path).query, errors="replace").get("annotator", [""])[0]
            wrong = annotation.wrong_name(name)
            if wrong:
                return self.reply(400, {"error": wrong})
            with page.lock:
                answer = annotation.view(page, name)
            self.reply(200, answer)
        elif route.removeprefix("image/") in page.images:
            self.reply(200, annotation.image_png(*page.images[route.removeprefix("image/")]), PNG)
        elif route in annotation.ACTIONS:
            self.reply(405, b"use POST", TEXT, {"Allow": "POST"})
        else:
            self.reply(404, b"there is no such thing here", TEXT)

    def do_POST(self):
        body = self.body()              # read first: what is left unread would be taken for the next request
        route = None if body is None else self.route()
        if route is None:
            return
        if route not in annotation.ACTIONS:
            return self.reply(405, b"use GET", TEXT, {"Allow": "GET"})
        action, keys = annotation.ACTIONS[route]
        try:
            record = json.loads(body)
        except (ValueError, RecursionError):
            return self.reply(400, {"error": "the body is not JSON"})
        if not isinstance(record, dict) or set(record) != keys:
            return self.reply(400, {"error": f"expected a JSON object with the keys {', '.join(sorted(keys))}"})
        wrong = annotation.wrong_name(record["annotator"])
        if wrong:
            return self.reply(400, {"error": wrong})
        self.reply(*annotation.act(self.server.page, action, record))

    def do_other(self):
        self.close_connection = True    # there may be a body
        self.reply(405, b"use GET or POST", TEXT, {"Allow": "GET, POST"})

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_HEAD = do_other

    def route(self) -> str | None:
        """What follows the token in the address; None, and an answer, where the token is wrong."""
        token, slash, rest = urlsplit(self.path).path.removeprefix("/").partition("/")
        if hmac.compare_digest(token.encode(), self.server.page.token.encode()) and slash:
            return rest
        self.reply(403, b"wrong address: open the one that the program has printed", TEXT)
        return None

    def body(self) -> bytes | None:
        """The body of a POST; None, and an answer, where it is not as it should be."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and len(length) < 10 and int(length) <= LARGEST_BODY:
            return self.rfile.read(int(length))
        self.close_connection = True
        if not length.isdecimal():
            self.reply(411, b"Content-Length is missing or no number", TEXT)
        else:
            self.reply(413, f"more than {LARGEST_BODY} bytes".encode(), TEXT)
        return None

    def reply(self, status: int, content: bytes | dict, kind: str = JSON, more: dict | None = None) -> None:
        """Send an answer; a dict goes as JSON."""
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        kept = {"Cache-Control": "private, max-age=86400" if kind == PNG else "no-store"}
        closing = {"Connection": "close"} if self.close_connection else {}
        facts = {"Content-Type": kind, "Content-Length": str(len(content))}
        for key, value in (HEADERS | kept | closing | facts | (more or {})).items():
            self.send_header(key, value)
        self.end_headers()
        try:
            self.wfile.write(b"" if self.command == "HEAD" else content)
        except ConnectionError:         # the browser has gone on to something else
            self.close_connection = True

    def version_string(self) -> str:
        return "annotate"

    def log_message(self, format, *keys):
        """Print nothing."""


def ask_people(cfg, folder: Path, publish: Callable) -> None:
    """What the settings `labels` and `annotate` of stage 01 ask for, on its finished folder."""
    if cfg.labels:
        human_labels.set_labels(folder, cfg.labels, cfg.annotate_without, publish)
    if cfg.annotate:
        page = annotation.open_page(folder, cfg.seed, cfg.annotate_show, cfg.annotate_splits, cfg.annotate_groups)
        serve(page, cfg.annotate_host, cfg.annotate_port)


def serve(page: annotation.Page, host: str, port: int) -> None:
    """Serve until Ctrl-C; port 0: one that is free."""
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        fail(f"annotate_host {host}, annotate_port {port}: {error.strerror or error}; choose another "
                 "(0: any free port)")
    server.page = page
    print(f"{len(page.groups)} groups to compare, {len(page.lines)} lines in {page.log.name}\n"
          f"open  http://{socket.gethostname() if host == '0.0.0.0' else host}:{server.server_port}/{page.token}/\n"
          "Ctrl-C stops; every judgement is on the disk at once, and the same command goes on", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{len(page.lines)} lines in {page.log.name}\nlabels from them: "
              f"{run.command('01_build_dataset')} labels=human")
    finally:
        server.server_close()
