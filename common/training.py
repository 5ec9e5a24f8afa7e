"""
What the trainings of 02 and 04 share: averaged weights, one update or none, and checkpoints to resume from.

Weights are a dict name -> tensor, such as `trainable(module)`; everything here works on such a dict in place. Sizes do
not matter, and neither does the number of ranks: gradients are summed, and all ranks take the same decisions.

    <folder>/checkpoints/step_000200/   weights.safetensors  optimizers.pt  state.json (with the sha256 of the others)
"""
import contextlib
import json
import math
import pickle
import shutil
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn

from common import dist
from common.config import fail
from common.run import sha256, write_json

Weights = dict[str, Tensor]


# weights -----------------------------------------------------------------------------------------------------------

def trainable(module: nn.Module) -> Weights:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def copied(weights: Weights) -> Weights:
    """Detached copies."""
    return {name: p.detach().clone() for name, p in weights.items()}


@torch.no_grad()
def average(averaged: Weights, weights: Weights, decay: float) -> None:
    """averaged <- decay averaged + (1 - decay) weights, in place; decay 0 copies."""
    for name, tensor in averaged.items():
        tensor.lerp_(weights[name], 1 - decay)


def named(**parts: Weights) -> Weights:
    """Several sets of weights as one, as a checkpoint holds them: `averaged.<name>` and so on."""
    return {f"{part}.{name}": tensor for part, weights in parts.items() for name, tensor in weights.items()}


@contextlib.contextmanager
def swapped(weights: Weights, others: Weights):
    """Inside, the parameters `weights` have the values of `others`, and the reverse; afterwards all is as it was."""
    def swap() -> None:
        for name, p in weights.items():
            p.data, others[name].data = others[name].data, p.data

    swap()
    try:
        yield
    finally:
        swap()


def adapter_off(network: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which a network with LoRA is its own reference; one without has nothing to switch off."""
    return network.disable_adapter() if isinstance(network, PeftModel) else contextlib.nullcontext()


def merged(network: nn.Module) -> nn.Module:
    """The network with its LoRA in its weights; one without stays as it is."""
    return network.merge_and_unload() if isinstance(network, PeftModel) else network


# updates -----------------------------------------------------------------------------------------------------------

def cosine(progress: float, final: float) -> float:
    """Factor of the learning rate: 1 at progress 0, falling along a cosine to `final` at progress 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Learning rate of every group: the one it was made with, times factor."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def update(weights: Weights, optimizers: dict[str, torch.optim.Optimizer], max_norm: float, *,
           bad: float = 0.0) -> tuple[float, int]:
    """
    Sum the gradients over ranks, clip their norm, and step, or skip the step; gradients are cleared either way.

    bad: how many losses or rewards of this rank were not finite. One on any rank, or a norm that is not finite, skips
    the update on all ranks. Returns the norm before the clip, and 1 if the update was skipped, else 0.
    """
    dist.sum_gradients(weights.values())
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), max_norm)
    good = bool(norm.isfinite()) and not dist.all_sum(torch.tensor(float(bad)))
    for optimizer in optimizers.values():
        if good:
            optimizer.step()
        optimizer.zero_grad()
    return float(norm), int(not good)


def count_bad_steps(count: int, reason: str, *, folder: Path, step: int) -> int:
    """
    How many steps in a row were of no use: 0 without a reason, else count + 1; the third stops the run on all ranks.

    reason: why this step was of no use, in words; empty if it was of use.
    """
    if not reason:
        return 0
    dist.print0(f"step {step} was of no use: {reason}")
    if count == 2:
        last = ["none yet", *list_checkpoints(folder)][-1]
        fail(f"{folder}: three steps in a row without a usable update ({reason}); last good checkpoint: {last}; "
             "lower the learning rate or raise warmup_steps in a new run=")
    return count + 1


# checkpoints -------------------------------------------------------------------------------------------------------

def save_checkpoint(folder: Path, step: int, *, weights: Weights, optimizers: dict[str, torch.optim.Optimizer],
                    state: dict) -> None:
    """
    Write <folder>/checkpoints/step_<step>/, whole or not at all, and keep the newest two; every rank calls it.

    step: number of finished steps, so the next one to run. state: what else the loop needs, as JSON. Random numbers are
    functions of (seed, step, item), so there is nothing random to save. Stops if the ranks' weights differ.
    """
    dist.assert_same_weights(weights.items())
    if not dist.is_main():
        return
    path = folder / "checkpoints" / f"step_{step:06d}"
    partial = Path(f"{path}.tmp")
    shutil.rmtree(partial, ignore_errors=True)                  # of a run that was killed while saving
    partial.mkdir(parents=True)
    tensors = {name: p.detach().cpu().clone().contiguous() for name, p in weights.items()}      # tied ones come apart
    safetensors.torch.save_file(tensors, partial / "weights.safetensors")
    torch.save({name: optimizer.state_dict() for name, optimizer in optimizers.items()}, partial / "optimizers.pt")
    sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
    write_json(partial / "state.json", {**state, "step": step, "sha256": sums})
    shutil.rmtree(path, ignore_errors=True)                     # a damaged one that this run did not start from
    partial.rename(path)
    for old in list_checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    paths = [path for path in (folder / "checkpoints").glob("step_*") if path.suffix != ".tmp"]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


@torch.no_grad()
def resume(folder: Path, weights: Weights, optimizers: dict[str, torch.optim.Optimizer]) -> tuple[int, dict]:
    """
    Load the newest checkpoint into weights and optimizers: (next step, state), or (0, {}) if there is none yet.

    A damaged checkpoint is named on stderr and the one before it is used. Stops with one line if all are damaged, or if
    the newest is of another model.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            state, tensors, moments = load_checkpoint(path)
            break
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, EOFError, pickle.UnpicklingError,
                safetensors.SafetensorError) as error:
            if dist.is_main():
                print(f"warning: {path} is damaged ({error})", file=sys.stderr, flush=True)
    else:
        if paths:
            fail(f"{folder / 'checkpoints'}: all checkpoints are damaged: delete that folder, and the same command "
                 "trains again from the start")
        return 0, {}
    for name, tensor in weights.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            fail(f"{path}: {name} is missing or of another size: it is of another model, or of another version of this "
                 "code; use another run=")
        tensor.copy_(tensors[name])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(moments[name])
    dist.print0(f"resumes {folder} at step {state['step']}")
    return state["step"], state


def load_checkpoint(path: Path) -> tuple[dict, Weights, dict]:
    """(state, weights, state_dict of each optimizer) on the CPU; raises one of many errors if a file is damaged."""
    state = json.loads((path / "state.json").read_text())
    for name, digest in state.pop("sha256").items():
        if sha256(path / name) != digest:
            raise ValueError(f"the checksum of {name} does not fit")
    moments = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
    return state, safetensors.torch.load_file(path / "weights.safetensors"), moments


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a part of a stage that is finished."""
    if dist.is_main():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
