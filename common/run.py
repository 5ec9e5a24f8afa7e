"""
What a stage leaves on disk, and how it is found again.

    <run>/<script stem>/config.yaml     settings as resolved; a valid config file itself
                        metrics.jsonl   one object per step; curves.png draws it
                        checkpoints/    step_000200/, the newest two
                        manifest.json   written last: the stage is finished
                        .lock           held by the process that works here

Only the main rank writes.
"""

import dataclasses
import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

from common import dist
from common.checkpoints import drop_checkpoints, latest_checkpoint, require_fit, save_checkpoint    # scripts say run.x
from common.config import fail, read_yaml, save_config
from common.faults import explained
from common.files import (load_tensors, log_metrics, read_json, save_tensors, sha256, trim_metrics, write_bytes,
                          write_json)
from common.guide import command, print_next, print_start
from common.machine import git_state, peak_memory_gb
from common.seeds import generator, np_rng, stable_seed

PACKAGES = ("torch", "transformers", "diffusers", "peft", "numpy", "pillow", "scikit-image", "safetensors")


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
