"""For the tests of the annotation page: a small real data set, and the page served by the real command."""
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from conftest import ROOT, run_stage

SETTINGS = {"hr_dir": "skimage", "hr_size": 32, "scale": 4, "degradation": "mild", "train_groups": 4, "val_groups": 2,
            "test_groups": 3, "val_sources": ["rocket"], "test_sources": ["chelsea", "coffee"], "workers": 1,
            "candidates": ["hr|inconsistent", "resample|unnatural", "inconsistent", "unnatural"]}


def build_small(folder: Path) -> Path:
    """A config whose stage 01 has been run: 9 LR images with 4 candidates of 32 x 32 px."""
    config = folder / "config.yaml"
    config.write_text(json.dumps({"run": str(folder / "run"), "seed": 0, "01_build_dataset": SETTINGS}))
    done = run_stage("01", config)
    assert done.returncode == 0, done.stderr
    return config


class Server:
    """`annotate=true` in a process of its own; `base` is the address that it prints."""

    def __init__(self, config: Path, *overrides: str):
        command = [sys.executable, "01_build_dataset.py", str(config), "annotate=true", *overrides]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith("open "):
                self.base = line.split()[1]
                return
        raise AssertionError("".join(seen) + self.process.stderr.read())

    def __enter__(self):
        return self

    def __exit__(self, *keys):
        self.stop(signal.SIGKILL)

    def stop(self, how: signal.Signals = signal.SIGINT) -> str:
        """Its last words."""
        self.process.send_signal(how)
        return self.process.communicate(timeout=60)[0]

    def call(self, path: str, body: dict | bytes | None = None, method: str | None = None) -> tuple[int, dict | bytes]:
        """(status, answer) of a request below the token."""
        return request(self.base + path, body, method)

    def task(self, annotator: str) -> dict:
        return self.call(f"task?annotator={quote(annotator)}")[1]

    def answer(self, annotator: str, task: dict, ranks: list[int] | None) -> tuple[int, dict]:
        return self.call("judge", {"annotator": annotator, "task": task["id"], "axis": task["axis"], "ranks": ranks,
                                   "seconds": 2.5})


def heed_interrupts() -> None:
    """Shells start background jobs with SIGINT ignored, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def request(address: str, body: dict | bytes | None = None, method: str | None = None) -> tuple[int, dict | bytes]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, method=method), timeout=60) as answer:
            status, kind, text = answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        status, kind, text = error.code, error.headers["Content-Type"], error.read()
    return status, json.loads(text) if kind == "application/json" else text


def read_lines(config: Path) -> list[dict]:
    """judgements.jsonl as it lies on the disk."""
    path = stage_folder(config) / "judgements.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_folder(config: Path) -> Path:
    return Path(json.loads(config.read_text())["run"]) / "01_build_dataset"
