"""
The annotation page in a real browser: Debian's chromium, headless, driven through chromedriver's plain W3C protocol.

Skipped, with the reason, where chromium or chromedriver is not installed (apt-get install chromium chromium-driver).

Run     python -m pytest tests/test_annotate_browser.py -rs     # 30 s
"""
import base64
import json
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from annotation_server import Server, build_small, read_lines

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="NO BROWSER: chromium and chromedriver are not "
                                "installed, so nothing of the annotation page was tested in a browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
KEYS = {"left": "\ue012", "right": "\ue014", "down": "\ue015", "up": "\ue013", "enter": "\ue007", "escape": "\ue00c"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"         # the name of an element's id, W3C WebDriver section 12.1


class Browser:
    """One window; less than 500 px wide it is a phone with two dots per px."""

    def __init__(self, width: int, height: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.profile = tempfile.mkdtemp()
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--window-size={width},{height}",
                                                f"--user-data-dir={self.profile}"]}
        if width < 500:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0}}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(600):
            try:
                found = self.send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except urllib.error.URLError as error:
                assert not isinstance(error, urllib.error.HTTPError), error.read()
                time.sleep(0.1)
        self.base += f"/session/{found['sessionId']}"

    def send(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from error

    def open(self, address: str) -> None:
        self.send("POST", "/url", {"url": address})

    def js(self, script: str):
        return self.send("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script: str):
        for _ in range(600):                                            # a minute: the machine may be busy
            value = self.js(script)
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}")

    def find(self, selector: str) -> str:
        return self.send("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.send("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.send("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def key(self, key: str, hold: bool = False) -> None:
        steps = [{"type": "keyDown", "value": KEYS.get(key, key)}]
        steps += [] if hold else [{"type": "keyUp", "value": KEYS.get(key, key)}]
        self.send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def answer(self, *keys: str) -> None:
        """Press keys when the page takes them, and wait for what comes next."""
        before = self.wait("!busy && performance.now() - asked > 250 && JSON.stringify(state)")
        for key in keys:
            self.key(key)
        self.wait(f"!busy && JSON.stringify(state) !== {json.dumps(before)}")

    def screenshot(self) -> bytes:
        return base64.b64decode(self.send("GET", "/screenshot"))

    def complaints(self) -> list:
        return self.send("POST", "/se/log", {"type": "browser"})

    def close(self) -> None:
        self.send("DELETE", "")
        self.driver.terminate()
        self.driver.wait()
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_small(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def config(built, tmp_path):
    tree = json.loads(built.read_text())
    shutil.copytree(tree["run"], tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree | {"run": str(tmp_path / "run")}))
    return path


@pytest.fixture
def browser():
    """Open a window of a size on the page; closed in the end."""
    opened = []

    def start(address: str, width: int, height: int, name: str | None = "ann") -> Browser:
        opened.append(Browser(width, height))
        opened[-1].open(address)
        if name:
            opened[-1].wait("document.querySelector('#welcome[open]') !== null")
            opened[-1].type("#name", name)
            opened[-1].click("#welcome .go")
            opened[-1].wait("state && !busy")
        return opened[-1]

    yield start
    for window in opened:
        window.close()


def test_a_session_with_the_keyboard(config, browser):
    with Server(config) as server:
        page = browser(server.base, 1280, 800)
        first = page.js("state.task")
        page.answer("left")
        assert page.js("state.task.id") == first["id"] and page.js("state.task.step") == 2
        page.answer("down")
        assert page.js("state.task.id") != first["id"]
        page.answer("right")
        page.answer("x")
        page.answer("z")                                                # takes `cannot tell` back
        page.answer("t")
        lines = read_lines(config)
        assert [line.get("ranks") for line in lines] == [[1, 2], [1, 1], [2, 1], None, None, [1, 1]]
        assert lines[4]["revokes"] == lines[3]["id"] and {line["annotator"] for line in lines} == {"ann"}
        assert all(0.2 < line["seconds"] < 60 for line in lines if "seconds" in line)

        shown = page.js("state.task.id")
        page.open(server.base)                                          # a reload: the name is kept, so is the place
        page.wait("state && !busy")
        assert page.js("state.task.id") == shown and page.js("annotator") == "ann"
        assert not page.js("document.querySelector('#welcome').open")
        assert page.complaints() == []


def test_zoom_pan_and_flip_move_all_pictures_together(config, browser):
    with Server(config) as server:
        page = browser(server.base, 1280, 800)
        assert page.js("document.querySelectorAll('.pane').length") == 4
        assert page.js("getComputedStyle(document.querySelector('.candidate img')).imageRendering") == "pixelated"
        middle = ("[...document.querySelectorAll('.pane')].map(p => {const i = p.querySelector('img'); const m = "
                  "new DOMMatrix(getComputedStyle(i).transform); return [(p.clientWidth / 2 - m.e) / i.width, "
                  "(p.clientHeight / 2 - m.f) / i.height]})")
        fit = page.js("[...document.querySelectorAll('.candidate')].map(p => +p.dataset.scale)")
        assert fit[0] == fit[1] == int(fit[0]) >= 8, "whole screen dots for every pixel"
        for _ in range(4):
            page.key("+")
        box = page.js("(() => {const b = document.querySelector('.candidate').getBoundingClientRect(); "
                      "return [b.x + b.width / 2, b.y + b.height / 2].map(Math.round)})()")
        drag = [{"type": "pointerMove", "x": box[0], "y": box[1]}, {"type": "pointerDown", "button": 0},
                {"type": "pointerMove", "x": box[0] - 90, "y": box[1] + 60, "duration": 50},
                {"type": "pointerUp", "button": 0}]
        page.send("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": drag}]})
        places = page.js(middle)
        assert places[0][0] > 0.52 and places[0][1] < 0.48
        assert all(abs(a - b) < 0.01 for place in places for a, b in zip(place, places[0])), places
        zoomed = page.js("[...document.querySelectorAll('.candidate')].map(p => +p.dataset.scale)")
        assert zoomed[0] == zoomed[1] > 3 * fit[0]

        seen = "[...document.querySelectorAll('.pane')].map(p => getComputedStyle(p).visibility === 'visible')"
        boxes = "[...document.querySelectorAll('.candidate')].map(p => JSON.stringify(p.getBoundingClientRect()))"
        page.key(" ")
        assert page.js(seen) == [False, False, True, False] and len(set(page.js(boxes))) == 1
        page.key(" ")
        assert page.js(seen) == [False, False, False, True]
        page.key("l", hold=True)
        assert page.js("getComputedStyle(document.querySelector('.active .peek')).visibility") == "visible"
        page.send("DELETE", "/actions")                                 # lets go of all keys
        assert page.js("getComputedStyle(document.querySelector('.active .peek')).visibility") == "hidden"
        page.key("escape")
        assert page.js(seen) == [True] * 4
        assert page.complaints() == []


def test_four_are_ranked_with_ties(config, browser):
    with Server(config, "annotate_show=4") as server:
        page = browser(server.base, 1280, 800)
        assert page.js("document.querySelectorAll('.candidate').length") == 4
        page.answer("3", "1", "=", "2", "4", "enter")
        assert read_lines(config)[0]["ranks"] == [2, 2, 1, 3]
        page.wait("!busy && performance.now() - asked > 250")
        page.click("#answers .main")                                    # A, by mouse
        page.key("z")                                                   # and not A
        page.answer("4", "3", "2", "1", "enter")
        assert read_lines(config)[1]["ranks"] == [4, 3, 2, 1]
        page.answer("e")
        assert read_lines(config)[2]["ranks"] == [1, 1, 1, 1]
        assert page.complaints() == []


@pytest.mark.parametrize("shown", [2, 4])
def test_a_phone_sees_everything_without_scrolling(config, browser, shown):
    with Server(config, f"annotate_show={shown}") as server:
        page = browser(server.base, 390, 844, name="Zoe & <b>Bo</b>")
        assert page.js("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        outside = ("[...document.querySelectorAll('.pane, button')].filter(e => e.offsetParent && "
                   "(b => b.left < 0 || b.right > 390 || b.top < 0 || b.bottom > 844 || b.height < 24)"
                   "(e.getBoundingClientRect())).map(e => e.outerHTML.slice(0, 80))")
        assert page.js(outside) == []
        page.click(".candidate")                                        # a tap enlarges, another flips
        assert page.js("document.querySelector('.active').clientWidth") > 370
        assert page.js(outside) == []
        page.wait("performance.now() - asked > 250")
        page.click("#answers .main")
        if shown == 2:
            page.wait("state.task.step === 2 && !busy")
            assert read_lines(config)[0]["annotator"] == "Zoe & <b>Bo</b>"
        assert page.js("document.querySelector('#who b')") is None
        assert page.complaints() == []


def test_what_was_not_saved_is_said(config, browser):
    with Server(config) as server:
        page = browser(server.base, 1280, 800)
        page.wait("performance.now() - asked > 250")
        server.stop()
        page.key("left")
        page.wait("!document.querySelector('#alert').hidden")
        assert "Not saved" in page.js("document.querySelector('#alert').textContent")
        assert read_lines(config) == []


def test_a_full_disk_is_said_and_the_answer_is_not_lost(config, browser):
    with Server(config) as server:
        page = browser(server.base, 1280, 800)
        page.wait("performance.now() - asked > 250")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        page.key("left")
        page.wait("!document.querySelector('#alert').hidden")
        assert "Not saved: File too large" in page.js("document.querySelector('#alert').textContent")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        page.click("#alert button")
        page.wait("document.querySelector('#alert').hidden && !busy")
        assert [line["ranks"] for line in read_lines(config)] == [[1, 2]]


def test_nobody_judges_pictures_that_did_not_load(config, browser):
    with Server(config) as server:
        page = browser(server.base, 1280, 800)
        pictures = Path(json.loads(config.read_text())["run"]) / "01_build_dataset" / "candidates"
        page.answer("left")
        pictures.rename(pictures.with_name("away"))
        page.wait("!busy && performance.now() - asked > 250")
        page.key("right")
        page.wait("!document.querySelector('#alert').hidden")
        assert "A picture did not load" in page.js("document.querySelector('#alert').textContent")
        assert page.js("document.querySelectorAll('#answers button').length") == 0
        for key in ("left", "x", "z"):
            page.key(key)
        page.js("failed.first = true")
        page.click("#alert button")                                     # still away
        page.wait("failed && !failed.first")
        assert len(read_lines(config)) == 2
        pictures.with_name("away").rename(pictures)
        page.click("#alert button")
        page.wait("!busy && document.querySelector('#alert').hidden")
        page.answer("left")
        assert [line["ranks"] for line in read_lines(config)] == [[1, 2], [2, 1], [1, 2]]
        shown = "[...document.querySelectorAll('.pane img')].every(i => i.complete && i.naturalWidth > 0)"
        assert page.js(shown)
