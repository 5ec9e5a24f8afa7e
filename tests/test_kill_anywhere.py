"""
Every stage is killed at random moments, goes on by the same command, and ends with the bytes of a run without kills.

Kills are by turns SIGKILL, SIGTERM, and SIGKILL while a file is being written (a `.tmp` lies there).

Run     python -m pytest tests/test_kill_anywhere.py            # 60 s
        python tests/test_kill_anywhere.py /tmp/new_folder 30   # 30 kills for each stage
"""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from conftest import ROOT, TOY, load_stage, run_stage
from test_build_dataset import write_config

# TOY with fewer steps: a stage takes a second or two, and still saves, validates and resumes
TINY = {
    "train_groups: 24": "train_groups: 6", "val_groups: 5": "val_groups: 2", "test_groups: 8": "test_groups: 4",
    "cold_start_steps: 40": "cold_start_steps: 4", "base_steps: 20": "base_steps: 4",
    "steps: 5": "steps: 4", "eval_every: 4": "eval_every: 3", "max_reply_tokens: 40": "max_reply_tokens: 8"}
CLOCK = ("time", "seconds", "peak")                     # keys whose values depend on the machine
SHOWN = ("manifest.json", "curves.png", "report.html", "table.md")      # files that show such values
LONGEST = 300                                           # seconds that a process may take to end


def start(number: str, config: Path, log: Path) -> int:
    """Start a stage in a fork of this process, which has imported it, and return the process id."""
    stage = load_stage(number)
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [stage.__file__, str(config)]
        stage.main(stage.load_config(stage.Config, stage.__file__))
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int, seconds: float, condition=lambda: False) -> int | None:
    """Return the exit status (negative: the signal) if the process ends in that time and before the condition holds."""
    deadline = time.time() + seconds
    while time.time() < deadline and not condition():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def is_writing(folder: Path) -> bool:
    """Whether a file or checkpoint of the stage is half written."""
    return any(name.endswith(".tmp") for _, folders, files in os.walk(folder) for name in (*folders, *files))


def timeless(value: object) -> object:
    """Return a JSON value without what depends on the clock or the machine."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.startswith(CLOCK)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """Return name -> hash of each file of a stage."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = b"" if path.name in SHOWN else path.read_bytes()
        if path.suffix in (".json", ".jsonl") and raw:
            texts = raw.splitlines() if path.suffix == ".jsonl" else [raw]
            raw = json.dumps([timeless(json.loads(text)) for text in texts]).encode()
        result[path.relative_to(folder).as_posix()] = hashlib.sha256(raw).hexdigest()
    return result


def differences(folder: Path, whole: dict[str, str]) -> list[str]:
    """Return the files that differ, are left over or are missing."""
    files = contents(folder)
    return [name for name in sorted(files.keys() | whole.keys()) if files.get(name) != whole.get(name)]


def torment(number: str, config: Path, folder: Path, kills: int) -> None:
    """Kill a stage again and again, and compare what is there at the end with a run without kills."""
    rng, log, begun = random.Random(number), folder.parent / f"{number}.log", time.time()
    assert wait(start(number, config, log), LONGEST) == 0, log.read_text()
    seconds, whole, killed = time.time() - begun, contents(folder), 0
    shutil.rmtree(folder)
    while killed < kills:
        pid, kind = start(number, config, log), ("SIGKILL", "SIGTERM", "SIGKILL while writing")[killed % 3]
        status = wait(pid, rng.random() * seconds)
        if status is None and kind == "SIGKILL while writing":
            status = wait(pid, LONGEST, lambda: is_writing(folder))
        if status is None:
            os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            status = wait(pid, LONGEST)
        text = log.read_text()
        if status == 0:                                 # it had ended before its moment: begin anew
            assert not (wrong := differences(folder, whole)), wrong
            shutil.rmtree(folder)
        elif kind == "SIGTERM" and status == 128 + signal.SIGTERM:
            assert "error: stopped by SIGTERM" in text and "Traceback" not in text, text
        else:                                           # SIGTERM before main is the system's
            assert status == (-signal.SIGTERM if kind == "SIGTERM" else -signal.SIGKILL), text
        killed += status != 0
    assert wait(start(number, config, log), LONGEST) == 0, log.read_text()
    assert not (wrong := differences(folder, whole)), wrong
    print(f"{number}: {seconds:.1f} s, {kills} kills, same bytes", flush=True)


def main(place: Path, kills: int) -> None:
    """Torment all stages in a new folder, and see that later stages leave earlier ones alone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    text, config, before = TOY, place / "config.yaml", {}
    for old, new in TINY.items():
        text = text.replace(old, new)
    (place / "run").mkdir(parents=True)
    config.write_text(f"run: {place / 'run'}\n{text}")
    for path in sorted(ROOT.glob("0*.py")):
        torment(path.stem[:2], config, place / "run" / path.stem, kills)
        before[path.stem] = contents(place / "run" / path.stem)
    for stem, files in before.items():
        assert not (wrong := differences(place / "run" / stem, files)), wrong


def test_every_stage_ends_with_the_same_bytes_however_often_it_is_killed(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path / "new"), "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 kills, same bytes") == 5


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_leave_with_the_process_that_started_them(tmp_path):
    """Else they would wait for jobs for ever, and their last job would write below a run that goes on."""
    config, folder = write_config(tmp_path, workers=2, train_groups=40), tmp_path / "run" / "01_build_dataset"
    process = subprocess.Popen([sys.executable, "01_build_dataset.py", str(config)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(folder.glob("candidates/*.png")):
        time.sleep(0.01)
    children = [path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    workers = sum(children, [])
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while any(map(is_alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2 and not any(map(is_alive, workers))
    done = run_stage("01", config)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["results"]["groups"] == 43


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
