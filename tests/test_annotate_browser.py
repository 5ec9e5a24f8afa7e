"""
The annotation page in a real browser: Debian's chromium, headless, driven through chromedriver's plain W3C protocol.

Skipped, with the reason, where chromium or chromedriver is not installed (apt-get install chromium chromium-driver).

Run     python -m pytest tests/test_annotate_browser.py -rs     # 30 s
"""
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import pytest

from annotation_server import copy_toy, read_lines, serving
from common import annotate

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="NO BROWSER: chromium and chromedriver are not "
                                "installed, so nothing of the annotation page was tested in a browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
KEYS = {"left": "\ue012", "right": "\ue014", "down": "\ue015", "enter": "\ue007"}
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
                session = self.send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except urllib.error.URLError as error:
                assert not isinstance(error, urllib.error.HTTPError), error.read()
                time.sleep(0.1)
        self.base += f"/session/{session['sessionId']}"

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

    def key(self, key: str) -> None:
        steps = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        self.send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def answer(self, *keys: str) -> None:
        """Press keys when the page takes them, and wait for what comes next."""
        before = self.wait("!busy && performance.now() - asked > 250 && JSON.stringify(state)")
        for key in keys:
            self.key(key)
        self.wait(f"!busy && JSON.stringify(state) !== {json.dumps(before)}")

    def complaints(self) -> list:
        return self.send("POST", "/se/log", {"type": "browser"})

    def close(self) -> None:
        self.send("DELETE", "")
        self.driver.terminate()
        self.driver.wait()
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture
def folder(toy_run, tmp_path):
    return copy_toy(toy_run, tmp_path)


@pytest.fixture
def browser():
    """Open a window of a size on the page, and say who judges; closed in the end."""
    opened = []

    def start(address: str, width: int, height: int, name: str = "ann") -> Browser:
        opened.append(Browser(width, height))
        opened[-1].open(address)
        opened[-1].wait("document.querySelector('#welcome[open]') !== null")
        opened[-1].type("#name", name)
        opened[-1].click("#welcome .go")
        opened[-1].wait("state && !busy")
        return opened[-1]

    yield start
    for window in opened:
        window.close()


def test_a_session_with_the_keyboard(folder, browser):
    with serving(folder) as client:
        page = browser(client.base, 1280, 800)
        first = page.js("state.task")
        page.answer("left")
        assert page.js("state.task.id") == first["id"] and page.js("state.task.step") == 2
        page.answer("down")
        assert page.js("state.task.id") != first["id"]
        page.answer("right")
        page.answer("x")
        page.answer("z")                                                # takes `cannot tell` back
        page.answer("t")
        lines = read_lines(folder)
        assert [line.get("ranks") for line in lines] == [[1, 2], [1, 1], [2, 1], None, None, [1, 1]]
        assert lines[4]["revokes"] == lines[3]["id"] and {line["annotator"] for line in lines} == {"ann"}
        shown = page.js("state.task.id")
        page.open(client.base)                                          # a reload: the name is kept, so is the place
        page.wait("state && !busy")
        assert page.js("state.task.id") == shown and page.js("annotator") == "ann"
        page.key("+")                                                   # all pictures together
        scales = page.js("[...document.querySelectorAll('.candidate')].map(p => +p.dataset.scale)")
        seen = "[...document.querySelectorAll('.pane')].map(p => getComputedStyle(p).visibility === 'visible')"
        page.key(" ")
        assert scales[0] == scales[1] and page.js(seen) == [False, False, True, False]
        page.key(" ")
        assert page.js(seen) == [False, False, False, True]
        assert page.complaints() == []


def test_a_phone_sees_four_without_scrolling_and_ranks_them_with_ties(folder, browser):
    with serving(folder, shown=4) as client:
        page = browser(client.base, 390, 844, name="Zoe & <b>Bo</b>")
        assert page.js("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        outside = ("[...document.querySelectorAll('.pane, button')].filter(e => e.offsetParent && "
                   "(b => b.left < 0 || b.right > 390 || b.top < 0 || b.bottom > 844 || b.height < 24)"
                   "(e.getBoundingClientRect())).map(e => e.outerHTML.slice(0, 80))")
        assert page.js(outside) == []
        page.click(".candidate")                                        # a tap enlarges
        assert page.js("document.querySelector('.active').clientWidth") > 370 and page.js(outside) == []
        page.answer("3", "1", "=", "2", "4", "enter")
        page.wait("!busy && performance.now() - asked > 250")
        page.click("#answers .main")                                    # A, by a tap
        page.key("z")                                                   # and not A
        page.answer("4", "3", "2", "1", "enter")
        assert [line["ranks"] for line in read_lines(folder)] == [[2, 2, 1, 3], [4, 3, 2, 1]]
        assert page.js("document.querySelector('#who b')") is None and page.complaints() == []


def test_what_is_not_saved_is_said_and_nobody_judges_pictures_that_did_not_load(folder, browser, monkeypatch):
    with serving(folder) as client:
        page = browser(client.base, 1280, 800)
        page.wait("performance.now() - asked > 250")
        with monkeypatch.context() as patch:
            patch.setattr(annotate, "append", lambda log, line: (_ for _ in ()).throw(OSError(28, "No space left")))
            page.key("left")
            page.wait("!document.querySelector('#alert').hidden")
            assert "Not saved: No space left" in page.js("document.querySelector('#alert').textContent")
        page.click("#alert button")
        page.wait("document.querySelector('#alert').hidden && !busy")
        (folder / "candidates").rename(folder / "away")
        page.wait("performance.now() - asked > 250")
        page.key("right")
        page.wait("!document.querySelector('#alert').hidden")
        assert "A picture did not load" in page.js("document.querySelector('#alert').textContent")
        page.key("left")
        assert page.js("document.querySelectorAll('#answers button').length") == 0
        (folder / "away").rename(folder / "candidates")
        page.click("#alert button")
        page.wait("!busy && document.querySelector('#alert').hidden")
        page.answer("left")
        assert [line["ranks"] for line in read_lines(folder)] == [[1, 2], [2, 1], [1, 2]]
