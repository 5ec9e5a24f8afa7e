"""
What a stage leaves on disk, and how it is found again.

    <run>/<script stem>/config.yaml     settings as resolved; a valid config file itself
                        metrics.jsonl   one object per step; curves.png draws it
                        checkpoints/    step_000200/, the newest two
                        manifest.json   written last: the stage is finished
                        .lock           held by the process that works here

Only the main rank writes.

What a stage tells the person who started it: what it does, how long it takes, where results lie, what is next.

What ends a run from outside, in one line each: no memory, no room, no permission, SIGTERM of a cluster, Ctrl-C.

Files that appear whole or not at all (written beside, then renamed), and metrics.jsonl.

Scripts reach all of this through `run`: run.write_json and so on. Pickle is never loaded.

Random numbers as functions of (seed, keys): the same for any process, batch and history, so none is ever saved.

What manifest.json records about the machine and the code.
"""
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from common import dist
from common.config import STAGES, comments_of, fail, read_yaml, save_config

PACKAGES = ("torch", "transformers", "diffusers", "peft", "numpy", "pillow", "scikit-image", "safetensors")
PURPOSE = {
    "01_build_dataset": "photographs become LR images, SR candidates and rankings of them",
    "02_train_reward": "a multimodal LLM learns from the rankings to judge a candidate beside its LR image",
    "03_eval_reward": "how often the judge is right on photographs that no training saw, and what fools it",
    "04_train_sr_grpo": "an SR diffusion model is tuned with GRPO on the judge's scores",
    "05_eval_sr": "the SR model before and after GRPO on test photographs, with the same noise"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
AGAIN = "the same command goes on from the last checkpoint; what was finished is kept"


def open_stage(cfg, script: str, folder: Path | None = None, *, free: tuple[str, ...] = (),
               go_on: bool = False) -> Path:
    """
    Return this stage's folder (<cfg.run>/<script stem> if none is given), new or to be resumed; every rank calls it.

    Exits with status 0 if the stage is finished, unless told to go on, and with one line if its folder was made with
    other settings (`run` may differ, as the folder may have been moved, and `free`: memory, use of a finished stage).
    """
    another, folder = "out" if folder else "run", folder or Path(cfg.run) / Path(script).stem
    record, finished = folder / "config.yaml", (folder / "manifest.json").exists()
    begun = record.exists() and any(path.name not in ("config.yaml", ".lock") for path in folder.iterdir())
    changed = changed_settings(record, cfg, Path(script).stem, free) if begun else []
    dist.barrier()                                      # every rank has looked before the main rank writes
    if changed:
        fail(f"{folder} has other settings: {', '.join(changed)}; use another {another}= or delete the folder")
    if finished and not go_on:
        print_next(folder)
        dist.finish()
        raise SystemExit(0)
    if dist.is_main() and not finished:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            save_config(cfg, record, script)
        except OSError as error:
            fail(f"{folder}: cannot write there ({error.strerror}); choose another run=")
    if not finished:
        print_start(folder, Path(script).stem)
    dist.barrier()
    return folder


def discard(folder: Path) -> None:
    """Take back a folder that was begun with settings or input that cannot be used, but for what people said there."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "judgements.jsonl":
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def lock(folder: Path) -> None:
    """Keep other processes, such as one that outlived its torchrun, from writing to the folder while this one lives."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)        # never closed: the lock ends with the process
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                      # POSIX allows both
        fail(f"{folder}: another process is at work there (`fuser {folder}/.lock` names it): wait for it or end it")


def changed_settings(record: Path, cfg, stem: str, free: tuple[str, ...] = ()) -> list[str]:
    """Return `key: old -> new` for every setting but `run` and `free` that differs from the config.yaml `record`."""
    old = {key: value for _, key, value in read_yaml(str(record), stem)}
    new = dataclasses.asdict(cfg)
    return [f"{key}: {old.get(key, '(none)')} -> {new.get(key, '(none)')}" for key in old | new
            if key not in ("run", *free) and old.get(key, "(none)") != new.get(key, "(none)")]


def require(run_dir: str | Path, stem: str) -> Path:
    """
    Return the folder of a finished earlier stage, or stop and name the command that makes it.

    The main rank looks whether the weights in it are the bytes that were written.
    """
    folder = Path(run_dir) / stem
    if not (folder / "manifest.json").exists():
        fail(f"{folder / 'manifest.json'} is missing: first run `{command(stem)}`")
    for name, wanted in read_json(folder / "manifest.json").get("weights", {}).items() if dist.is_main() else ():
        if not (folder / name).is_file() or sha256(folder / name) != wanted:
            fail(f"{folder / name} is missing or damaged (its checksum does not fit): delete {folder} and run "
                 f"`{command(stem)}` again")
    return folder


def weights_below(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of the models that a stage leaves in its subfolders, with their json files."""
    found = [path for path in sorted(folder.glob("*/**/*")) if path.suffix in (".json", ".safetensors")]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found if "checkpoints" not in path.parts}


def write_manifest(folder: Path, *, script: str, started: float, inputs: list[Path], results: dict) -> None:
    """
    Write manifest.json, the mark of a finished stage, and print results and next command (main rank only).

    started: time.time() at the start of the script. inputs: folders of the earlier stages that were read.
    """
    if not dist.is_main():
        return
    cuda = torch.cuda.is_available()
    packages = {item.name: item.version for item in importlib.metadata.distributions()}
    write_json(folder / "manifest.json", {
        "stage": Path(script).stem,
        "results": results,
        "argv": sys.argv,
        "git": git_state(Path(script).resolve().parent),
        "inputs": {path.name: sha256(path / "manifest.json") for path in inputs},
        "weights": weights_below(folder),                       # so that a damaged file is noticed, see require
        "seconds": round(time.time() - started, 1),             # of this process, since the last resume
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "peak_memory_gb": round(peak_memory_gb(), 3),           # main rank
        "python": platform.python_version(),
        "packages": {name: packages[name] for name in PACKAGES if name in packages},
    })
    for key, value in results.items():
        print(f"{key:<32}{value}")
    print_next(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)                       # on a full disk half a file is in the way
        raise
    temporary.replace(path)


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
    write_bytes(path, (text + "\n").encode())


def write_lines(path: Path, records: list[dict]) -> None:
    """Write one JSON object per line, whole or not at all."""
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_json(path: Path) -> object:
    """Return what a JSON file holds, or stop with one line that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read as JSON ({error}); run the stage that writes it again")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a .safetensors file whole or not at all, with a checksum of the tensors in its header."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(own, metadata={"sha256": tensors_sha256(own)}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of save_tensors, on the CPU, or stop with one line that names it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if (file.metadata() or {}).get("sha256") != tensors_sha256(tensors):
                raise ValueError("its checksum does not fit")
        return tensors
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        fail(f"{path}: cannot be read as safetensors ({error}); delete it and the checkpoints beside it, and run the "
             "stage that writes it again")


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return the hex digest of names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


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
    if not dist.is_main() or not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"}\n"):
            continue
        try:
            kept += [line] if json.loads(line)["step"] < step else []
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path} line {number} is damaged ({error}): remove that line, then give the same command again")
    write_bytes(path, b"".join(kept))


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


def command(stem: str) -> str:
    """Return the command that runs a stage with the config file, run and seed of this process."""
    shared = [argument for argument in sys.argv[2:] if argument.startswith(("run=", "seed="))]
    return " ".join(["python", f"{stem}.py", *sys.argv[1:2], *shared])


def print_start(folder: Path, stem: str) -> None:
    """Say what a stage is about to do, and where its results will lie."""
    dist.print0(f"{stem}: {PURPOSE[stem]}\nwrites {folder}")


def print_next(folder: Path) -> None:
    """Say where a finished stage lies and which command comes next."""
    dist.print0(f"{folder.name} is finished: {folder}   (delete that folder to run it again)")
    if folder.name in STAGES[:-1]:
        dist.print0(f"next: {command(STAGES[STAGES.index(folder.name) + 1])}")


@contextlib.contextmanager
def explained(config: type | None = None) -> Iterator[None]:
    """
    Give one line with what to do for a fault from outside, and let a bug keep its traceback; decorates main.

    config: the script's settings; those whose comment says memory are named when memory runs out.
    """
    advice = "make room or change run=, then give the same command again: what was finished is kept"
    try:
        with stopped_by_sigterm():
            yield
    except KeyboardInterrupt:
        if dist.is_main():
            print(f"\nerror: stopped by Ctrl-C: {AGAIN}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            fail(no_memory(error, config))
        if error.errno not in NO_ROOM:
            raise
        fail(f"{error}: {advice}")
    except safetensors.SafetensorError as error:
        if not any(f"os error {code})" in str(error) for code in NO_ROOM):      # as its Rust library spells it
            raise
        fail(f"{error}: {advice}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(no_memory(error, config))
    except RuntimeError as error:
        if "allocate memory" not in str(error):                 # torch on a CPU raises no type of its own
            raise
        fail(no_memory(error, config))


def no_memory(error: BaseException, config: type | None) -> str:
    """The line that names the settings to lower."""
    names = memory_settings(config) if config else []
    what = " or ".join(names) if names else "lower what --help marks `memory`"
    return f"out of memory ({str(error)[:300]}): {what}, and give the same command again: what was finished is kept"


def memory_settings(config: type) -> list[str]:
    """What to do with a script's settings that cost nothing but memory or time, by the comments that --help shows."""
    source = Path(sys.modules[config.__module__].__file__).read_text(encoding="utf-8")
    meanings = comments_of(config, source).items()
    names = [name for name, meaning in meanings if re.search("memory (only|and speed)", meaning)]
    defaults = {name: vars(config)[name] for name in names}
    return [f"set {name}=true" if default is False else f"set {name}=1" if default == 0 else f"lower {name}"
            for name, default in defaults.items()]                  # workers=0 is one per core


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """
    End the process on SIGTERM with one line and status 143, as fast as SIGKILL would.

    A thread waits for the signal, as Python's own handlers wait for the main thread, which may hang in a collective
    whose other ranks are gone. Nothing is cleaned up: whatever is on the disk must stand SIGKILL anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)     # the pipe gets the number of every handled signal
    pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=wait_for_sigterm, args=(read,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe_before)
        signal.signal(signal.SIGTERM, before)
        os.close(write)
        thread.join()
        os.close(read)


def wait_for_sigterm(read: int) -> None:
    """Leave the process once the pipe says SIGTERM; return once it is closed."""
    while received := os.read(read, 1):
        if received[0] == signal.SIGTERM:
            if dist.is_main():
                os.write(2, f"\nerror: stopped by SIGTERM: {AGAIN}\n".encode())
            os._exit(128 + signal.SIGTERM)
