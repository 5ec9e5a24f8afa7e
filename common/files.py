"""
Files that appear whole or not at all (written beside, then renamed), and metrics.jsonl.

Scripts reach all of this through `run`: run.write_json and so on. Pickle is never loaded.
"""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from common import dist
from common.config import fail


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
