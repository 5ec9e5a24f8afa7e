"""Optimizers, one update, averaged weights, checkpoints: what the cold start and GRPO of the reward model share."""
import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import checkpoints, dist, run, sharding
from common.checkpoints import list_checkpoints
from common.config import fail
from common.mllm import Judge
from common.replies import Answers


def trainable(judge: Judge) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in judge.model.named_parameters() if p.requires_grad}


def load_weights(judge: Judge, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in trainable(judge).items():
            p.copy_(sharding.shard_like(p, weights[name]))


def copy_of(judge: Judge) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(judge).items()}


@torch.no_grad()
def average(averaged: dict[str, Tensor], judge: Judge, *, decay: float, step: int) -> None:
    """averaged <- d averaged + (1 - d) weights, in place; d rises to `decay`, so that the start is soon forgotten."""
    decay = min(decay, (step + 1) / (step + 10))
    for name, p in trainable(judge).items():
        averaged[name].lerp_(p, 1 - decay)


@contextlib.contextmanager
def holding(judge: Judge, weights: dict[str, Tensor]):
    """Inside, the judge has these weights, all of them on every rank; afterwards its own again, in shards if it was."""
    own = copy_of(judge)
    load_weights(judge, weights)
    with sharding.gathered(judge):
        yield
    load_weights(judge, own)


def optimizers(judge: Judge, lr: float, weight_decay: float, *, muon_lr: float | None = None) -> dict:
    """AdamW; with muon_lr, Muon (torch's) for the matrices and AdamW for embeddings, head, filters, norms, biases."""
    weights, muon = trainable(judge), {}
    if muon_lr:
        muon = {n: p for n, p in weights.items() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n}
    rest = [p for name, p in weights.items() if name not in muon]
    chosen = {"adamw": torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))}
    if muon:
        chosen["muon"] = torch.optim.Muon(muon.values(), lr=muon_lr, weight_decay=weight_decay)
    for optimizer in chosen.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return chosen


def update(judge: Judge, chosen: dict, grad_norm: float, *, bad: float, progress: float, warmup: float,
           final_lr: float) -> tuple[float, int]:
    """
    Sum gradients over ranks, clip, and step, or skip it on all ranks; returns their norm before the clip, 1 if skipped.

    bad: how many losses and rewards of this rank were not finite. One of them on any rank skips, as does a norm that is
    not finite. Learning rate: linear warm-up (`warmup` 0..1), then a cosine from the peak to final_lr of it at the end.
    """
    weights = list(trainable(judge).values())
    dist.sum_gradients(weights)
    norm = sharding.whole(torch.nn.utils.get_total_norm([p.grad for p in weights]))
    torch.nn.utils.clip_grads_with_norm_(weights, grad_norm, norm)
    good = bool(norm.isfinite()) and not dist.all_sum(torch.tensor(float(bad)))
    factor = final_lr + (1 - final_lr) * (1 + float(np.cos(np.pi * progress))) / 2
    for optimizer in chosen.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1, warmup) * factor
        if good:
            optimizer.step()
        optimizer.zero_grad()
    return float(norm), int(not good)


def with_average(judge: Judge, averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint."""
    return trainable(judge) | {f"averaged.{name}": tensor for name, tensor in averaged.items()}


def resume(judge: Judge, averaged: dict[str, Tensor], chosen: dict, folder: Path) -> tuple[int, dict]:
    """Load the newest checkpoint, if any, into the judge, the averaged weights, the optimizers: (next step, state)."""
    found = checkpoints.latest_checkpoint(folder)
    if not found:
        return 0, {}
    step, weights, moments, state = found
    checkpoints.require_fit(weights, with_average(judge, averaged), folder / "checkpoints")
    load_weights(judge, weights)
    for name, tensor in averaged.items():
        tensor.copy_(sharding.shard_like(tensor, weights[f"averaged.{name}"]))
    for name, optimizer in chosen.items():
        optimizer.load_state_dict(moments[name])
        for p, own in optimizer.state.items():
            own |= {key: sharding.shard_like(p, value) for key, value in own.items() if value.shape == p.shape}
    dist.print0(f"resumes {folder} at step {step}")
    return step, state


def save_checkpoint(judge: Judge, averaged: dict, chosen: dict, folder: Path, *, step: int, state: dict) -> None:
    """Whole tensors, also of shards, so that any number of processes can go on from it."""
    weights = with_average(judge, averaged)
    if not sharding.units(judge):                       # of a shard there is no second copy to compare
        dist.assert_same_weights(weights.items())
    moments = {name: optimizer.state_dict() for name, optimizer in chosen.items()}
    weights, moments = sharding.whole([weights, moments], main_only=True)
    checkpoints.save_checkpoint(folder, step, weights=weights, optimizer=moments, state=state)


def drop_nonfinite(answers: Answers) -> int:
    """Make every reward of a cohort that is not finite NaN, no reward, and count them; axes and digits may lack one."""
    wrong = {name: vars(answers)[name].isinf() for name in ("digit_rewards", "axis_rewards")}
    wrong["reply_rewards"] = ~answers.reply_rewards.isfinite()
    for name, mask in wrong.items():
        vars(answers)[name] = vars(answers)[name].masked_fill(mask, torch.nan)
    return sum(int(mask.sum()) for mask in wrong.values())


def count_bad(bad: int, row: dict, folder: Path, step: int) -> int:
    """Steps in a row with an update that was skipped; the third stops the run on all ranks alike."""
    if not row["skipped_updates"]:
        return 0
    found = [f"{float(row[name]):.0f} {name}" for name in ("nonfinite_losses", "nonfinite_rewards") if row.get(name)]
    reason = ", ".join([*found, f"grad_norm {row['grad_norm']:.3g}"])
    dist.print0(f"step {step}: the update was skipped: {reason}")
    if bad == 2:
        last = ["none yet", *list_checkpoints(folder)][-1]
        fail(f"{folder}: three steps in a row without a usable update ({reason}); last good checkpoint: {last}; "
                 "lower the learning rate or raise warmup_steps in a new run=")
    return bad + 1


def save_best(judge: Judge, folder: Path) -> None:
    """best.safetensors: the trainable weights with the highest validation accuracy so far."""
    weights = sharding.whole(trainable(judge), main_only=True)
    if dist.is_main():
        own = {name: p.detach().cpu().clone() for name, p in weights.items()}  # NumPy would pin a gathered one
        run.save_tensors(folder / "best.safetensors", own)
