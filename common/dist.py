"""
Ranks: the same calls work without torchrun; then there is one rank, and nothing is exchanged.

gloo carries CPU tensors, nccl CUDA tensors. Sums are sums: divide once, by a count that was summed, too. Every rank
must make the same calls in the same order. A rank that fails or dies ends the job: torchrun sees to that.
"""
import os
import time
from collections.abc import Iterable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as torch_dist

from common.config import fail

TIMEOUT = timedelta(minutes=10)     # longer than one rank works alone


def init(timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group if torchrun started us, and return this rank's device. timeout: of waiting for others."""
    allow_tf32(False)                           # torch's default rounds float32 convolutions to 10 bits (matmuls not)
    torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew for each shape, and each branch has a new one
    if "RANK" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        torch_dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    local_rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= devices:
        fail(f"torchrun started more processes than there are GPUs: use --nproc_per_node={devices}")
    torch.cuda.set_device(local_rank)
    torch_dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    return torch.device("cuda", local_rank)


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of float32 convolutions and matrix products to TF32, 10 bits; sums stay."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def rank() -> int:
    """Return this process's number, 0 to world_size() - 1."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process writes files and prints."""
    return rank() == 0


def print0(message: str) -> None:
    """Print on the main rank only."""
    if is_main():
        print(message, flush=True)


def clock(device: torch.device) -> float:
    """Return seconds on a clock, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def barrier() -> None:
    """Wait until every rank is here."""
    all_sum(torch.zeros(1))         # a sum over gloo: unlike torch's barrier it needs no GPU and names none


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of every rank's tensor (same shape on all ranks) as a new tensor."""
    total = tensor.detach().clone()
    if world_size() > 1:
        torch_dist.all_reduce(total)
    return total


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """
    Return every rank's rows, in rank order, as a new tensor without gradient.

    tensor: [n, ...] where n may differ between ranks (0, too) and the rest may not. Result: [sum of n, ...].
    """
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor.clone()
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(tensor)
    counts = all_sum(counts).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])   # all_gather needs equal sizes
    padded[:len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    torch_dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def sum_gradients(params: Iterable[torch.nn.Parameter]) -> None:
    """
    Replace each .grad by its sum over ranks; a missing one counts as zeros, on one rank as on many.

    The sum, not the mean: divide the loss by the step's count over all ranks (grpo_loss's `denominator`).
    """
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        if world_size() > 1:
            torch_dist.all_reduce(param.grad)


def assert_same_weights(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Stop every rank, naming the first tensor, if any rank's weights differ from those of rank 0."""
    if world_size() == 1:
        return
    names, differs = [], []
    for name, tensor in named_tensors:
        reference = tensor.detach().clone()
        torch_dist.broadcast(reference, src=0)
        names.append(name)
        differs.append(not torch.equal(reference, tensor))
    drifted = all_sum(torch.tensor(differs, dtype=torch.int64)).nonzero()
    if len(drifted):
        fail(f"the ranks no longer have the same weights: {names[drifted[0, 0]]} and {len(drifted) - 1} more "
             "tensors differ; this is a bug, and the last checkpoint is the last good state")


def finish() -> None:
    """Wait for every rank, then leave the process group; the last line of every script."""
    if torch_dist.is_initialized():
        barrier()
        torch_dist.destroy_process_group()


def mine(items: list) -> list:
    """This rank's share of a list: contiguous, so that gather_rows restores the order."""
    return [items[i] for i in np.array_split(np.arange(len(items)), world_size())[rank()]]
