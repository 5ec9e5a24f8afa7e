"""What the two trainings of stage 04 share: trained weights and their averages, checkpoints, and the reference."""
import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from common import checkpoints, dist, run, sr_pipelines
from common.sr_policy import Policy

# convolutions, attention, time embedding; conv_out has a large gradient, nearly all noise
LORA_LAYERS = ["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "linear_1", "linear_2"]


def trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def average(averaged: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    """averaged <- decay averaged + (1 - decay) now, in place."""
    for name, tensor in averaged.items():
        tensor.lerp_(now[name], 1 - decay)


def save(folder: Path, step: int, parts: dict[str, dict[str, Tensor]], *, optimizer: torch.optim.Optimizer,
         state: dict) -> None:
    """Checkpoint of the named parts ({"policy": {name: tensor}, ..}) after `step` finished steps."""
    weights = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    dist.assert_same_weights(weights.items())
    checkpoints.save_checkpoint(folder, step, weights=weights, optimizer=optimizer.state_dict(), state=state)


@torch.no_grad()
def resume(folder: Path, parts: dict[str, dict[str, Tensor]],
           optimizer: torch.optim.Optimizer) -> tuple[int, dict]:
    """Load the newest checkpoint into the parts, if there is one: (first step to do, state)."""
    found = checkpoints.latest_checkpoint(folder)
    if not found:
        return 0, {}
    step, weights, moments, state = found
    wanted = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    checkpoints.require_fit(weights, wanted, folder / "checkpoints")
    for part, own in parts.items():
        for name, tensor in own.items():
            tensor.copy_(weights[f"{part}.{name}"])
    optimizer.load_state_dict(moments)
    dist.print0(f"resumes {folder} at step {step}")
    return step, state


def with_reference(cfg, policy: Policy) -> tuple[Policy, Policy]:
    """The policy to train and its reference: with LoRA the same object (adapter off), else with a UNet of its own."""
    if cfg.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    layers = LORA_LAYERS if isinstance(policy, Policy) else sr_pipelines.LORA_LAYERS
    if not cfg.lora_rank:
        shared = {id(part): part for name, part in policy.named_children() if name != "unet"}   # autoencoder, ..
        trained = copy.deepcopy(policy, shared)
        trained.unet.requires_grad_(True)
        return trained, policy
    torch.manual_seed(run.stable_seed(cfg.seed, "lora"))            # peft draws from torch's own generator
    policy.unet = get_peft_model(policy.unet, LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha,
                                                         target_modules=layers))
    return policy, policy
