"""
Kill every stage at random moments, start it again with the same command, and compare with an uninterrupted run.

    python tests/kill_anywhere.py                               # five stages at tiny size, 10 kills each: 5 minutes
    python tests/kill_anywhere.py --stages 04 --kills 50 --seed 3
    python tests/kill_anywhere.py --stages 02,04 --processes 2 --kills 4    # one rank of two is killed
    python tests/kill_anywhere.py --config my.yaml --start exec # any config; a new interpreter each time

Kills are by turns SIGKILL at a random moment, SIGTERM at a random moment, and SIGKILL while a file is being written
(a `.tmp` lies there, in checkpoints/ if the stage has that). A process that ends before its moment is compared at once,
and the stage begins anew. Exit status 1 if any file differs from the uninterrupted run, is left over or missing.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from conftest import ROOT, TOY, load_stage

# TOY with fewer steps: a stage takes a second or two, and still saves, validates and resumes
TINY = {
    "train_groups: 24": "train_groups: 6", "val_groups: 4": "val_groups: 2", "test_groups: 8": "test_groups: 4",
    "cold_start_steps: 40": "cold_start_steps: 4", "cold_start_steps: 60": "cold_start_steps: 40",
    "steps: 5": "steps: 4", "eval_every: 4": "eval_every: 3", "max_reply_tokens: 40": "max_reply_tokens: 8"}
CLOCK = ("time", "seconds", "peak")                     # keys of .jsonl lines that depend on the machine
LONGEST = 600                                           # seconds that a process may take to end
KINDS = ("SIGKILL", "SIGTERM", "SIGKILL while writing")


def start(number: str, config: Path, log: Path, options: argparse.Namespace) -> int:
    """Start a stage and return its process id; output goes to `log`."""
    script = next(ROOT.glob(f"{number}_*.py"))
    if options.processes > 1 or options.start == "exec":
        launcher = [sys.executable, script.name, str(config)]
        if options.processes > 1:
            launcher[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
        with open(log, "wb") as file:
            return subprocess.Popen(launcher, cwd=ROOT, stdout=file, stderr=file, start_new_session=True).pid
    stage = load_stage(number)                          # imported once, as that takes longer than most lives
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, code = [script.name, str(config)], 1
    try:
        from common.config import load_config
        stage.main(load_config(stage.Config, str(script), [str(config)]))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """Exit status (negative: the signal) of a process that has ended, or None."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait_until(pid: int, deadline: float, condition=lambda: False) -> int | None:
    """Exit status if the process ends before the deadline and before the condition holds, else None."""
    while time.time() < deadline and not condition():
        if (status := ended(pid)) is not None:
            return status
        time.sleep(0.0005)
    return None


def is_writing(folder: Path) -> bool:
    """Whether a file or checkpoint of the stage is half written."""
    places = [path for path in (folder / "checkpoints", folder / "cold_start" / "checkpoints") if path.exists()]
    return any(name.endswith(".tmp") for place in places or [folder] if place.exists() for name in os.listdir(place))


def victim(pid: int, rng: random.Random, processes: int) -> int:
    """The process itself, or one of torchrun's ranks."""
    if processes == 1:
        return pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(rng.choice(children)) if children else pid


def complaint(kind: str, status: int, log: str) -> str | None:
    """What is wrong with the way in which one killed process (no torchrun) ended, or None."""
    if kind != "SIGTERM":
        return None if status == -signal.SIGKILL else f"status {status} after {kind}"
    told = log.splitlines()[-1:] or [""]
    one_line = status == 128 + signal.SIGTERM and told[0].startswith("error: stopped by SIGTERM")
    early = status == -signal.SIGTERM                   # before main, where Python has no say yet
    return None if (one_line or early) and "Traceback" not in log else f"status {status}, {told[0]!r} after SIGTERM"


def contents(folder: Path) -> dict[str, str]:
    """Name -> hash of each file of a stage, without what depends on the clock or the machine."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.name in ("manifest.json", ".lock", "curves.png"):         # the latter plots seconds
            raw = b""
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in raw.splitlines()]
            raw = json.dumps([{key: value for key, value in line.items() if not key.startswith(CLOCK)}
                              for line in lines]).encode()
        elif path.name in ("table.md", "report.html"):
            raw = re.sub(rb"seconds per score.*?(</tr>|\n)|seconds per sample.*?(</table>|\n)", b"", raw, flags=re.S)
        elif path.name == "results.json":
            raw = re.sub(rb'"seconds[^"]*": ({[^}]*}|[^,}]*)', b"", raw)
        elif path.name == "state.json":
            state = json.loads(raw)
            state["sha256"].pop("state.json")           # of seconds, too
            raw = json.dumps({key: value for key, value in state.items() if key not in CLOCK}).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(raw).hexdigest()
    return found


def differences(ours: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return [f"{name}: " + ("left over" if name not in wanted else "missing" if name not in ours else "differs")
            for name in sorted(ours.keys() | wanted.keys()) if ours.get(name) != wanted.get(name)]


def finish(number: str, config: Path, log: Path, options: argparse.Namespace) -> float:
    """Run a stage to its end; returns the seconds. Stops this program if the stage fails."""
    begun, pid = time.time(), start(number, config, log, options)
    status = wait_until(pid, begun + LONGEST)
    if status != 0:
        sys.exit(f"{number}: status {status}\n{log.read_text(errors='replace')}")
    return time.time() - begun


def torment(number: str, config: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """Kill one stage options.kills times, print a row of the table, and return what is wrong."""
    rng, log = random.Random(f"{options.seed} {number}"), folder.parent / f"{number}.log"
    load_stage(number)                                  # its imports are not among the moments
    seconds = finish(number, config, log, options)
    wanted = contents(folder)
    shutil.rmtree(folder)
    done, faults, compared = dict.fromkeys(KINDS, 0), [], 0
    while sum(done.values()) < options.kills:
        kind, begun = KINDS[sum(done.values()) % len(KINDS)], time.time()
        pid = start(number, config, log, options)
        status = wait_until(pid, begun + rng.random() * seconds)
        if status is None and kind == KINDS[2]:
            status = wait_until(pid, begun + LONGEST, lambda: is_writing(folder))
        if status is None:
            os.kill(victim(pid, rng, options.processes), signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            status = wait_until(pid, time.time() + LONGEST)
            done[kind] += 1
            if status is None:
                sys.exit(f"{number}: still there {LONGEST} s after {kind}")
        if status == 0:
            faults += differences(contents(folder), wanted)
            compared += 1
            shutil.rmtree(folder)
        elif options.processes == 1 and (said := complaint(kind, status, log.read_text(errors="replace"))):
            faults.append(said)
    finish(number, config, log, options)
    faults += differences(contents(folder), wanted)
    kills = "  ".join(f"{count:3} {kind}" for kind, count in done.items())
    verdict = f"{len(faults)} FAULTS" if faults else "same bytes"
    row = f"{number}  {seconds:6.1f} s  {kills}  {compared + 1:3} compared  {verdict}"
    print(row, *faults, sep="\n    ", flush=True)
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="01,02,03,04,05", help="earlier ones are made if they are missing")
    parser.add_argument("--kills", type=int, default=10, help="per stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="above 1: under torchrun, one rank is killed")
    parser.add_argument("--start", choices=("fork", "exec"), default="fork", help="exec: a new interpreter each time")
    parser.add_argument("--config", type=Path, help="instead of the tiny one; its run is not touched")
    parser.add_argument("--folder", type=Path, help="to work in; default: a temporary one, removed at the end")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    place = options.folder or Path(tempfile.mkdtemp(prefix="kill_anywhere_"))
    text = options.config.read_text() if options.config else TOY
    for old, new in TINY.items() if not options.config else ():
        text = text.replace(old, new)
    text = re.sub(r"(?m)^run:.*\n", "", text)
    config, run_folder = place / "config.yaml", place / "run"
    run_folder.mkdir(parents=True, exist_ok=True)
    config.write_text(f"run: {run_folder}\n{text}")
    wanted, faults, before = options.stages.split(","), [], {}
    for number in ("01", "02", "03", "04", "05"):
        folder = run_folder / next(ROOT.glob(f"{number}_*.py")).stem
        if number in wanted:
            faults += torment(number, config, folder, options)
        elif number < max(wanted):
            finish(number, config, place / f"{number}.log", options)
        if folder.exists():
            before[folder] = contents(folder)
    for folder, own in before.items():                  # earlier results are as they were
        changed = differences(contents(folder), own)
        faults += changed
        print(*(f"{folder.name}, after later stages: {fault}" for fault in changed), sep="\n", end="")
    if not options.folder:
        shutil.rmtree(place)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
