"""
FSDP2 for full fine-tuning of the reward model: weights, gradients and moments lie in shards, one per process.

A pass forward or backward gathers one layer at a time, so all ranks make the same number of passes: `missing_passes`
tells a rank by how many others exceed it. Where ranks cannot know how many passes they make (they write replies until
all have ended, validate shares of unlike size), `gathered` holds the whole model instead and nothing is exchanged.

Every function takes a judge that is not sharded, too, and does nothing then. Source: torch's fully_shard.
"""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from common import dist
from common.mllm import Judge


def shard(judge: Judge) -> None:
    """Cut each layer of both towers, and embeddings, head and the rest as one more unit, into a piece per rank."""
    if dist.world_size() == 1:
        return
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")    # features: never in place
    net = judge.net
    for layer in (*net.model.visual.blocks, *net.model.language_model.layers):
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(net, reshard_after_forward=False)       # the head's weight is read outside of any module's forward
    register_fsdp_forward_method(net, "get_image_features")     # what each pass of ours begins with
    for unit in units(judge):
        unit.set_gradient_divide_factor(1.0)            # the sum over ranks, not the mean, as dist.sum_gradients has it
        unit.set_force_sum_reduction_for_comms(True)    # gloo knows no other


def units(judge: Judge) -> list[FSDPModule]:
    return [module for module in judge.model.modules() if isinstance(module, FSDPModule)]


def reshard(judge: Judge) -> None:
    """Drop what was gathered, the order of past passes included: it decides which layer is gathered ahead of time."""
    for unit in units(judge):
        unit.reshard()
    for root in units(judge)[:1]:
        root.reset_iter_state()


@contextmanager
def gathered(judge: Judge) -> Iterator[None]:
    """Inside, every rank holds the whole model, for passes without gradient and for reading weights."""
    for unit in units(judge):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units(judge)[1:]:
        unit.set_reshard_after_forward(True, recurse=False)
    reshard(judge)


def missing_passes(judge: Judge, count: int) -> int:
    """How many passes beyond its own `count` this rank has to make, so that no other rank waits for it forever."""
    return int(dist.gather_rows(torch.tensor([count])).max()) - count if units(judge) else 0


def whole(value: object, *, main_only: bool = False) -> object:
    """
    A tensor, or all tensors in nested dicts and lists, gathered from the shards; every rank calls it.

    main_only: to the main rank's CPU one after the other, as they may not fit a GPU together; nothing on other ranks.
    """
    if isinstance(value, dict):
        return {key: whole(item, main_only=main_only) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, main_only=main_only) for item in value]
    if not isinstance(value, DTensor):
        return value
    full = value.detach().full_tensor()
    return full if not main_only else full.cpu() if dist.is_main() else None


def shard_like(param: Tensor, tensor: Tensor) -> Tensor:
    """This rank's shard of a whole tensor that all ranks have, cut as param is; a shard stays as it is."""
    if isinstance(tensor, DTensor) or not isinstance(param, DTensor):
        return tensor
    return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
