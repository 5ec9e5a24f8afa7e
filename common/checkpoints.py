"""
Checkpoints: whole or invisible, each file with its checksum; a damaged one gives way to the one before it.

    <folder>/checkpoints/step_000200/   model.safetensors  optimizer.pt  state.json (with their sha256, and its own)

The newest two stay; the weights that did best on validation are kept beside them by the stage. No pickle is loaded.
"""
import hashlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from common import dist
from common.config import fail
from common.run import plain, sha256, write_bytes, write_json

FILES = ("model.safetensors", "optimizer.pt")


def save_checkpoint(folder: Path, step: int, *, weights: dict, optimizer: dict, state: dict) -> Path:
    """
    Write <folder>/checkpoints/step_<step>/ and keep the newest two; only the main rank does anything.

    step: number of finished steps, so the next one to run. weights: flat name -> tensor. optimizer: a
    state_dict(). state: anything else the loop needs, as JSON (seeds depend on step alone).
    """
    path = folder / "checkpoints" / f"step_{step:06d}"
    if not dist.is_main():
        return path
    temporary = Path(f"{path}.tmp")
    for leftover in path.parent.glob("*.tmp"):                  # of a run that was killed while saving
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}    # not tied
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    write_bytes(temporary / FILES[0], safetensors.torch.save(own))
    write_bytes(temporary / FILES[1], buffer.getvalue())
    facts = plain({**state, "step": step})                      # a resumed run hands back the step that it began at
    sums = {name: sha256(temporary / name) for name in FILES} | {"state.json": digest(facts)}
    write_json(temporary / "state.json", facts | {"sha256": sums})
    if path.exists():
        path.rename(f"{path}.old.tmp")
    temporary.rename(path)
    kept = [one for one in list_checkpoints(folder) if step_of(one) <= step][-2:]     # later ones were damaged, or not used
    for old in set(list_checkpoints(folder)) - set(kept):
        old.rename(f"{old}.old.tmp")                            # never seen half deleted, either
    for old in path.parent.glob("*.old.tmp"):
        shutil.rmtree(old)
    return path


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a stage, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step_*") if path.suffix != ".tmp"]
    return sorted(found, key=step_of)


def digest(facts: dict) -> str:
    """sha256 of what state.json holds beside the checksums."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_checkpoint(path: Path) -> tuple[int, dict, dict, dict]:
    """(step, weights, optimizer, state) of one checkpoint, on the CPU; ValueError that names the damaged file."""
    name = "state.json"
    try:
        state = json.loads((path / name).read_bytes())
        sums = state.pop("sha256")
        if sums.pop(name) != digest(state):
            raise ValueError("its checksum does not fit")
        for name in FILES:
            if sha256(path / name) != sums[name]:
                raise ValueError("its checksum does not fit")
        name = FILES[0]
        weights = safetensors.torch.load_file(path / name)
        name = FILES[1]
        optimizer = torch.load(path / name, map_location="cpu", weights_only=True)
        return state["step"], weights, optimizer, state
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
            safetensors.SafetensorError) as error:
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path / name} is damaged ({why})") from error


def latest_checkpoint(folder: Path) -> tuple[int, dict, dict, dict] | None:
    """
    Return (step, weights, optimizer, state) of the newest whole checkpoint, on the CPU, or None if there is none yet.

    A damaged one is named on stderr and the one before it is used; stops if all are damaged.
    """
    found, reasons = list_checkpoints(folder), []
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            reasons.append(str(error))
        if dist.is_main() and path != found[0]:
            print(f"warning: {reasons[-1]}: goes on from the checkpoint before it", file=sys.stderr, flush=True)
    if reasons:
        fail(f"{reasons[0]}, and no checkpoint before it is whole: delete {folder / 'checkpoints'}, and the same "
             "command trains again from the start")
    return None


def drop_checkpoints(folder: Path) -> None:
    """Remove those of a part of a stage that is finished, also where a run was killed before it could."""
    if dist.is_main():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def require_fit(weights: dict, wanted: dict, where: Path | str) -> None:
    """Stop with one line unless `weights` have the names and shapes of `wanted` (name -> tensor)."""
    lacking = sorted(wanted.keys() - weights.keys())
    if lacking:
        fail(f"{where}: lacks {lacking[0]} and {len(lacking) - 1} more tensors: it is of another model, or of another "
             "version of this code; use another run=")
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            fail(f"{where}: {name} is {list(weights[name].shape)}, expected {list(tensor.shape)}: it is of another "
                 "model; use another run=")
