"""What manifest.json records about the machine and the code."""
import resource
import subprocess
from pathlib import Path

import torch


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
