"""Random numbers as functions of (seed, keys): the same for any process, batch and history, so none is ever saved."""
import hashlib

import numpy as np
import torch


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
