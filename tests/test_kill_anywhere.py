"""
Every stage is killed a few times, by SIGKILL, by SIGTERM and while it writes, and ends with the bytes of a whole run.

More kills, two processes, or another config: python tests/kill_anywhere.py --help

Run     python -m pytest tests/test_kill_anywhere.py        # 40 s
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, run_stage
from test_build_dataset import write_config


def test_a_few_kills_on_each_stage():
    command = [sys.executable, "tests/kill_anywhere.py", "--kills", "3", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith("same bytes")]
    assert [row[0] for row in rows] == ["01", "02", "03", "04", "05"]
    assert all(row[3:9] == ["1", "SIGKILL", "1", "SIGTERM", "1", "SIGKILL"] for row in rows)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_leave_with_the_process_that_started_them(tmp_path):
    """Else they would wait for jobs for ever, and their last job would write below a run that goes on."""
    config = write_config(tmp_path, workers=2, train_groups=40)
    process = subprocess.Popen([sys.executable, "01_build_dataset.py", str(config)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "01_build_dataset" / "progress" / "crops.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    deadline = time.time() + 20
    while any(map(is_alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
    done = run_stage("01", config)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "01_build_dataset" / "manifest.json").read_text())["results"]["groups"] == 43
