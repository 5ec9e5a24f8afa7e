"""
What a stage leaves on disk, and how it is found again. Only the main rank writes.

    <run>/<script stem>/config.yaml     settings as resolved; a valid config file itself
                        metrics.jsonl   one object per step; curves.png draws it
                        checkpoints/    step_000200/, the newest two
                        manifest.json   written last: the stage is finished
                        .lock           held by the process that works here

Files appear whole or not at all, and JSON is strict. Random numbers are functions of (seed, keys): the same for any
process, batch and history, so none is ever saved.
"""
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from common import dist
from common.config import STAGES, config_text, fail, read_yaml

PACKAGES = ("torch", "transformers", "diffusers", "peft", "numpy", "pillow", "scikit-image", "safetensors")
AGAIN = "the same command goes on from the last checkpoint; what was finished is kept"
NO_MEMORY = re.compile("out of memory|allocate memory")                 # as torch and the system say it
NO_ROOM = re.compile("No space left|quota exceeded|File too large|Read-only file|Permission denied|not permitted|"
                     "PytorchStreamWriter|unexpected pos")              # the last two: torch.save on a full disk


# stages --------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def explained() -> Iterator[None]:
    """
    Give one line for what ends a run from outside, and let a bug keep its traceback; decorates main.

    SIGTERM ends the process as SIGKILL would: files are whole at any time. Ranks of torchrun leave that signal to the
    system, which also ends one that waits for the others; torchrun itself says what happened.
    """
    if "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(stopped("SIGTERM", 128 + signal.SIGTERM)))
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(stopped("Ctrl-C", 128 + signal.SIGINT)) from None
    except (OSError, MemoryError, RuntimeError, safetensors.SafetensorError) as error:
        text = str(error)[:400]                         # what the system and libraries say, whatever its type
        if isinstance(error, MemoryError) or NO_MEMORY.search(text):
            fail(f"out of memory ({text}): lower what --help marks as `memory`; {AGAIN}")
        if NO_ROOM.search(text):
            fail(f"{text}: make room or change run=; {AGAIN}")
        raise


def stopped(by: str, status: int) -> int:
    """Say what stopped the run, and return its exit status."""
    if dist.is_main():
        os.write(2, f"\nerror: stopped by {by}: {AGAIN}\n".encode())        # print() may not be used in a handler
    return status


def open_stage(settings, script: str, folder: Path | None = None, *, free: tuple[str, ...] = (),
               go_on: bool = False) -> Path:
    """
    Return this stage's folder (<run>/<script stem> if none is given), new or to be resumed; every rank calls it.

    settings: the script's dataclass, which is recorded in config.yaml.

    Exits with status 0 if the stage is finished, unless told to go on, and with one line if its folder was made with
    other settings. `run` may differ, as the folder may have been moved, and so may `free`: memory, use of the results.
    """
    another, stem = "out" if folder and hasattr(settings, "out") else "run", Path(script).stem
    folder = folder or Path(settings.run) / stem
    record, finished = folder / "config.yaml", (folder / "manifest.json").exists()
    begun = record.exists() and any(path.name not in ("config.yaml", ".lock") for path in folder.iterdir())
    changed = changed_settings(folder, settings, stem, free) if begun else []
    dist.barrier()                                      # every rank has looked before the main rank writes
    if changed:
        fail(f"{folder} has other settings: {', '.join(changed)}; use another {another}= or delete the folder")
    if finished and not go_on:
        print_next(folder)
        dist.finish()
        raise SystemExit(0)
    if not finished:
        if dist.is_main():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock(folder)
                write_bytes(record, config_text(settings, stem).encode())
            except OSError as error:
                fail(f"{folder}: cannot write there ({error.strerror}); choose another {another}=")
        about = (sys.modules[type(settings).__module__].__doc__ or "").strip().partition("\n")[0]
        dist.print0(f"{stem}: {about}\nwrites {folder}")
    dist.barrier()
    return folder


def lock(folder: Path) -> None:
    """Keep other processes, such as one that outlived its torchrun, from writing to the folder while this one lives."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)        # never closed: the lock ends with the process
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                      # POSIX allows both
        fail(f"{folder}: another process is at work there (`fuser {folder}/.lock` names it): wait for it or end it")


def changed_settings(folder: Path, settings, stem: str, free: tuple[str, ...]) -> list[str]:
    """Return `key: old -> new` for every setting but `run` and `free` that differs from what the folder records."""
    old = settings_of(folder, stem)
    new = dataclasses.asdict(settings)
    return [f"{key}: {old.get(key, '(none)')} -> {new.get(key, '(none)')}" for key in old | new
            if key not in ("run", *free) and old.get(key, "(none)") != new.get(key, "(none)")]


def discard(folder: Path) -> None:
    """Remove a folder that was begun with unusable settings or input, but for what people said there."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "judgements.jsonl":
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def require(run_dir: str | Path, stem: str, remedy: str = "") -> Path:
    """
    Return the folder of a finished earlier stage, or stop and name the command that makes it (`remedy`, if given).

    The main rank checks that its weights are the bytes that were written.
    """
    folder = Path(run_dir) / stem
    if not (folder / "manifest.json").exists():
        fail(f"{folder / 'manifest.json'} is missing: first run `{command(stem)}`")
    for name, checksum in read_json(folder / "manifest.json").get("weights", {}).items() if dist.is_main() else ():
        if not (folder / name).is_file() or sha256(folder / name) != checksum:
            fail(f"{folder / name} is missing or damaged (its checksum does not fit): delete {folder} and run "
                 f"`{remedy or command(stem)}` again")
    return folder


def settings_of(folder: Path, stem: str) -> dict:
    """Return the settings that stage `stem` recorded in its folder; {} if there are none, as beside a bare model."""
    record = folder / "config.yaml"
    return {key: value for _, key, value in read_yaml(record, stem)} if record.exists() else {}


def write_manifest(folder: Path, *, script: str, started: float, inputs: list[Path], results: dict) -> None:
    """
    Write manifest.json, the mark of a finished stage, and print results and next command (main rank only).

    started: time.time() at the start of the script. inputs: folders of the earlier stages that were read; one
    without manifest (a model folder) is not recorded.
    """
    if not dist.is_main():
        return
    cuda = torch.cuda.is_available()
    models = [path.relative_to(folder) for path in sorted(folder.glob("*/**/*"))
              if path.suffix in (".json", ".safetensors")]
    write_json(folder / "manifest.json", {
        "stage": Path(script).stem,
        "results": results,
        "argv": sys.argv,
        "git": git_state(Path(script).resolve().parent),
        "inputs": {path.name: sha256(path / "manifest.json") for path in inputs if (path / "manifest.json").exists()},
        "weights": {path.as_posix(): sha256(folder / path) for path in models       # damage is noticed, see require
                    if not {"checkpoints", "records"} & set(path.parts)},           # records: of restored pictures
        "seconds": round(time.time() - started, 1),             # of this process, since the last resume
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "peak_memory_gb": round(peak_memory_gb(), 3),           # main rank
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    })
    for key, value in results.items():
        print(f"{key:<32}{value}")
    print_next(folder)


def print_next(folder: Path) -> None:
    """Say where a finished stage lies and which command comes next."""
    dist.print0(f"{folder.name} is finished: {folder}   (delete that folder to run it again)")
    if folder.name in STAGES[:-1]:
        dist.print0(f"next: {command(STAGES[STAGES.index(folder.name) + 1])}")


def command(stem: str) -> str:
    """Return the command that runs a stage with the config file, run and seed of this process."""
    shared = [argument for argument in sys.argv[2:] if argument.startswith(("run=", "seed="))]
    return " ".join(["python", f"{stem}.py", *sys.argv[1:2], *shared])


def peak_memory_gb() -> float:
    """Return the peak so far: of GPU memory if there is a GPU, else resident (this process or a child)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(user).ru_maxrss for user in users) / 2**20        # Linux counts KiB


def git_state(folder: Path) -> dict:
    """Return the commit of the code in folder and whether tracked files differ from it; nulls without git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        text = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": text.removesuffix("-dirty"), "dirty": text.endswith("-dirty")}


# files ---------------------------------------------------------------------------------------------------------------

def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    partial = Path(f"{path}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)                         # on a full disk half a file is in the way
        raise
    partial.replace(path)


def plain(value: object) -> object:
    """Return value as strict JSON can hold it: tensors and arrays as lists, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: object) -> None:
    """Write value as strict JSON, whole or not at all."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode(errors="backslashreplace"))      # \udcff: of a name that is not UTF-8


def write_lines(path: Path, records: list[dict]) -> None:
    """Write one JSON object per line, whole or not at all."""
    write_bytes(path, "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode())


def write_csv(path: Path, records: list[dict]) -> None:
    """Write a table for a spreadsheet, whole or not at all; its head is the keys, which all records share."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_bytes(path, buffer.getvalue().encode())


def read_json(path: Path) -> object:
    """Return what a JSON file holds, or stop with one line that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read as JSON ({error}); run the stage that writes it again")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a .safetensors file, whole or not at all."""
    write_bytes(path, safetensors.torch.save({name: p.detach().cpu().contiguous() for name, p in tensors.items()}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file, on the CPU, or stop with one line that names it."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        fail(f"{path}: cannot be read as safetensors ({error}); delete it and the checkpoints beside it, and run the "
             "stage that writes it again")


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_metrics(folder: Path, step: int, values: dict, name: str = "metrics.jsonl") -> None:
    """Append {"step", "time", ...values} to a .jsonl file (main rank only); 0-d tensors are fine."""
    if dist.is_main():
        row = plain({"step": step, "time": round(time.time(), 3), **values})
        with open(folder / name, "a", encoding="utf-8") as file:     # flushed when it closes
            file.write(json.dumps(row, allow_nan=False) + "\n")


def trim_metrics(folder: Path, step: int, name: str = "metrics.jsonl") -> None:
    """Drop the rows of `step` and later, and a torn last line: what a resumed run is about to write again."""
    path = folder / name
    if dist.is_main() and path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"}\n")]
        write_bytes(path, b"".join(line for line in whole if json.loads(line)["step"] < step))


# random numbers ------------------------------------------------------------------------------------------------------

def stable_seed(seed: int, *keys: int | str) -> int:
    """Return 63 bits that depend on nothing but (seed, keys); Python's own hash(str) differs per process."""
    keys = (seed, *keys)
    assert all(type(key) in (int, str) for key in keys), f"keys should be int or str, got {keys!r}"
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """Return a CPU torch.Generator for (seed, keys), e.g. generator(seed, "rollout", step, id, k)."""
    return torch.Generator().manual_seed(stable_seed(seed, *keys))


def np_rng(seed: int, *keys: int | str) -> np.random.Generator:
    """Return a NumPy generator for (seed, keys)."""
    return np.random.default_rng(stable_seed(seed, *keys))
